"""Passages of an archive: runs of whole sentences of one document, short enough that a few of them are read again."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ahn.dialogue import Dialogue
from ahn.memory.archive import Archive, Place

LONGEST, SHORTEST = 96, 32  # tokens of a passage

_END = re.compile(r"[.!?…。！？]['\"’”»)\]）」』]*\s*$|\n")


class Passages:
    """All passages of an archive as it is now. P of them: passage i has the tokens bounds[i] to bounds[i + 1] - 1.

    Use `of`, which makes them once.
    """

    def __init__(self, archive: Archive, tokenizer: Any, earlier: Passages | None = None) -> None:
        self.archive, self.tokenizer = archive, tokenizer
        first = 0 if earlier is None else max(len(earlier) - 1, 0)  # the last one may have been cut short
        before = np.zeros(0, np.int64) if earlier is None else earlier.bounds[:first]
        start = 0 if earlier is None else int(earlier.bounds[first])
        edges = [start, *(at for at in archive.starts if start < at < len(archive)), len(archive)]
        parts = [low + cut_text(archive.ids[low:high], tokenizer)[:-1] for low, high in pairwise(edges)]
        self.bounds: np.ndarray = np.concatenate([before, *parts, edges[-1:]]).astype(np.int64)
        self._known = [] if earlier is None else earlier.texts[:first]

    @classmethod
    def of(cls, archive: Archive, tokenizer: Any) -> Passages:
        earlier = archive.earlier("passages")
        found: Passages = archive.memo("passages", lambda: cls(archive, tokenizer, earlier))
        return found

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [P]."""
        return np.diff(self.bounds)

    @cached_property
    def texts(self) -> list[str]:
        ids, known = self.archive.ids, self._known
        new = [ids[self.bounds[i] : self.bounds[i + 1]].tolist() for i in range(len(known), len(self))]
        return known + decode_each(self.tokenizer, new, skip_special_tokens=True)

    @cached_property
    def read_as_text(self) -> np.ndarray:
        """Which passages are more than the chat template in front of the first document, bool [P]."""
        return np.asarray(self.bounds[1:] > Dialogue.of(self.tokenizer).opening)

    @cached_property
    def originals(self) -> np.ndarray:
        """For each passage the first one with the same text, int64 [P]."""
        first: dict[str, int] = {}
        return np.array([first.setdefault(text.strip(), index) for index, text in enumerate(self.texts)], np.int64)

    def groups(self, pool: int, count: int) -> Tensor:
        """Where passages begin among `count` groups of `pool` tokens, each of which belongs to the passage of its
        middle, and the end of the last one, int64 [P + 1]."""
        return torch.from_numpy(np.minimum(-(-(self.bounds - pool // 2) // pool), count).clip(min=0))

    def place(self, index: int) -> tuple[Place, int | None] | None:
        """Where a passage without the spaces around it begins in its document, and the page on which it ends."""
        tokens = range(*self.bounds[index : index + 2].tolist())
        ids = self.archive.ids
        words = [at for at in tokens if self.tokenizer.decode([int(ids[at])], skip_special_tokens=True).strip()]
        first, last = (words[0], words[-1]) if words else (tokens[0], tokens[-1])
        place = self.archive.place(first, self.tokenizer.decode)
        if place is None:
            return None
        text = self.tokenizer.decode(ids[first : last + 1].tolist(), skip_special_tokens=True)
        return place._replace(offset=place.offset + len(text) - len(text.lstrip())), self.archive.page(last)


def cut_text(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """`cut` where sentences end, and nowhere within a number."""
    ends = sentence_ends(tokenizer)[ids]
    points, digits = number_parts(tokenizer)
    ends[:-1] &= ~(points[ids[:-1]] & digits[ids[1:]])
    return cut(ends)


def cut(ends: np.ndarray, longest: int = LONGEST, shortest: int = SHORTEST) -> np.ndarray:
    """Where passages begin.

    A passage ends with the last sentence that ends within `longest` tokens and after `shortest`; where none does, after
    `longest` tokens. Passages of the beginning of a text do not depend on its rest, but for the last one.

    Args:
        ends: bool [T], which tokens end a sentence or a line.

    Returns:
        int64 [P + 1]: the first token of each passage, and T.
    """
    total = len(ends)
    stops = np.flatnonzero(ends) + 1
    before = np.searchsorted(stops, np.arange(total + longest + 1), side="right")  # stops up to each token
    starts, at = [0], 0
    while total - at > longest:
        last = before[at + longest]
        stop = int(stops[last - 1]) if last else 0
        at = stop if stop >= at + shortest else at + longest
        starts.append(at)
    return np.array([*starts, total] if total else [0], dtype=np.int64)


@lru_cache(maxsize=4)
def sentence_ends(tokenizer: Any) -> np.ndarray:
    """Mask of the tokens that end a sentence or a line, bool [vocabulary]."""
    texts = decode_each(tokenizer, [[i] for i in range(len(tokenizer))], skip_special_tokens=False)
    return np.array([_END.search(text) is not None for text in texts])


@lru_cache(maxsize=4)
def number_parts(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the tokens that end in a full stop and of those that begin with a digit, bool [vocabulary] each. One of
    the first before one of the second is a number. A space in front of a digit is a character of the token."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    points = np.array([(token or "").endswith(".") for token in tokens])
    return points, np.array([(token or "")[:1].isdigit() for token in tokens])


def decode_each(tokenizer: Any, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
    """`tokenizer.batch_decode`, in one call of the Rust library where nothing is done to the texts behind it. Its
    threads decode a million tokens in a third of the time."""
    if not hasattr(tokenizer, "backend_tokenizer") or tokenizer.clean_up_tokenization_spaces:
        found: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)
        return found
    found = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=skip_special_tokens)
    return found
