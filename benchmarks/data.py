"""Makes data to train on and to calibrate with, and puts adapters together.

    python benchmarks/data.py facts BOOKS.jsonl[.xz] facts.jsonl.xz [--documents 600] [--words 2400] [--facts 8]
    python benchmarks/data.py far squad-train.jsonl[.xz] far.jsonl.xz [--documents 400] [--words 5000] [--questions 20]
    python benchmarks/data.py articles squad-train.jsonl[.xz] part.jsonl.xz [--count 40]
    python benchmarks/data.py join CELLS OUTPUT [--gates ADAPTER] [--heads ADAPTER]

facts: passages of books with statements hidden between their sentences, and questions on all of them in another order.
The wording differs from that of the benchmarks (RULER's magic numbers, pass keys), so that training does not spoil
them. Names and values are drawn anew for every document.

far: paragraphs of several of SQuAD's articles as one document, and questions on any of them at its end, in random
order, so that an answer lies far back. No paragraph is in two documents until all have been used.

articles: the last articles of a file. There are few of them, so that a text gets several questions. Retrieval heads are
chosen on other articles.

join: an adapter from parts that were trained apart. Each part depends on the base alone. CELLS gives the cells,
`--gates` the weights and sizes of a store, `--heads` the retrieval heads.

A record of facts and far is a chat as `ahn train` reads it. `--tiny` tries facts, far and articles on a few records.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import BOOK, records, write_records

SIZES = "window", "sinks", "store", "store_size", "store_span"  # settings that come with the gates


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SYLLABLES = _words(
    "ba be bo da den do fa fen ga gor ha hel ka kel la len lo ma mar mi na nel or pa per ra ren ro sa sel ta tor va"
)
ENDINGS = ("d", "k", "l", "m", "n", "r", "s", "t", "", "", "")
COLOURS = _words("amber azure black blue bronze brown copper green grey ivory orange pink purple red silver white")
THINGS = _words(
    "archive boiler bridge cabinet cellar chapel clinic depot elevator engine furnace gallery garage gate generator "
    "greenhouse harbour kitchen laboratory library locker mill museum observatory office pump safe server station "
    "studio telescope theatre tower turbine vault warehouse workshop"
)
GOODS = _words("apples barrels blankets books bottles bricks candles clocks coats horses lamps maps nails ropes sheep")
MONTHS = _words("January February March April May June July August September October November December")


class Fact(NamedTuple):
    """A sentence to hide, the question about it, and the answer."""

    told: str
    question: str
    answer: str


def name(chance: random.Random) -> str:
    """A name of a person or a place that occurs in no text."""
    syllables = (chance.choice(SYLLABLES) for _ in range(chance.choice((2, 2, 3))))
    return "".join(syllables).capitalize() + chance.choice(ENDINGS)


def _thing(chance: random.Random) -> str:
    return f"the {chance.choice(COLOURS)} {chance.choice(THINGS)}"


def _digits(chance: random.Random) -> str:
    count = chance.choice((4, 5, 6, 7, 8))
    return str(chance.randrange(10 ** (count - 1), 10**count))


def _serial(chance: random.Random) -> str:
    parts = [f"{chance.getrandbits(16):04x}" for _ in range(chance.choice((2, 4, 6)))]
    return "-".join(parts)


def _code(chance: random.Random) -> Fact:
    thing, code = _thing(chance), _digits(chance)
    told = chance.choice((f"The entry code of {thing} is {code}.", f"To open {thing}, dial {code}."))
    return Fact(told, f"Which code opens {thing}?", code)


def _number_of_serial(chance: random.Random) -> Fact:
    thing, serial = _thing(chance), _serial(chance)
    return Fact(f"Engraved on {thing} is the serial number {serial}.", f"What is the serial number of {thing}?", serial)


def _password(chance: random.Random) -> Fact:
    who, word = name(chance), f"{chance.choice(COLOURS)}-{chance.choice(GOODS)}-{chance.randrange(10, 100)}"
    return Fact(f"{who} chose the password {word}.", f"Which password did {who} choose?", word)


def _birthplace(chance: random.Random) -> Fact:
    who, where = f"{name(chance)} {name(chance)}", name(chance)
    return Fact(f"{who} was born in the village of {where}.", f"In which village was {who} born?", where)


def _telephone(chance: random.Random) -> Fact:
    who, number = f"{name(chance)} {name(chance)}", f"{chance.randrange(100, 1000)}-{chance.randrange(1000, 10000)}"
    return Fact(f"You can reach {who} by telephone at {number}.", f"What is the telephone number of {who}?", number)


def _stock(chance: random.Random) -> Fact:
    where, goods, count = _thing(chance), chance.choice(GOODS), str(chance.randrange(11, 9999))
    told = f"An inventory of {where} counted {count} {goods}."
    return Fact(told, f"How many {goods} were counted in {where}?", count)


def _date(chance: random.Random) -> Fact:
    who, what = name(chance), _thing(chance)
    when = f"{chance.randrange(1, 29)} {chance.choice(MONTHS)} {chance.randrange(1500, 2030)}"
    return Fact(f"On {when}, {who} inaugurated {what}.", f"When did {who} inaugurate {what}?", when)


def _owner(chance: random.Random) -> Fact:
    who, what = f"{name(chance)} {name(chance)}", _thing(chance)
    return Fact(f"According to the register, {what} belongs to {who}.", f"To whom does {what} belong?", who)


def _several(chance: random.Random) -> Fact:
    """One sentence with several values."""
    who, values = name(chance), [_digits(chance) for _ in range(chance.choice((2, 3, 4)))]
    listed = ", ".join(values[:-1]) + f" and {values[-1]}"
    return Fact(f"The lottery tickets of {who} were {listed}.", f"Which lottery tickets did {who} have?", listed)


KINDS: tuple[Callable[[random.Random], Fact], ...] = (
    _code, _number_of_serial, _password, _birthplace, _telephone, _stock, _date, _owner, _several
)  # fmt: skip


def scattered(chance: random.Random) -> tuple[list[str], Fact]:
    """Several sentences on one thing, far from each other, asked for together."""
    thing, values = _thing(chance), [_digits(chance) for _ in range(chance.choice((2, 3)))]
    told = [f"One of the combinations of {thing} is {value}." for value in values]
    return told, Fact("", f"List all combinations of {thing}.", ", ".join(values))


def document(text: str, words: int, count: int, chance: random.Random) -> dict[str, object]:
    """A record: about `words` words of `text`, with `count` facts and one scattered one."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    low = chance.randrange(max(1, len(sentences) - 50))
    passage: list[str] = []
    while low < len(sentences) and sum(map(len, passage)) < 5.7 * words:
        passage.append(sentences[low])
        low += 1
    facts = [chance.choice(KINDS)(chance) for _ in range(count)]
    told, together = scattered(chance)
    # where they go is drawn in the passage as it was, so that neighbours are possible and order is kept for one fact
    places = sorted((chance.randrange(len(passage) + 1) for _ in range(count + len(told))), reverse=True)
    chance.shuffle(hidden := [fact.told for fact in facts])
    order = chance.sample(range(len(places)), len(told))
    texts = iter(hidden)
    statements = [None] * len(places)
    for at, sentence in zip(sorted(order, reverse=True), told, strict=True):
        statements[at] = sentence
    for place, statement in zip(places, statements, strict=True):
        passage.insert(place, statement if statement is not None else next(texts))
    asked = chance.sample([*facts, together], count + 1)
    messages = []
    for fact in asked:
        messages += [{"role": "user", "content": fact.question}, {"role": "assistant", "content": fact.answer}]
    return {"document": " ".join(passage), "messages": messages}


