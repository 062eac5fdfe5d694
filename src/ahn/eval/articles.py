"""Articles with questions on their paragraphs: SQuAD in any of its forms, as one form of record."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ahn.dialogue import plain
from ahn.errors import EvalError
from ahn.eval.records import Record, found, hub, read

SQUAD = "rajpurkar/squad"
Article = dict[str, Any]
"""`title`, and `paragraphs`, each with `context` and `qas` (`question`, `answers`: texts)."""


def squad(data: Path | None, task: str) -> list[Article]:
    """Articles of a file or folder, or of the hub.

    A record is an article, as in SQuAD's own file and in `Article`, or a question with its context, as on the hub.
    """
    if data is None:
        return articles(hub(SQUAD, split="validation"))
    return articles(read(found(data, ("squad", "squad-dev", "dev-v1.1", "dev-v2.0"), task)))


def articles(records: Iterable[Record]) -> list[Article]:
    """Raises EvalError for a field that is missing."""
    by_title: dict[str, Article] = {}
    for number, record in enumerate(records):
        if "paragraphs" in record.fields:
            paragraphs = [_paragraph(part) for part in record.records("paragraphs")]
            title = f"{record.fields.get('title', '')} {number}"
            by_title[title] = {"title": title, "paragraphs": paragraphs}
            continue
        title, context = record.fields.get("title") or "", record.text("context")
        paragraphs = by_title.setdefault(title, {"title": title, "paragraphs": []})["paragraphs"]
        if not paragraphs or paragraphs[-1]["context"] != context:
            paragraphs.append({"context": context, "qas": []})
        paragraphs[-1]["qas"] += _asked(record)
    return list(by_title.values())


def _paragraph(record: Record) -> dict[str, Any]:
    asked = [question for qa in record.records("qas") for question in _asked(qa)]
    return {"context": record.text("context"), "qas": asked}


def _asked(record: Record) -> list[dict[str, Any]]:
    """The question, if it has an answer."""
    answers = record["answers"]
    if isinstance(answers, dict):
        answers = Record(f"{record.where}, answers", answers)["text"]
    if not isinstance(answers, list):
        raise EvalError(f"{record.where}: field 'answers' is {type(answers).__name__}: expected a list")
    texts = [Record(record.where, answer).text("text") if isinstance(answer, dict) else answer for answer in answers]
    if not all(isinstance(text, str) for text in texts):
        raise EvalError(f"{record.where}: field 'answers': expected texts")
    return [{"question": record.text("question"), "answers": list(dict.fromkeys(texts))}] if texts else []


def shuffled_paragraphs(
    records: Iterable[Article], tokenizer: Any, seed: int
) -> tuple[list[dict[str, Any]], list[str], list[int]]:
    """Paragraphs, their texts, and the tokens of each: articles in random order, their paragraphs in their own.

    Raises:
        EvalError: there are none.
    """
    order = list(records)
    random.Random(seed).shuffle(order)
    paragraphs = [paragraph for article in order for paragraph in article["paragraphs"]]
    if not paragraphs:
        raise EvalError("articles: there is no paragraph")
    texts = [paragraph["context"].strip() for paragraph in paragraphs]
    return paragraphs, texts, [len(ids) for ids in plain(tokenizer, texts).input_ids]
