"""Cuts a text of token ids into passages: runs of whole sentences, short enough that a few of them are re-read."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np

LONGEST, SHORTEST = 96, 32  # tokens of a passage

_END = re.compile(r"[.!?…。！？]['\"’”»)\]）」』]*\s*$|\n")


def cut(ids: np.ndarray, ends: np.ndarray, longest: int = LONGEST, shortest: int = SHORTEST) -> np.ndarray:
    """Where passages begin.

    A passage ends with the last sentence that ends within `longest` tokens and after `shortest`; where none does, after
    `longest` tokens. Passages of the beginning of a text do not depend on its rest, but for the last one.

    Args:
        ids: int [T]. ends: bool [vocabulary], of `sentence_ends`.

    Returns:
        int64 [P + 1]: the first token of each passage, and T.
    """
    total = len(ids)
    stops = np.flatnonzero(ends[ids]) + 1
    places = np.searchsorted(stops, np.arange(0, total + longest + 1), side="right")  # stops up to each token
    starts, at = [0], 0
    while total - at > longest:
        last = places[at + longest]
        stop = int(stops[last - 1]) if last else 0
        at = stop if stop >= at + shortest else at + longest
        starts.append(at)
    return np.array([*starts, total] if total else [0], dtype=np.int64)


@lru_cache(maxsize=4)
def sentence_ends(tokenizer: Any) -> np.ndarray:
    """Which tokens end a sentence or a line, bool [vocabulary]."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return np.array([_END.search(text) is not None for text in texts])
