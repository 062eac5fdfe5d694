"""The bare base, given the passages that a lexical search finds, and nothing else of the text."""

from __future__ import annotations

from typing import Any

from ahn.eval.policies.base import Kept, exact_part
from ahn.eval.policies.recall import Recall
from ahn.hf.augment import augment


class Rag(Recall):
    """The base alone with as many tokens of passages as `recall`: retrieval-augmented generation with BM25."""

    name = "rag"
    finder = "bm25"

    @classmethod
    def _settings(cls, kept: Kept) -> dict[str, Any]:
        return super()._settings(
            kept._replace(adapter=None, store=None, recall=kept.recall._replace(finder=cls.finder))
        )

    def prepare(self) -> None:
        self.recall = self.recall._replace(finder=self.finder, rounds=1)
        augment(self.model, exact_part(self.window, self.sinks, None))
