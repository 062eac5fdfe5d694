"""Documents as one stream of token ids. It counts how many of them the model has read."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.errors import AHNError

if TYPE_CHECKING:
    from torch import Tensor

    from ahn.documents import Piece
    from ahn.memory.archive import Archive
    from ahn.memory.cache import AHNCache
    from ahn.tokens import Encoded

SHORT = 512  # blocks of at most so many tokens do not count as read ahead


@dataclass
class Origin:
    """The place of one document in the whole text.

    Attributes:
        name: of the document. start: its first character in the whole text.
        pages: (first character in the document, page) of each page.
        digest: of the text of the pieces so far.
    """

    name: str
    start: int
    pages: list[tuple[int, int | None]] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def texts(self, pieces: Iterable[Piece]) -> Iterator[str]:
        """The texts of `pieces`, one by one. Notes where each page begins."""
        offset = 0
        for piece in pieces:
            if not self.pages or self.pages[-1][1] != piece.page:
                self.pages.append((offset, piece.page))
            offset += len(piece.text)
            self.digest.update(piece.text.encode("utf-8", "surrogatepass"))
            yield piece.text

    def described(self) -> list[str]:
        """Name and digest, by which the same document is known again."""
        return [self.name, self.digest.hexdigest()]


class Sources:
    """Documents as one text, in pieces. With several documents, each follows a heading with its name."""

    def __init__(self, sources: list[Path | str]) -> None:
        self.sources = sources
        self.characters = 0  # in the pieces so far
        self.documents: list[Origin] = []  # begun so far
        self.done = 0  # approximate bytes of the documents that the pieces so far came from

    def drop_known(self, known: list[list[str]]) -> list[Path | str]:
        """Leave out the documents that `known` describes (`Origin.described`), and those that are here already. Returns
        them. A pipe is never left out, because it can be read once."""
        names, kept, dropped = {name for name, _ in known}, dict[str, Path | str](), []
        for source in self.sources:
            same = str(source) in kept
            if not same and str(source) in names and os.path.isfile(source):
                origin = Origin(str(source), 0)
                deque(origin.texts(self._pieces(source)), 0)
                same = origin.described() in known
            if same:
                dropped.append(source)
            else:
                kept[str(source)] = source
        self.sources = list(kept.values())
        return dropped

    def __str__(self) -> str:
        return str(self.sources[0]) if len(self.sources) == 1 else f"{len(self.sources):,} documents"

    @property
    def bytes(self) -> int | None:
        """Bytes of all documents together; None if one of them is not a file."""
        sizes = [_size(source) for source in self.sources]
        return None if None in sizes else sum(filter(None, sizes))

    def _pieces(self, source: Path | str) -> Iterable[Piece]:
        from ahn.documents import pieces

        return pieces(source)

    def __iter__(self) -> Iterator[str]:
        from ahn.dialogue import Stripped

        self.characters, self.documents = 0, []
        before = 0
        several = len(self.sources) > 1
        for number, source in enumerate(self.sources):
            length, read = _size(source) or 0, 0
            origin = Origin(str(source), self.characters)
            texts: Iterable[str] = origin.texts(self._pieces(source))
            if several:
                heading = f"# {source}\n\n"
                heading = f"\n\n{heading}" if number else heading
                self.characters += len(heading)
                yield heading
                texts = stripped = Stripped(texts)
            for text in texts:
                if not self.documents or self.documents[-1] is not origin:
                    origin.start = self.characters - (stripped.skipped if several else 0)
                    self.documents.append(origin)
                self.characters += len(text)
                read += len(text.encode("utf-8", "replace"))
                self.done = before + min(read, length)
                yield text
            before += length


class Given(Sources):
    """Texts by the names of their documents, each whole or by its pages."""

    def __init__(self, texts: Mapping[str, str | Sequence[str]]) -> None:
        super().__init__(list(texts))
        self._texts = texts

    def _pieces(self, source: Path | str) -> Iterable[Piece]:
        from ahn.documents import Piece

        text = self._texts[str(source)]
        if isinstance(text, str):
            yield Piece(text)
        else:
            yield from (Piece(page, number) for number, page in enumerate(text, 1))


class Text(Iterator["Tensor"]):
    """Token ids of the documents, in pieces [T] for `ahn.read`. Counts how many of them the model has read."""

    def __init__(self, blocks: Iterator[Encoded], sources: Sources) -> None:
        self.sources = sources
        self.skipped = 0  # tokens that the memory already holds
        self.read = 0  # tokens that the model has read or that were skipped
        self._blocks = blocks
        self._ahead: deque[Encoded] = deque()
        self._given = 0  # tokens
        self._unread: deque[Encoded] = deque()  # given out and not read yet
        self._digest = hashlib.sha256()
        self._character = 0  # up to which the model has read
        self._archive: Archive | None = None
        self._ended = False  # whether the last block is known
        self._error: AHNError | None = None  # raised in place of the next block
        self._look()

    def keep_places(self, cache: AHNCache) -> None:
        """From now on, record in the cache's archive the place of each token in its document."""
        self._archive, self._origin = cache.archive, -1
        self._noted = self._character if self.skipped else -1  # documents that begin up to here are in the archive
        self._first = cache.tokens_seen - self.skipped  # where the text begins in all that was read

    def _locate(self, block: Encoded) -> None:
        archive, documents = self._archive, self.sources.documents
        if archive is None or not documents:
            return
        first = self._first + self._given
        of = np.searchsorted([origin.start for origin in documents], block.starts, side="right") - 1
        for index in range(max(self._origin, 0), len(documents)):
            here = np.flatnonzero((of == index) & (block.starts >= 0))
            if not len(here):
                continue
            origin = documents[index]
            if index > self._origin:
                if origin.start > self._noted:
                    archive.begin(origin.name, first + int(here[0]))
                self._origin = index
            offsets = block.starts[here] - origin.start
            pages = np.searchsorted([at for at, _ in origin.pages], offsets, side="right") - 1
            for low, high in pairwise([0, *(np.flatnonzero(np.diff(pages)) + 1).tolist(), len(here)]):
                page = origin.pages[max(int(pages[low]), 0)][1]
                archive.locate(first + int(here[low]), offsets[low:high], page)

    def _look(self) -> None:
        """Read two blocks ahead, so that the length of a short text is known before the model reads it."""
        while sum(len(block.ids) > SHORT for block in self._ahead) < 2 and self._look_further():
            pass

    def _look_further(self) -> bool:
        if self._error is not None:
            raise self._error
        block = next(self._blocks, None)
        if block is None:
            self._ended = True
            return False
        self._ahead.append(block)
        return True

    def within(self, most: int) -> int | None:
        """The number of tokens of all sources, or None if it is above `most`. Reads ahead until that is known."""
        try:
            while self.sources.bytes is not None and self._in_sight <= most and self._look_further():
                pass
        except AHNError as error:  # raised when reading reaches this place, so that the text before it is kept
            self._error = error
        return self._in_sight if self._ended and self._in_sight <= most else None

    @property
    def _in_sight(self) -> int:
        return self._given + sum(len(block.ids) for block in self._ahead)

    def __next__(self) -> Tensor:
        import torch

        if not self._ahead:
            raise StopIteration
        block = self._ahead.popleft()
        self._look()
        self._unread.append(block)
        self._locate(block)
        self._given += len(block.ids)
        return torch.from_numpy(block.ids.astype("int64"))

    @property
    def total(self) -> int | None:
        """The number of tokens in all; None while the end of the text is not known."""
        return self._in_sight if self._ended else None

    @property
    def fraction(self) -> float | None:
        """The approximate part of the text that was read, 0 to 1; None if it is unknown."""
        if self.total is not None:
            return self.read / max(self.total, 1)
        if not self.sources.bytes:
            return None
        share = min(1.0, self._character / max(self.sources.characters, 1))
        return min(1.0, share * self.sources.done / self.sources.bytes)

    def note(self, tokens: int) -> None:
        """Record that the model has read so many tokens of this text, including those skipped."""
        from ahn.tokens import Encoded

        while self.read < tokens:
            block = self._unread.popleft()
            count = min(tokens - self.read, len(block.ids))
            if count:
                self._digest.update(block.ids[:count].astype("<i4").tobytes())
                self._character = max(0, int(block.starts[count - 1]))
                self.read += count
            if count < len(block.ids):
                self._unread.appendleft(Encoded(block.ids[count:], block.starts[count:]))

    def skip(self, tokens: int, digest: str) -> bool:
        """Skip the first `tokens` tokens. False if there are fewer, or if their digest is another one."""
        while self._given < tokens and self._ahead:
            next(self)
            self.note(min(tokens, self._given))
        if self.read < tokens or self._digest.hexdigest() != digest:
            return False
        self.skipped, self._given = tokens, tokens
        self._ahead.extendleft(reversed(self._unread))  # the rest of a block
        self._unread.clear()
        return True

    def described(self, complete: bool) -> dict[str, Any]:
        """A note in the memory file by which the same text is recognised later."""
        known = [origin.described() for origin in self.sources.documents] if complete else []
        return {"tokens": self.read, "sha256": self._digest.hexdigest(), "complete": complete, "documents": known}


def _size(source: Path | str) -> int | None:
    if str(source) == "-":
        return None
    with suppress(OSError):
        return os.stat(source).st_size if os.path.isfile(source) else None
    return None
