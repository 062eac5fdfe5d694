"""DOCX: mammoth converts it to HTML, whose text is taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO
from zipfile import ZipFile

from ahn.documents.archive import open_archive
from ahn.documents.base import Format, Piece
from ahn.documents.html import html_text
from ahn.documents.source import shown
from ahn.errors import DocumentError

MAX_NESTING = 1_000  # levels of XML elements; a table has three

_FRAMES = 20  # Python frames allowed for each level; mammoth, which is recursive, needs up to 7


class DOCX(Format):
    name = "docx"
    title = "DOCX"
    suffixes = (".docx", ".docm")
    max_bytes = 256 * 2**20

    def marks(self, head: bytes) -> bool:
        return head.startswith(b"PK\x03\x04") and b"word/" in head

    def read(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        import defusedxml
        import mammoth

        defusedxml.defuse_stdlib()  # mammoth parses with it; this process does nothing else
        with open_archive(file, name, self.title) as archive:
            _check_nesting(archive, name)
            sys.setrecursionlimit(sys.getrecursionlimit() + _FRAMES * MAX_NESTING)
            html = mammoth.convert_to_html(file, convert_image=lambda image: [], include_embedded_style_map=False).value
        yield Piece(html_text(html, name))


def _check_nesting(archive: ZipFile, name: str) -> None:
    """Raises DocumentError if the elements of any part of `archive` are nested too deeply."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, iterparse

    for member in archive.namelist():
        if not member.lower().endswith((".xml", ".rels")):
            continue
        depth = 0
        # mammoth reports it, if it reads the member
        with archive.open(member) as file, suppress(ParseError, DefusedXmlException):
            for event, element in iterparse(file, ("start", "end")):
                depth += 1 if event == "start" else -1
                if event == "end":
                    element.clear()
                elif depth > MAX_NESTING:
                    raise DocumentError(
                        f"{name}: {shown(member)} in this DOCX nests more than {MAX_NESTING:,} elements in each other; "
                        "expected at most that many"
                    )
