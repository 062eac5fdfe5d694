"""The archive: token ids of everything a memory has read, and where they stand in their sources.

It grows by 4 bytes a token, on the host and on disk only. The part on the accelerator stays constant. `ahn.recall`
finds passages in it and reads them again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ahn.errors import ConfigError
from ahn.memory.head_keys import HeadKeys, RetrievalHeads, to_host, wait_for

KINDS = ("none", "text", "keys")
TOKEN_BYTES = 4  # of a token id
KEY_BYTES = 128  # of the keys of retrieval heads, a token, at most
EVERY = 64  # tokens between two places that are kept
PLACE_BYTES = 32  # of a place
PENDING = 65_536  # tokens that are joined at once


class Place(NamedTuple):
    """Where a token stands: the name of its document, the page (from 1; None where there are none), and the offset of
    its first character in the document."""

    document: str
    page: int | None
    offset: int


@dataclass(frozen=True)
class _Mark:
    """From `token` on the text is that of document `document`, page `page` (0: none), from character `offset` on."""

    token: int
    document: int
    page: int
    offset: int


class Archive:
    """Ids, places and, if `heads` are given, keys of one text, in the order of reading.

    A copy shares the text read so far. Text added to one is not seen by the other.

    Attributes:
        documents: names of the documents read. keys: of the retrieval heads, or None.
        tokenizer: `ahn.tokens.digest` of the one that made the ids, None where it is not known.
    """

    def __init__(self, heads: RetrievalHeads | None = None) -> None:
        self.documents: list[str] = []
        self.tokenizer: str | None = None
        self.keys = None if heads is None else HeadKeys(heads)
        self._parts: list[np.ndarray] = []
        self._pending: list[Tensor] = []
        self._marks: list[_Mark] = []
        self._length = self._waiting = 0
        self._made: dict[Any, Any] = {}
        self.home: Any = None  # where in a file it lies (`ahn.memory.file`)

    def __len__(self) -> int:
        """Tokens read."""
        return self._length

    def __repr__(self) -> str:
        kind = "text" if self.keys is None else f"text and keys of {self.keys.heads}"
        return f"Archive({len(self):,} tokens, {len(self.documents)} documents, {kind})"

    @property
    def kind(self) -> str:
        return "text" if self.keys is None else "keys"

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        held = TOKEN_BYTES * len(self) + PLACE_BYTES * len(self._marks)
        return held if self.keys is None else held + self.keys.nbytes

    @property
    def ids(self) -> np.ndarray:
        """int32 [tokens]."""
        if self._pending:
            wait_for(self._pending)
            self._parts.append(torch.cat(self._pending).to(torch.int32).numpy())
            self._pending, self._waiting = [], 0
        if len(self._parts) != 1:
            self._parts = [np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32)]
        return self._parts[0]

    def copy(self) -> Archive:
        twin = Archive()
        twin.documents, twin.keys = list(self.documents), None if self.keys is None else self.keys.copy()
        twin._parts, twin._pending, twin._marks = list(self._parts), list(self._pending), list(self._marks)
        twin._length, twin._waiting, twin._made = self._length, self._waiting, dict(self._made)
        twin.home, twin.tokenizer = self.home, self.tokenizer
        return twin

    def emptied(self) -> Archive:
        """A new one of the same kind."""
        return Archive(None if self.keys is None else self.keys.heads)

    def add(self, ids: Tensor) -> None:
        """Tokens [T] that were read, on any device."""
        self._pending.append(to_host(ids))
        self._length += len(ids)
        self._waiting += len(ids)
        if self._waiting >= PENDING:
            _ = self.ids

    def begin(self, document: str, first: int | None = None) -> None:
        """Token `first` of all that is read (default: the next) is the first of `document`."""
        self.documents.append(document)
        self._mark(len(self) if first is None else first, 0, 0)

    def locate(self, first: int, starts: np.ndarray, page: int | None = None) -> None:
        """The tokens from `first` on begin at the characters `starts` [T] of the document, on `page`. They may be
        read later."""
        for at in range(0, len(starts), EVERY):
            self._mark(first + at, page or 0, int(starts[at]))

    def _mark(self, token: int, page: int, offset: int) -> None:
        mark = _Mark(token, max(len(self.documents) - 1, 0), page, offset)
        while self._marks and self._marks[-1].token >= token:  # of a text whose reading was stopped
            self._marks.pop()
        self._marks.append(mark)

    def page(self, token: int) -> int | None:
        """The page that a token stands on, as in `Place`."""
        index = bisect_right(self._marks, token, key=lambda mark: mark.token) - 1
        return self._marks[index].page or None if index >= 0 else None

    def place(self, token: int, decode: Callable[[list[int]], str]) -> Place | None:
        """Where a token stands; None in text that was read without a document. `decode` gives the text of ids."""
        if not self._marks or not self.documents:
            return None
        index = bisect_right(self._marks, token, key=lambda mark: mark.token) - 1
        index = max(index, 0)  # the chat template stands in front of the first document
        mark = self._marks[index]
        between = decode(self.ids[mark.token : token].tolist()) if token > mark.token else ""
        return Place(self.documents[mark.document], mark.page or None, mark.offset + len(between))

    @property
    def starts(self) -> list[int]:
        """The first token of each document, in order; nothing of those without tokens."""
        return list({mark.document: mark.token for mark in reversed(self._marks)}.values())[::-1]

    def contents(self) -> list[tuple[str, int, int]]:
        """By document, in order: its name, its tokens, and the pages that have some, 0 where there are none."""
        firsts: dict[int, int] = {}
        pages: dict[int, set[int]] = {}
        for mark in self._marks:
            firsts.setdefault(mark.document, mark.token)
            pages.setdefault(mark.document, set()).add(mark.page)
        ends = dict(zip(firsts, [*list(firsts.values())[1:], len(self)], strict=True))
        return [
            (name, ends[number] - firsts[number], len(pages[number] - {0})) if number in firsts else (name, 0, 0)
            for number, name in enumerate(self.documents)
        ]

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """A value derived from the archive as it is now, such as passages or an index, made once."""
        length, found = self._made.get(key, (None, None))
        if length != len(self):
            found = make()
            self._made[key] = len(self), found
        return found

    def earlier(self, key: Any) -> Any:
        """The last value of `memo`, made when the archive was shorter; None if there is none."""
        return self._made.get(key, (None, None))[1]

    def observer(self, layer: int) -> Any:
        """Called by `layer` with the keys of new tokens; None if nothing is kept of it."""
        return None if self.keys is None else self.keys.observer(layer)

    # In a memory file.
    def describe(self) -> dict[str, Any]:
        return {
            "tokens": len(self),
            "documents": self.documents,
            "tokenizer": self.tokenizer,
            "heads": None if self.keys is None else self.keys.heads.digest,
        }

    def tensors(self, first: int = 0) -> dict[str, Tensor]:
        """All of it from token `first` on, on the CPU."""
        marks = [mark for mark in self._marks if first <= mark.token < len(self)]
        rows = [[mark.token, mark.document, mark.page, mark.offset] for mark in marks]
        found = {
            "ids": torch.from_numpy(np.ascontiguousarray(self.ids[first:])),
            "marks": torch.tensor(rows, dtype=torch.int64).reshape(-1, 4),
        }
        return found if self.keys is None else found | self.keys.tensors(first, len(self))

    @classmethod
    def restored(cls, header: dict[str, Any], parts: list[dict[str, Tensor]], heads: RetrievalHeads | None) -> Archive:
        """Inverse of `describe` and `tensors`, of parts that follow each other. Raises ValueError."""
        archive = cls(heads)
        archive.documents = list(header["documents"])
        archive.tokenizer = header.get("tokenizer")
        if not all(isinstance(name, str) for name in archive.documents):
            raise ValueError("expected names of documents")
        firsts = []
        for part in parts:
            firsts.append(len(archive))
            ids, marks = part["ids"], part["marks"]
            if ids.dtype != torch.int32 or ids.dim() != 1 or marks.dtype != torch.int64 or marks.shape[1:] != (4,):
                raise ValueError("an archive of other tensors than ids and places")
            archive._parts.append(ids.numpy())
            archive._length += len(ids)
            archive._marks += [_Mark(*row) for row in marks.tolist() if row[0] < archive._length]
        if archive._length != header["tokens"]:
            raise ValueError(f"an archive of {archive._length:,} tokens, not {header['tokens']:,}")
        if any(not 0 <= mark.document < max(len(archive.documents), 1) for mark in archive._marks):
            raise ValueError("an archive of other documents")
        at = [mark.token for mark in archive._marks]
        if at != sorted(at) or (at and at[0] < 0):
            raise ValueError("places of tokens that do not follow each other")
        if archive.keys is not None:
            archive.keys.restore(parts, firsts, archive._length)
        return archive


def kind_of(described: dict[str, Any] | None) -> str:
    """The kind of an archive by its description in a memory file; None: it has none."""
    return "none" if described is None else "text" if described.get("heads") is None else "keys"


def new_archive(model: Any, kind: str) -> Archive | None:
    """An empty archive for an augmented model. Raises ConfigError if there is none of this kind for it."""
    if kind not in KINDS:
        raise ConfigError(f"{{archive}}: expected one of {', '.join(KINDS)}", archive=kind)
    if kind != "keys":
        return Archive() if kind == "text" else None
    if model.ahn_retrieval is None:
        raise ConfigError("{archive}: the adapter names no retrieval heads: expected 'text'", archive=kind)
    return Archive(model.ahn_retrieval)