def hidden(options: argparse.Namespace, chance: random.Random) -> Iterator[dict[str, object]]:
    """The documents of `facts`."""
    books = [record["text"] for record in records(options.source)]
    for _ in range(options.documents):
        yield document(chance.choice(books), options.words, options.facts, chance)


def paragraphs(found: list[dict[str, Any]], chance: random.Random) -> Iterator[dict[str, Any]]:
    """Articles in random order, without end."""
    while True:
        chance.shuffle(found)
        for article in found:
            yield from article["paragraphs"]


def joined(options: argparse.Namespace, chance: random.Random) -> Iterator[dict[str, Any]]:
    """The documents of `far`: paragraphs one after the other, and questions on them."""
    from ahn.eval.articles import articles
    from ahn.eval.records import Record

    read = (Record(f"{options.source}:{n}", fields) for n, fields in enumerate(records(options.source), 1))
    source = paragraphs(list(articles(read)), chance)
    for _ in range(options.documents):
        texts: list[str] = []
        asked: list[dict[str, Any]] = []
        while sum(len(text.split()) for text in texts) < options.words:
            paragraph = next(source)
            texts.append(paragraph["context"].strip())
            asked += [qa for qa in paragraph["qas"] if qa["answers"]]
        messages = []
        for qa in chance.sample(asked, min(options.questions, len(asked))):
            answer = {"role": "assistant", "content": qa["answers"][0]}
            messages += [{"role": "user", "content": qa["question"]}, answer]
        yield {"document": "\n\n".join(texts), "messages": messages}


