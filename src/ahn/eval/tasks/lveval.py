"""LV-Eval (arXiv 2402.05136): 11 sets of questions, each at five lengths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ahn.errors import EvalError
from ahn.eval.data import benchmark
from ahn.eval.places import on_a_text, only_place
from ahn.eval.records import Record
from ahn.eval.tasks.base import Example, FixedTask

LEVELS = (16, 32, 64, 128, 256)
SINGLE_HOP = (
    "loogle_SD_mixup",
    "cmrc_mixup",
    "multifieldqa_en_mixup",
    "multifieldqa_zh_mixup",
    "factrecall_en",
    "factrecall_zh",
)


class LVEval(FixedTask):
    """Prompts, lengths of answers, metrics and stop words: `data/lveval.json`. Only the first answer counts.

    `length` chooses the level (16, 32, 64, 128 or 256 thousand, or times 1,024; None: 128k, the paper's) and is the
    number of tokens that prompts are truncated to. Levels count words, not tokens, so some prompts are
    cut; None cuts none.

    The evidence is known where a single passage holds the answer and the answer occurs once.
    """

    suite = "lveval"
    sets = tuple(name for name in benchmark("lveval") if not name.startswith("_"))

    @property
    def metric(self) -> str:
        return benchmark("lveval")[self.set]["metric"]

    def examples(
        self, *, tokenizer: Any, length: int | None, data: Path | None, seed: int, limit: int | None
    ) -> Iterator[Example]:
        _level(length)
        yield from super().examples(tokenizer=tokenizer, length=length, data=data, seed=seed, limit=limit)

    def example(self, record: Record) -> Example:
        settings = benchmark("lveval")[self.set]
        context, answers = record.text("context"), record.texts("answers")
        asked = record.text("input")
        wanted = answers[0].strip().rstrip("。.")
        evidence = only_place(context, wanted) if self.set in SINGLE_HOP else None
        return Example(
            id=record.where.rpartition(" ")[2],
            answers=answers,
            chat=True,
            max_new_tokens=settings["max_new_tokens"],
            extra={
                "gold_ans": None if record.fields.get("answer_keywords") is None else record.text("answer_keywords")
            },
            **on_a_text(settings["prompt"], context, evidence, asked, input=asked),
        )

    def files(self, length: int | None) -> list[str]:
        name = f"{self.set}_{_level(length)}"
        return [name, f"{self.set}/{name}", f"lveval-{name}"]

    def hub(self, length: int | None) -> str:
        return f"infini-ai/LVEval/{self.set}.zip::{self.set}_{_level(length)}.jsonl"


def _level(length: int | None) -> str:
    for level in LEVELS:
        if length in (level * 1000, level * 1024) or (length is None and level == 128):
            return f"{level}k"
    raise EvalError(f"lveval: length {length}: expected one of {', '.join(f'{level}000' for level in LEVELS)}")
