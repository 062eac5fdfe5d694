"""DOCX through mammoth, which makes HTML of it, and the text of that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ahn.documents.archive import open_archive
from ahn.documents.base import Format, Piece
from ahn.documents.html import html_text


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
        with open_archive(file, name, self.title):
            html = mammoth.convert_to_html(file, convert_image=lambda image: [], include_embedded_style_map=False).value
        yield Piece(html_text(html, name))
