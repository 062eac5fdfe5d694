"""Contract of a document format, and the text that every format hands out."""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

from ahn.registry import Registry

ALLOWED = "expected text, Markdown, CSV, HTML, PDF, EPUB, DOCX, any of them in .gz, .bz2 or .xz, or - (standard input)"
PIECE_CHARACTERS = 2**20

_LIGATURES = re.compile("[\ufb00-\ufdff\ufe70-\ufefc]+")
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\xad\ufeff\ufff9-\ufffb]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SYMBOL_BULLETS = str.maketrans({"\uf0b7": "•", "\uf0a7": "▪", "\uf0d8": "➢", "\uf0fc": "✓"})


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Args:
        text: the next characters of the document.
        page: the PDF page or EPUB chapter that they are on, counted from 1; None where the format has none.
    """

    text: str
    page: int | None = None


class Format(ABC):
    """A document format: one file in this folder, found by its name, or a class in the entry-point group
    `ahn.documents`.

    Attributes:
        name: that of its file.
        title: what messages call it.
        suffixes: lower-case extensions, with the dot.
        max_bytes: of a document of this format, unpacked from .gz and the like.
        isolated: parse in a process of its own, which is ended when it takes too much time or memory.
        hint: added to the message for a document without text.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    max_bytes: ClassVar[int]
    isolated: ClassVar[bool] = True
    hint: ClassVar[str] = ""

    @abstractmethod
    def marks(self, head: bytes) -> bool:
        """Whether a document that begins with `head` is of this format for certain."""

    @abstractmethod
    def read(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        """The text of `file`, in order. An isolated format gets a file that can seek.

        Raises:
            DocumentError: with `name` in the message. Any other error of an isolated format is reported as damage.
        """


FORMATS: Registry[type[Format]] = Registry(
    "document format", "ahn.documents", hidden=("archive", "base", "encoding", "isolate", "source")
)


def bounded(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same text in pieces of at most 2**20 characters."""
    for piece in pieces:
        for start in range(0, len(piece.text), PIECE_CHARACTERS):
            yield Piece(piece.text[start : start + PIECE_CHARACTERS], piece.page)


def clean(text: str) -> str:
    """Text of a parser as plain text: line ends are `\\n`, ligatures are letters, controls and soft hyphens are gone,
    private-use characters and lone surrogates are U+FFFD."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii() and text.isprintable():
        return text
    text = _LIGATURES.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text.translate(_SYMBOL_BULLETS))
    return _SURROGATE.sub("\ufffd", _PRIVATE.sub("\ufffd", _CONTROL.sub("", text)))
