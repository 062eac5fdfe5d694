"""Opens files, pipes and standard input as one kind of stream. It is unpacked, and its errors name the document."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ahn.documents.base import ALLOWED
from ahn.errors import DocumentError

MAX_LAYERS = 3  # of nested compression

_PACKED: tuple[tuple[re.Pattern[bytes], str, str, Callable[[Any], Any]], ...] = (
    (re.compile(rb"\x1f\x8b\x08"), ".gz", "gzip", lambda file: gzip.GzipFile(fileobj=file)),
    (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), ".bz2", "bzip2", bz2.BZ2File),
    (re.compile(rb"\xfd7zXZ\x00"), ".xz", "xz", lzma.LZMAFile),
)
_KINDS = ((stat.S_ISDIR, "folder"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"), (stat.S_ISSOCK, "socket"))
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)  # raised while unpacking


def shown(source: str | Path) -> str:
    """`source` as messages name it: on one line, in characters that every stream can encode as UTF-8."""
    if str(source) == "-":
        return "standard input"
    name = str(source).encode("utf-8", "replace").decode("utf-8")
    return name if name and name.isprintable() else repr(name)


def check_kind(source: str | Path) -> None:
    """Raises DocumentError if there is something at the path `source`, and it is neither a file nor a pipe."""
    try:
        mode = os.stat(source).st_mode
    except (OSError, ValueError):  # opening it says why
        return
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise DocumentError(f"{shown(source)}: is a {kind}; {ALLOWED}")


class Stream(io.RawIOBase):
    """Bytes of a document. `read` gives as many as asked for unless the document ends, also from a pipe.

    Args:
        file: with a method `read`.
        name: of the document, for messages.
        suffix: lower-case extension of the document, without those of compression.
        packing: of `file`, for messages.
    """

    def __init__(self, file: BinaryIO, name: str, suffix: str, packing: str = "") -> None:
        self.file, self.name, self.suffix, self.packing = file, name, suffix, packing
        self._head = b""

    def readable(self) -> bool:
        return True

    def peek(self, count: int) -> bytes:
        """The next `count` bytes, or all that are left, which stay to be read."""
        self._head += self._read(count - len(self._head))
        return self._head[:count]

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            raise ValueError("expected a number of bytes: a document can be endless")
        head, self._head = self._head[:count], self._head[count:]
        return head + self._read(count - len(head))

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, count: int) -> bytes:
        parts = []
        while count > 0:
            try:
                part = self.file.read(count)
            except _DAMAGE as error:
                reason = getattr(error, "strerror", None) or error
                said = f"damaged {self.packing}" if self.packing else "cannot be read"
                raise DocumentError(f"{self.name}: {said} ({reason}); {ALLOWED}") from error
            except DocumentError:  # raised by an inner stream
                raise
            except ValueError as error:
                raise DocumentError(f"{self.name}: is closed; {ALLOWED}") from error
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


@contextmanager
def open_source(source: str | Path) -> Iterator[Stream]:
    """The unpacked bytes of `source`, a path or "-".

    Raises:
        DocumentError: missing, a folder, unreadable, empty, or packed more than three times.
    """
    name = shown(source)
    with ExitStack() as opened:
        path = Path("" if str(source) == "-" else source)
        stream = Stream(_open(source, name, opened), name, path.suffix.lower())
        if not stream.peek(1):
            raise DocumentError(f"{name}: is empty; {ALLOWED}")
        layers = 0
        while packed := next((found for found in _PACKED if found[0].match(stream.peek(16))), None):
            layers += 1
            if layers > MAX_LAYERS:
                raise DocumentError(f"{name}: compressed more than {MAX_LAYERS} times; expected at most that")
            _, suffix, packing, unpack = packed
            path = path.with_suffix("") if path.suffix.lower() == suffix else path
            stream = Stream(cast(BinaryIO, opened.enter_context(unpack(stream))), name, path.suffix.lower(), packing)
        yield stream


def _open(source: str | Path, name: str, opened: ExitStack) -> BinaryIO:
    if str(source) == "-":
        file = getattr(sys.stdin, "buffer", None)
        if file is None:
            raise DocumentError(f"{name}: is closed; {ALLOWED}")
        return cast(BinaryIO, file)
    check_kind(source)
    try:
        return opened.enter_context(open(source, "rb", buffering=0))
    except FileNotFoundError:
        raise DocumentError(f"{name}: no such file; {ALLOWED}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DocumentError(f"{name}: cannot be read ({getattr(error, 'strerror', error)}); {ALLOWED}") from error
