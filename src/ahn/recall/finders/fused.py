"""Passages that words and heads agree on: reciprocal rank fusion."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ahn.recall.finders.base import Finder
from ahn.recall.finders.bm25 import BM25
from ahn.recall.finders.heads import Heads
from ahn.recall.passages import Passages
from ahn.recall.question import Question

K = 10  # ranks that count nearly alike: the fewer, the more the first of each way count


class Fused(Finder):
    """Sums 1 / (K + rank) over `bm25` and `heads`. An archive without keys is searched by `bm25` alone."""

    name: ClassVar[str] = "fused"

    def scores(self, passages: Passages, question: Question) -> np.ndarray:
        ways = [BM25()] if passages.archive.keys is None else [BM25(), Heads()]
        return sum((1 / (K + ranks(way.scores(passages, question))) for way in ways), np.zeros(len(passages)))


def ranks(scores: np.ndarray) -> np.ndarray:
    """From 0 for the best; of equals the first in the text is better."""
    found = np.empty(len(scores), np.int64)
    found[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return found
