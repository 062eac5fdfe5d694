"""Documents to train on in which single facts matter: passages of books with statements hidden in them, asked later.

    python benchmarks/facts.py BOOKS.jsonl[.xz] facts.jsonl.xz [--documents 600] [--words 2400] [--facts 8] [--seed 0]

Each record is a chat as `ahn train` reads it: a `document`, and questions on all of its facts in another order. Facts
stand between sentences. Their wording has nothing of the benchmarks' (RULER's magic numbers, pass keys), so that these
still measure what they should. Names and values are drawn anew for every document.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable
from typing import NamedTuple

from common import records, write_records


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
    """A sentence to hide, what is asked about it, and the answer."""

    told: str
    question: str
    answer: str


def name(chance: random.Random) -> str:
    """Of a person or a place that no text has."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books")
    parser.add_argument("output")
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--words", type=int, default=2400)
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.documents < 1:
        parser.error(f"--documents {options.documents}: expected at least 1")
    chance = random.Random(options.seed)
    books = [record["text"] for record in records(options.books)]
    made = (document(chance.choice(books), options.words, options.facts, chance) for _ in range(options.documents))
    write_records(options.output, made)


if __name__ == "__main__":
    main()
