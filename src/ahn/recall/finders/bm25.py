"""Passages that share rare words with the question (BM25)."""

from __future__ import annotations

import importlib
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
        index, vocabulary = passages.archive.memo("bm25", lambda: _index(passages.texts))
        asked = [vocabulary[word] for word in dict.fromkeys(words(question.text)) if word in vocabulary]
        if not asked:
            return np.zeros(len(passages), np.float32)
        found: np.ndarray = index.get_scores(asked)
        return found


def _index(texts: list[str]) -> tuple[Any, dict[str, int]]:
    bm25s = _library()
    vocabulary: dict[str, int] = {}
    corpus = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in texts]
    index = bm25s.BM25()
    if vocabulary:
        index.index((corpus, vocabulary), show_progress=False)
    return index, vocabulary


def _library() -> Any:
    """The library without JAX. Where that is installed, importing bm25s starts it, and it takes three quarters of a
    GPU's memory for an operation that is not used here."""
    hides = not {"jax", "bm25s"} & sys.modules.keys()
    if hides:
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bm25s")
    finally:
        if hides:
            del sys.modules["jax"]
