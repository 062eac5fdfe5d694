"""LongBench v1 (arXiv 2308.14508): 21 sets in English, Chinese and code."""

from __future__ import annotations

import re
from typing import ClassVar

from ahn.errors import EvalError
from ahn.eval.data import benchmark
from ahn.eval.places import Span, on_a_text, only_place
from ahn.eval.records import Record
from ahn.eval.tasks.base import Example, FixedTask

FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")
CODE = ("lcc", "repobench-p")
_PARAGRAPH = re.compile(r"^(?:Paragraph |段落)(\d+)[:：]", re.MULTILINE)


class LongBench(FixedTask):
    """Prompts, lengths of answers and metrics: `data/longbench.json`.

    Prompts of the few-shot and code sets are continued as they are, the others are asked as chats. Only the first line
    of a few-shot answer counts. The score is the best over the right answers.

    The evidence is known for the paragraph to be retrieved, and for multifieldqa where the answer occurs once. Nothing
    is asked about the text of code, summaries, duplicates to count, and solved examples.
    """

    suite = "longbench"
    sets = tuple(name for name in benchmark("longbench") if not name.startswith(("_", "infinitebench")))
    groups: ClassVar = {"paper": ("dureader", "hotpotqa", "musique", "narrativeqa", "qmsum", "triviaqa")}

    @property
    def metric(self) -> str:
        return benchmark("longbench")[self.set]["metric"]

    def example(self, record: Record) -> Example:
        settings = benchmark("longbench")[self.set]
        if record.fields.get("dataset", self.set) not in (self.set, f"{self.set}_e"):
            raise EvalError(f"{record.where}: of {record['dataset']!r}: expected records of {self.set!r}")
        context, answers = record.text("context"), record.texts("answers")
        asked = record.text("input")
        about = "{input}" in settings["prompt"] and self.set not in FEW_SHOT + CODE
        return Example(
            id=record.text("_id"),
            answers=answers,
            chat=self.set not in FEW_SHOT + CODE,
            max_new_tokens=settings["max_new_tokens"],
            extra={"all_classes": record.texts_or_none("all_classes")},
            **on_a_text(
                settings["prompt"],
                context,
                self._evidence(context, answers),
                asked if about else "",
                input=asked,
            ),
        )

    def clean(self, prediction: str) -> str:
        return prediction.lstrip("\n").split("\n")[0] if self.set in FEW_SHOT else prediction

    def hub(self, length: int | None) -> str:
        return f"zai-org/LongBench/data.zip::{self.set}.jsonl"

    def _evidence(self, context: str, answers: tuple[str, ...]) -> Span | None:
        if self.set.startswith("multifieldqa"):
            return only_place(context, answers[0].strip().rstrip("。."))
        if self.set.startswith("passage_retrieval"):
            heads = list(_PARAGRAPH.finditer(context))
            for i, head in enumerate(heads):
                if head[0].rstrip(":：") == answers[0]:
                    return head.start(), heads[i + 1].start() if i + 1 < len(heads) else len(context)
        return None
