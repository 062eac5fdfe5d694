"""Passages that share rare words with the question (BM25)."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any, ClassVar

import numpy as np

from ahn.recall.finders.base import Finder
from ahn.recall.passages import Passages
from ahn.recall.question import Question
from ahn.recall.words import words


class BM25(Finder):
    """Lexical search with the library `bm25s`: exact, without a model, 0 where no word is shared."""

    name: ClassVar[str] = "bm25"

    def scores(self, passages: Passages, question: Question) -> np.ndarray:
        lexicon = Lexicon.of(passages)
        asked = [lexicon.numbers[word] for word in dict.fromkeys(words(question.text)) if word in lexicon.numbers]
        if not asked:
            return np.zeros(len(passages), np.float32)
        found: np.ndarray = lexicon.index.get_scores(asked)
        return found


class Lexicon:
    """The words of all passages, each with a number. `Lexicon.of(passages)` makes it once for an archive.

    Attributes:
        numbers: number by word.
        index: the index of bm25s over these numbers.
    """

    def __init__(self, texts: list[str]) -> None:
        self.numbers: dict[str, int] = {}
        corpus = [[self.numbers.setdefault(word, len(self.numbers)) for word in words(text)] for text in texts]
        self.index: Any = _library().BM25()
        if self.numbers:
            self.index.index((corpus, self.numbers), show_progress=False)
        self._passages = len(texts)
        self._having = np.zeros(len(self.numbers), np.int64)  # passages that have a word
        for one in corpus:
            self._having[list(set(one))] += 1

    @classmethod
    def of(cls, passages: Passages) -> Lexicon:
        found: Lexicon = passages.archive.memo("bm25", lambda: cls(passages.texts))
        return found

    def weight(self, word: str) -> float:
        """The weight of a word in BM25: larger if fewer passages have it."""
        having = int(self._having[self.numbers[word]]) if word in self.numbers else 0
        return math.log(1 + (self._passages - having + 0.5) / (having + 0.5))


def _library() -> Any:
    """The library without JAX, which is hidden while bm25s is imported, and importable again afterwards.

    Importing bm25s starts JAX where it is installed, and JAX then reserves three quarters of a GPU's memory. bm25s has
    no option against this, and uses JAX only for a selection that is not made here.
    """
    hides = not {"jax", "bm25s"} & sys.modules.keys()
    if hides:
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bm25s")
    finally:
        if hides:
            del sys.modules["jax"]
