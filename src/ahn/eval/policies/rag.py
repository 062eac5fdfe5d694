"""The base alone. It is given the passages that a lexical search finds, and nothing else of the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ahn.eval.kept import Kept, exact_part
from ahn.eval.policies.recall import Recall
from ahn.hf.augment import augment


class Rag(Recall):
    """The base alone with as many tokens of passages as `recall`: retrieval-augmented generation with BM25."""

    name = "rag"
    finds = False
    finder = "bm25"

    @classmethod
    def settings(cls, kept: Kept) -> dict[str, Any]:
        recall = kept.recall._replace(finder=cls.finder)
        return super().settings(replace(kept, adapter=None, store=None, recall=recall))

    def prepare(self) -> None:
        recall = self.kept.recall._replace(finder=self.finder, rounds=1)
        self.kept = replace(self.kept, adapter=None, recall=recall)
        augment(self.model, exact_part(self.kept))
