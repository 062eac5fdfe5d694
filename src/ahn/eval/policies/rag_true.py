"""The base alone with the passages that hold the evidence. No finder can be better."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ahn.eval.policies.rag import Rag
from ahn.recall.passages import Passages
from ahn.recall.question import Question

if TYPE_CHECKING:
    from ahn.eval.prompts import Prompt
    from ahn.eval.tasks.base import Example


class RagTrue(Rag):
    """The base alone with the passages that hold the evidence first, then BM25's: the upper bound of `rag`."""

    name = "rag-true"

    def scores(self, passages: Passages, question: Question, prompt: Prompt, example: Example) -> np.ndarray:
        found = super().scores(passages, question, prompt, example)
        low, high = passages.bounds[:-1], passages.bounds[1:]
        holds = np.zeros(len(passages), bool)
        for one in prompt.needs:
            for start, end in one:
                holds |= (low < end) & (high > start)
        return np.where(holds, found + found.max(initial=0) + 1, found)
