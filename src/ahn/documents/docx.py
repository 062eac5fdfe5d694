"""DOCX through mammoth, which makes HTML of it, and the text of that."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from ahn.documents.base import Format, Piece
from ahn.documents.html import html_text
from ahn.documents.source import check_zip


class DOCX(Format):
    name = "docx"
    title = "DOCX"
    suffixes = (".docx", ".docm")
    max_bytes = 256 * 2**20

    def marks(self, head: bytes) -> bool:
        return head.startswith(b"PK\x03\x04") and b"word/" in head

    def read(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        import mammoth

        with zipfile.ZipFile(file) as archive:
            check_zip(archive, name, self.title)
        html = mammoth.convert_to_html(file, convert_image=lambda image: [], include_embedded_style_map=False).value
        yield Piece(html_text(html, name))
