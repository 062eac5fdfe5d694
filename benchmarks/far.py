"""Long documents to train on whose questions come behind all of the text: SQuAD's articles, joined.

    python benchmarks/far.py squad-train.jsonl[.xz] far.jsonl.xz [--documents 400] [--words 5000] [--questions 20]

In a chat on one article each answer lies a few hundred words back. Here paragraphs of several articles are one document
of about `--words` words, and questions on any of its paragraphs are asked at the end, in random order. Each record is
a chat as `ahn train` reads it. No paragraph is in two documents until all have been used.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from typing import Any

from ahn.eval.tasks.articles import articles
from ahn.eval.tasks.base import Record
from common import records, write_records


def paragraphs(found: list[dict[str, Any]], chance: random.Random) -> Iterator[dict[str, Any]]:
    """Of articles in random order, for ever."""
    while True:
        chance.shuffle(found)
        for article in found:
            yield from article["paragraphs"]


def document(source: Iterator[dict[str, Any]], words: int, questions: int, chance: random.Random) -> dict[str, Any]:
    """A record: paragraphs one after the other, and questions on them."""
    texts: list[str] = []
    asked: list[dict[str, Any]] = []
    while sum(len(text.split()) for text in texts) < words:
        paragraph = next(source)
        texts.append(paragraph["context"].strip())
        asked += [qa for qa in paragraph["qas"] if qa["answers"]]
    messages = []
    for qa in chance.sample(asked, min(questions, len(asked))):
        messages += [{"role": "user", "content": qa["question"]}, {"role": "assistant", "content": qa["answers"][0]}]
    return {"document": "\n\n".join(texts), "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("articles")
    parser.add_argument("output")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--words", type=int, default=5000)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.documents < 1:
        parser.error(f"--documents {options.documents}: expected at least 1")
    chance = random.Random(options.seed)
    read = (Record(f"{options.articles}:{n}", fields) for n, fields in enumerate(records(options.articles), 1))
    source = paragraphs(articles(read), chance)
    made = (document(source, options.words, options.questions, chance) for _ in range(options.documents))
    write_records(options.output, made)


if __name__ == "__main__":
    main()
