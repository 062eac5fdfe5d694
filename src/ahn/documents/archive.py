"""Zip archives that hold a document, with limits on the size that they unpack to."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ahn.documents.source import shown
from ahn.errors import DocumentError

MAX_MEMBERS = 20_000
MAX_UNPACKED = 2**30  # bytes, all members together
MAX_TEXT = 32 * 2**20  # bytes of a member that is parsed
_PARSED = (".xml", ".rels", ".xhtml", ".html", ".htm", ".opf")


@contextmanager
def open_archive(file: BinaryIO, name: str, title: str) -> Iterator[zipfile.ZipFile]:
    """`file` as an archive whose members can be read and parsed.

    Raises:
        DocumentError: encrypted, over a limit, a member outside of the archive, or XML with entities of its own.
    """
    from defusedxml import DefusedXmlException

    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if len(members) > MAX_MEMBERS:
            raise DocumentError(f"{name}: {title} of {len(members):,} files; expected at most {MAX_MEMBERS:,}")
        if unpacked > MAX_UNPACKED:
            raise DocumentError(f"{name}: {title} unpacks to {unpacked:,} bytes; expected at most {MAX_UNPACKED:,}")
        for member in members:
            path = member.filename.replace("\\", "/")
            if path.startswith("/") or ".." in path.split("/"):
                raise DocumentError(f"{name}: a damaged {title} ({shown(path)} points outside of it)")
            if member.flag_bits & 1:
                raise DocumentError(f"{name}: an encrypted {title}; expected one that opens without a password")
            if member.file_size > MAX_TEXT and path.lower().endswith(_PARSED):
                size = f"{member.file_size:,} bytes"
                raise DocumentError(f"{name}: {shown(path)} in this {title} has {size}; expected at most {MAX_TEXT:,}")
        try:
            yield archive
        except DefusedXmlException as error:
            raise DocumentError(f"{name}: this {title} declares XML entities; expected none") from error
