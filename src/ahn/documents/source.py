"""Opens files, pipes and standard input as one kind of stream, unpacked, counted and with errors that name it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ahn.documents.base import ALLOWED
from ahn.errors import DocumentError

MAX_LAYERS = 3  # of compression around each other
MAX_MEMBERS = 20_000  # of a zip archive
MAX_UNPACKED = 2**30  # bytes, all members of a zip archive together

_PACKED: dict[bytes, tuple[str, str, Callable[[Any], Any]]] = {
    b"\x1f\x8b\x08": (".gz", "gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": (".bz2", "bzip2", bz2.BZ2File),
    b"\xfd7zXZ\x00": (".xz", "xz", lzma.LZMAFile),
}
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def shown(source: str | Path) -> str:
    """`source` as messages name it: on one line, in characters that every stream can encode as UTF-8."""
    if str(source) == "-":
        return "standard input"
    name = str(source).encode("utf-8", "replace").decode("utf-8")
    return name if name and name.isprintable() else repr(name)


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
                raise DocumentError(f"{self.name}: damaged {self.packing or 'data'} ({error})") from error
            except (OSError, ValueError) as error:  # ValueError: a closed standard input
                reason = getattr(error, "strerror", None) or error
                raise DocumentError(f"{self.name}: cannot be read ({reason}); {ALLOWED}") from error
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
        while packed := next((found for mark, found in _PACKED.items() if stream.peek(len(mark)) == mark), None):
            layers += 1
            if layers > MAX_LAYERS:
                raise DocumentError(f"{name}: compressed more than {MAX_LAYERS} times; expected at most that")
            suffix, packing, unpack = packed
            path = path.with_suffix("") if path.suffix.lower() == suffix else path
            stream = Stream(cast(BinaryIO, opened.enter_context(unpack(stream))), name, path.suffix.lower(), packing)
        yield stream


def _open(source: str | Path, name: str, opened: ExitStack) -> BinaryIO:
    if str(source) == "-":
        file = getattr(sys.stdin, "buffer", None)
        if file is None:
            raise DocumentError(f"{name}: is closed; {ALLOWED}")
        return cast(BinaryIO, file)
    try:
        if not str(source):
            raise FileNotFoundError
        if os.path.isdir(source):
            raise DocumentError(f"{name}: is a folder; {ALLOWED}")
        return opened.enter_context(open(source, "rb", buffering=0))
    except FileNotFoundError:
        raise DocumentError(f"{name}: no such file; {ALLOWED}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DocumentError(f"{name}: cannot be read ({getattr(error, 'strerror', error)}); {ALLOWED}") from error


def check_zip(archive: zipfile.ZipFile, name: str, title: str) -> None:
    """Raises DocumentError for a zip archive that is encrypted, unpacks to too much, or names files outside of it."""
    members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS:
        raise DocumentError(f"{name}: {title} of {len(members):,} files; expected at most {MAX_MEMBERS:,}")
    if unpacked > MAX_UNPACKED:
        raise DocumentError(f"{name}: {title} unpacks to {unpacked:,} bytes; expected at most {MAX_UNPACKED:,}")
    for member in members:
        path = member.filename.replace("\\", "/")
        if path.startswith("/") or ".." in path.split("/"):
            raise DocumentError(f"{name}: a damaged {title} ({shown(member.filename)} points outside of it)")
        if member.flag_bits & 1:
            raise DocumentError(f"{name}: an encrypted {title}; expected one that opens without a password")
