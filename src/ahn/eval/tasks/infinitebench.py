"""InfiniteBench (arXiv 2402.13718): questions on books, and facts to find again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ahn.errors import EvalError
from ahn.eval.places import Span, on_a_text
from ahn.eval.records import Record
from ahn.eval.tasks.base import Example, FixedTask

_BOOK = "Read the book below and answer a question.\n\n{context}\n\nQuestion: {input}\n\nBe very concise."
_CHOICE = (
    "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n"
    "A. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe letter of the correct answer is"
)
_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. "
_QUIZ = "I will quiz you about the important information there.\n\n{context}\n\n{input}\n\n"
_JSON = "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}"


@dataclass(frozen=True)
class _Set:
    prompt: str
    max_new_tokens: int
    metric: str
    chat: bool = False


_SETS = {
    "longbook_qa_eng": _Set(_BOOK, 256, "rouge_score", chat=True),
    "longbook_qa_chn": _Set(_BOOK, 256, "rouge_zh_score", chat=True),
    "longbook_choice_eng": _Set(_CHOICE, 40, "choice_score"),
    "passkey": _Set(f"{_HIDDEN}Find it and memorize them. {_QUIZ}The pass key is", 6, "first_number_score"),
    "number_string": _Set(f"{_HIDDEN}Find it. {_QUIZ}The sequence of digits is", 12, "first_number_score"),
    "kv_retrieval": _Set(_JSON, 50, "word_score"),
}


class InfiniteBench(FixedTask):
    """En.QA, Zh.QA, En.MC, passkey, number and KV retrieval.

    The two open questions on books are asked and scored as the AHN paper's authors do (one prompt for both languages,
    a chat, 256 tokens, ROUGE-L); the others are the benchmark's own prompts and lengths for open models, continued
    without a chat.

    The evidence is known for the three retrieval sets.
    """

    suite = "infinitebench"
    sets = tuple(_SETS)
    groups: ClassVar = {
        "paper": ("longbook_qa_eng", "longbook_qa_chn"),
        "retrieval": ("passkey", "number_string", "kv_retrieval"),
    }

    @property
    def metric(self) -> str:
        return _SETS[self.set].metric

    def example(self, record: Record) -> Example:
        settings = _SETS[self.set]
        context, answers = record.text("context"), record.texts("answer")
        options: dict[str, str] = {}
        if self.set == "longbook_choice_eng":
            options = dict(zip("ABCD", record.texts("options"), strict=False))
            letters = tuple(letter for letter, option in options.items() if option in answers)
            if len(options) < 4 or not letters:
                raise EvalError(f"{record.where}: field 'options': expected four, the answer {answers[0]!r} among them")
            answers = letters + answers
        asked = record.text("input")
        evidence = _lines(context, answers[0]) if self.set in self.groups["retrieval"] else None
        return Example(
            id=str(record.fields.get("id", record.where.rpartition(" ")[2])),
            answers=answers,
            chat=settings.chat,
            max_new_tokens=settings.max_new_tokens,
            **on_a_text(settings.prompt, context, evidence, asked, input=asked, **options),
        )

    def hub(self, length: int | None) -> str:
        return f"xinrongzhang2022/InfiniteBench/{self.set}.jsonl"


def _lines(context: str, answer: str) -> Span | None:
    """The line that holds the answer, or of a text that is one line, the answer; None if it is not in one place."""
    first, last = context.find(answer), context.rfind(answer) + len(answer)
    if first < 0 or "\n" in context[first:last]:
        return None
    start, end = context.rfind("\n", 0, first) + 1, context.find("\n", last)
    return (start, end) if end >= 0 and end - start < 1000 else (first, last) if last - first < 1000 else None
