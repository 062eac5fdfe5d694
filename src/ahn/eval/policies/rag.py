"""The bare base, given the passages that a lexical search finds, and nothing else of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.eval.policies.base import Kept, exact_part
from ahn.eval.policies.recall import Recall
from ahn.hf.augment import augment
from ahn.memory.cache import AHNCache
from ahn.recall import finders
from ahn.recall.passages import Passages
from ahn.recall.question import Question

if TYPE_CHECKING:
    from ahn.eval.prompts import Prompt
    from ahn.eval.tasks.base import Example


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

    def front(self, prompt: Prompt) -> Sequence[int]:
        return prompt.ids[: prompt.begins]

    def behind(self, memory: AHNCache) -> AHNCache:
        return AHNCache(self.model)

    def scores(self, passages: Passages, question: Question, prompt: Prompt, example: Example) -> np.ndarray:
        return finders.get(self.finder)().scores(passages, question)

    def held(self, passages: Passages, memory: AHNCache) -> list[int]:
        return []
