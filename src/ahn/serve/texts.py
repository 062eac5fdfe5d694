"""Uploaded documents as token ids, with the places of the tokens in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ahn.dialogue import Dialogue
from ahn.documents import Piece, pieces
from ahn.errors import ConfigError, DocumentError
from ahn.memory.archive import Archive

PLAIN = ".plain"  # ending of a file that is text as it stands, of no format
BLOCK = 1 << 20  # characters


@dataclass
class Origin:
    """A document in the text.

    Attributes:
        first: its first token. starts: places of its tokens in the document, by block. pages: (first character, page).
    """

    name: str
    first: int = -1
    starts: list[tuple[int, np.ndarray]] = field(default_factory=list)
    pages: list[tuple[int, int | None]] = field(default_factory=list)

    def texts(self, found: Iterable[Piece]) -> Iterator[str]:
        offset = 0
        for piece in found:
            if not self.pages or self.pages[-1][1] != piece.page:
                self.pages.append((offset, piece.page))
            offset += len(piece.text)
            yield piece.text

    def add(self, token: int, starts: np.ndarray) -> None:
        """Tokens of the text from `token` on, at these characters of the document; below 0 they are not in it."""
        inside = np.flatnonzero(starts >= 0)
        if len(inside):
            self.first = token + int(inside[0]) if self.first < 0 else self.first
            self.starts.append((token + int(inside[0]), starts[inside[0] :]))


@dataclass(frozen=True)
class Encoded:
    """ids: int32 [T]. origins: of the documents, in order."""

    ids: np.ndarray
    origins: list[Origin]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()

    def locate(self, archive: Archive, before: int) -> None:
        """Note the places of all tokens, which follow `before` others."""
        for origin in self.origins:
            archive.begin(origin.name, before + max(origin.first, 0))
            for token, starts in origin.starts:
                pages = np.searchsorted([at for at, _ in origin.pages], starts, side="right") - 1
                for low, high in pairwise([0, *(np.flatnonzero(np.diff(pages)) + 1).tolist(), len(starts)]):
                    page = origin.pages[max(int(pages[low]), 0)][1]
                    archive.locate(before + token + low, starts[low:high], page)


def encoded(
    dialogue: Dialogue, documents: Sequence[tuple[str, Path]], earlier: Sequence[dict[str, Any]], most: int
) -> Encoded:
    """Documents, by name and file, as one text. Several are headed by their names.

    Args:
        earlier: texts that the memory has read, as `AHNCache.texts`. most: tokens.

    Raises:
        DocumentError: of a document, by its name. ConfigError: more tokens than `most`.
    """
    found: list[np.ndarray] = []
    origins, total = list[Origin](), 0
    for number, (name, path) in enumerate(documents):
        origin = Origin(name)
        heading = f"# {name}\n\n" if len(documents) > 1 else ""
        texts = chain([heading], origin.texts(_pieces(name, path)))
        if number or earlier:
            blocks = dialogue.stream_more(texts, separated=bool(number) or earlier[-1]["complete"])
        else:
            blocks = dialogue.stream(texts)
        for block in blocks:
            origin.add(total, block.starts - len(heading))
            found.append(block.ids)
            total += len(block.ids)
            if total > most:
                raise ConfigError(f"a text of more than {most:,} tokens: expected at most so many")
        origins.append(origin)
    return Encoded(np.concatenate(found), origins)


def _pieces(name: str, path: Path) -> Iterator[Piece]:
    try:
        if path.suffix != PLAIN:
            yield from pieces(path)
            return
        with path.open(encoding="utf-8", newline="") as file:
            while text := file.read(BLOCK):
                yield Piece(text)
    except DocumentError as error:
        raise DocumentError(str(error).replace(str(path), name)) from error
