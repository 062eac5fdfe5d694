"""Questions among documents, from SQuAD or HotpotQA."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ahn.errors import EvalError
from ahn.eval.articles import squad
from ahn.eval.places import places
from ahn.eval.records import Record, found, hub, read
from ahn.eval.ruler.text import Text

HOTPOT = "hotpotqa/hotpot_qa"
ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
QA = f"{ONLY}\n\nThe following are given documents.\n\n{{context}}\n\n{ONLY}\n\nQuestion: {{query}}"
_QA_PREFIX = " Answer:"


@dataclass(frozen=True)
class Question:
    """A question, its answers and its documents.

    Args:
        gold: documents that answer it.
        beside: documents that are always shown with these.
        near: documents that are shown before any others.
        quoted: the answer stands in the document, word for word.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    beside: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    quoted: bool = False

    @property
    def documents(self) -> tuple[str, ...]:
        return self.gold + self.beside + self.near


def qa(question: Question, documents: Sequence[str], chance: random.Random, units: int) -> Text:
    own = set(question.documents)
    near = chance.sample(question.near, len(question.near))
    others = [text for text in documents if text not in own] or [""]
    others = chance.sample(others, len(others))
    added = [*near, *(others[i % len(others)] for i in range(max(units - len(near), 0)))][:units]
    shown = [*question.gold, *question.beside, *added]
    chance.shuffle(shown)
    before, after = QA.split("{context}")
    text, spans = before, []
    for number, document in enumerate(shown, 1):
        text += f"Document {number}:\n"
        if document in question.gold:
            spans.append((len(text), len(text + document)))
        text += document + "\n\n"
    text = text.removesuffix("\n\n")
    return Text(
        prompt=text + after.format(query=question.text),
        answer_prefix=_QA_PREFIX,
        answers=question.answers,
        facts=tuple(spans),
        depth=(spans[0][0] - len(before)) / (len(text) - len(before)) if len(spans) == 1 else None,
        needs=places(text[slice(*spans[0])], question.answers, spans[0][0]) if question.quoted else (),
    )


def squad_questions(data: Path | None, task: str) -> list[Question]:
    asked = []
    for article in squad(data, task):
        texts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = paragraph["context"]
            near = tuple(text for text in texts if text != gold)
            asked += [
                Question(qa["question"], tuple(qa["answers"]), (gold,), near=near, quoted=True)
                for qa in paragraph["qas"]
            ]
    if not asked:
        raise EvalError(f"{data or task}: no question that has an answer")
    return asked


def hotpot_questions(data: Path | None, task: str) -> list[Question]:
    if data is None:
        return [_of_hotpot(record) for record in hub(HOTPOT, name="distractor", split="validation")]
    names = ("hotpotqa", "hotpotqa-train100", "hotpot_dev_distractor_v1")
    return [_of_hotpot(record) for record in read(found(data, names, task))]


def _of_hotpot(record: Record) -> Question:
    """A record of HotpotQA, of the hub, or of LongBench. LongBench does not say which passages answer."""
    context = record["context"]
    if isinstance(context, str):
        passages = tuple(part.strip() for part in re.split(r"^Passage \d+:\n", context, flags=re.MULTILINE)[1:])
        return Question(record.text("input"), record.texts("answers"), (), passages)
    facts = record.fields.get("supporting_facts") or []
    try:
        if isinstance(context, dict):
            context = list(zip(context["title"], context["sentences"], strict=True))
        needed = set(facts["title"]) if isinstance(facts, dict) else {title for title, _ in facts}
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in context}
    except (KeyError, TypeError, ValueError) as error:
        raise EvalError(
            f"{record.where}: fields 'context' and 'supporting_facts' are not HotpotQA's: {error}"
        ) from error
    gold = tuple(text for title, text in texts.items() if title in needed)
    beside = tuple(text for title, text in texts.items() if title not in needed)
    return Question(record.text("question"), record.texts("answer"), gold, beside)
