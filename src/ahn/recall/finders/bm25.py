"""Passages that share rare words with the question (BM25)."""

from __future__ import annotations

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
    import bm25s

    vocabulary: dict[str, int] = {}
    corpus = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in texts]
    index = bm25s.BM25()
    if vocabulary:
        index.index((corpus, vocabulary), show_progress=False)
    return index, vocabulary
