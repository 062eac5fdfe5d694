"""The base alone with random passages. It shows the effect of any text in front of a question."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from ahn.eval.policies.rag import Rag
from ahn.recall.passages import Passages
from ahn.recall.question import Question

if TYPE_CHECKING:
    from ahn.eval.prompts import Prompt
    from ahn.eval.tasks.base import Example


class RagRandom(Rag):
    """The base alone with random passages: the lower bound of `rag`."""

    name = "rag-random"

    def scores(self, passages: Passages, question: Question, prompt: Prompt, example: Example) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(example.id.encode())).random(len(passages))
