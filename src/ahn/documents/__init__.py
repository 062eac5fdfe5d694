"""Documents as text, each in pieces of bounded size. A new format is one new file (see `base.Format`)."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, cast

from ahn.documents.base import ALLOWED, FORMATS, Format, Piece, bounded
from ahn.documents.source import Stream, check_kind, open_source, shown
from ahn.errors import DocumentError

__all__ = ["Format", "Piece", "check", "expand", "pieces", "read_document"]

MAX_DOCUMENTS = 10_000  # that one folder or pattern may stand for

_HEAD = 64 * 1024  # bytes looked at to tell formats apart


def read_document(source: str | Path) -> str:
    """The whole text of a document: the texts of its `pieces` joined, with the same errors."""
    return "".join(piece.text for piece in pieces(source))


def pieces(source: str | Path) -> Generator[Piece]:
    """The text of a document in order, in pieces of at most 2**20 characters.

    Line ends are `\\n`, there is no byte order mark, and characters that cannot be decoded are U+FFFD. The format is
    known by the first bytes, else by the extension; everything else must be text. gzip, bzip2 and xz around a document
    are unpacked. Plain text is read while it is asked for, so memory stays flat; other formats are parsed in a process
    of their own, under limits of size, memory and time.

    Args:
        source: path of a file or named pipe, or "-" for standard input.

    Raises:
        DocumentError: missing, a folder, unreadable, empty, not text, damaged, encrypted, or over a limit. The message
            names the document.
    """
    empty = True
    with open_source(source) as stream:
        kind = _format(stream)
        if kind.isolated:
            from ahn.documents.isolate import read_isolated

            found = read_isolated(kind, stream)
        else:
            found = bounded(kind.read(cast(BinaryIO, stream), stream.name))
        for piece in found:
            empty = empty and not piece.text.strip()
            yield piece
        if empty:
            raise DocumentError(f"{stream.name}: no text in this {kind.title}{kind.hint}")


def check(source: str | Path) -> None:
    """Read the first piece of a document that is a file. A pipe is left alone, as its text could not be read again.

    Raises:
        DocumentError: as `pieces`, as far as the first piece shows; a device or a socket.
    """
    if str(source) == "-":
        return
    check_kind(source)
    if os.path.isfile(source):
        with closing(pieces(source)) as found:
            next(found, None)


def expand(sources: Iterable[str | Path]) -> list[Path | str]:
    """Every document that `sources` stand for, in order.

    A folder stands for the documents below it and a pattern (`*`, `?`, `[...]`, `**`) for what it matches, sorted so
    that 2 comes before 10. Hidden files, empty files, and files that are no documents are left out of both; linked
    folders are not entered.

    Args:
        sources: paths of files, folders, patterns, or "-" for standard input, which can be there once.

    Raises:
        DocumentError: a path that does not exist, a pattern or folder without documents or with more than 10,000.
    """
    found: list[Path | str] = []
    for source in sources:
        if str(source) == "-":
            if "-" in found:
                raise DocumentError("-: standard input is named twice; it can be read once")
            found.append("-")
        else:
            found += _below(source)
    return found


def _below(source: str | Path) -> list[Path]:
    path, name = Path(source), shown(source)
    try:
        if not str(source):
            raise FileNotFoundError
        if path.is_dir():
            return _documents(_files(path), name)
        if path.exists() or not glob.has_magic(str(source)):
            path.stat()
            return [path]
        files: list[Path] = []
        for match in glob.iglob(str(source), recursive=True):
            files += _files(Path(match)) if os.path.isdir(match) and "**" not in str(source) else [Path(match)]
            if len(files) > MAX_DOCUMENTS:
                break
        return _documents(files, name)
    except FileNotFoundError:
        raise DocumentError(f"{name}: no such file or folder; {ALLOWED}") from None
    except DocumentError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DocumentError(f"{name}: cannot be read ({getattr(error, 'strerror', error)}); {ALLOWED}") from error


def _files(folder: Path) -> Generator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _documents(files: Iterable[Path], name: str) -> list[Path]:
    found = set()
    for path in files:
        if path.is_file() and _is_document(path):
            found.add(path)
        if len(found) > MAX_DOCUMENTS:
            raise DocumentError(f"{name}: more than {MAX_DOCUMENTS:,} documents; expected at most that many at once")
    if not found:
        raise DocumentError(f"{name}: no documents there; {ALLOWED}")
    return sorted(found, key=lambda path: [_natural(part) for part in path.parts])


def _is_document(path: Path) -> bool:
    """Whether `path` has something in it and looks like a document. A file that cannot be read counts as one, so that
    reading it says so."""
    try:
        if not path.stat().st_size:
            return False
        with open_source(path) as stream:
            kind = _format(stream)
            return kind.isolated or kind.marks(stream.peek(_HEAD))
    except DocumentError:
        return os.path.exists(path) and not os.access(path, os.R_OK)


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part.casefold() for part in re.split(r"(\d+)", name)]


def _format(stream: Stream) -> Format:
    head = stream.peek(_HEAD)
    formats = [FORMATS.get(name)() for name in FORMATS.names() if name != "text"]
    for kind in formats:
        if kind.marks(head):
            return kind
    for kind in formats:
        if stream.suffix in kind.suffixes:
            return kind
    return FORMATS.get("text")()