def last(options: argparse.Namespace, chance: random.Random) -> list[dict[str, Any]]:
    """The articles of `articles`."""
    return records(options.source)[-options.count :]


def make(options: argparse.Namespace) -> None:
    for name in ("documents", "count"):
        if getattr(options, name, 1) < 1:
            sys.exit(f"--{name} {getattr(options, name)}: expected at least 1")
    write_records(options.output, options.documents_of(options, random.Random(options.seed)))


def join(options: argparse.Namespace) -> None:
    from ahn.adapter_files import check_shape, read_adapter, write_adapter

    whole = read_adapter(options.source)
    if options.gates:
        gates = read_adapter(options.gates)
        check_shape(gates, whole.shape)
        kept = {name: value for name, value in whole.tensors.items() if ".store." not in name}
        trained = {name: value for name, value in gates.tensors.items() if ".store." in name}
        config = whole.config.replace(**{name: getattr(gates.config, name) for name in SIZES})
        whole = dataclasses.replace(whole, tensors=kept | trained, config=config)
    if options.heads:
        heads = read_adapter(options.heads)
        check_shape(heads, whole.shape)
        whole = dataclasses.replace(whole, retrieval=heads.retrieval)
    write_adapter(whole, options.output)


def tiny() -> None:
    """Each kind of document once, of the bundled book."""
    with tempfile.TemporaryDirectory() as folder:
        books, articles, output = (str(Path(folder) / name) for name in ("books.jsonl", "squad.jsonl.xz", "out.jsonl"))
        text = BOOK.read_text(encoding="utf-8")
        qas = [{"question": "Who?", "answers": ["Lupin"]}]
        made = ({"title": f"{n}", "paragraphs": [{"context": text[1000 * n :][:900], "qas": qas}]} for n in range(5))
        write_records(books, [{"text": text}])
        write_records(articles, made)
        main(["facts", books, output, "--documents", "2", "--words", "300"])
        main(["far", articles, output, "--documents", "2", "--words", "300"])
        main(["articles", articles, output, "--count", "2"])
        print(json.dumps(records(output)[0])[:100])


def main(argv: list[str] | None = None) -> None:
    if (sys.argv[1:] if argv is None else argv) == ["--tiny"]:
        tiny()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    numbers = {
        "facts": (hidden, {"documents": 600, "words": 2400, "facts": 8, "seed": 0}),
        "far": (joined, {"documents": 400, "words": 5000, "questions": 20, "seed": 0}),
        "articles": (last, {"count": 40, "seed": 0}),
        "join": (None, {}),
    }
    for name, (documents_of, defaults) in numbers.items():
        command = commands.add_parser(name)
        command.add_argument("source", help="an adapter with cells" if documents_of is None else "JSON lines")
        command.add_argument("output")
        for option, default in defaults.items():
            command.add_argument(f"--{option}", type=int, default=default)
        command.set_defaults(run=make if documents_of else join, documents_of=documents_of)
    command.add_argument("--gates")
    command.add_argument("--heads")
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
