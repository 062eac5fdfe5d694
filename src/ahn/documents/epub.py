"""EPUB: a zip archive of XHTML chapters, in the order of its package file."""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import unquote

from ahn.documents.archive import open_archive
from ahn.documents.base import Format, Piece
from ahn.documents.html import decode, html_text
from ahn.errors import DocumentError

_PACKAGE = "{http://www.idpf.org/2007/opf}"
_CONTAINER = "{urn:oasis:names:tc:opendocument:xmlns:container}"
_ENCRYPTED = "{http://www.w3.org/2001/04/xmlenc#}CipherReference"
_CHAPTERS = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml", "application/xml", "text/xml")


class EPUB(Format):
    name = "epub"
    title = "EPUB"
    suffixes = (".epub",)
    max_bytes = 512 * 2**20

    def marks(self, head: bytes) -> bool:
        return head.startswith(b"PK\x03\x04") and b"mimetypeapplication/epub+zip" in head[:200]

    def read(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        with open_archive(file, name, self.title) as archive:
            package = _package(archive)
            chapters = _chapters(archive, package)
            if locked := _locked(archive).intersection(chapters):
                raise DocumentError(f"{name}: an encrypted EPUB ({min(locked)}); expected one without copy protection")
            written = False
            for number, chapter in enumerate(chapters, 1):
                text = html_text(decode(archive.read(chapter)), name, xhtml=True)
                if text.strip():
                    yield Piece(f"\n{text}" if written else text, number)
                    written = True


def _xml(archive: zipfile.ZipFile, member: str) -> Any:
    from defusedxml.ElementTree import fromstring

    return fromstring(archive.read(member))


def _package(archive: zipfile.ZipFile) -> str:
    """The name of the package file."""
    file = _xml(archive, "META-INF/container.xml").find(f".//{_CONTAINER}rootfile")
    if file is None:
        raise ValueError("META-INF/container.xml names no package")
    return str(file.attrib["full-path"])


def _chapters(archive: zipfile.ZipFile, package: str) -> list[str]:
    """The names of the chapters, in reading order, each once: EPUB forbids more, which could give any length."""
    root = _xml(archive, package)
    folder = posixpath.dirname(package)
    names = {}
    for item in root.iter(f"{_PACKAGE}item"):
        href = unquote(item.attrib["href"].partition("#")[0])
        if item.attrib.get("media-type", _CHAPTERS[0]) in _CHAPTERS:
            names[item.attrib["id"]] = posixpath.normpath(posixpath.join(folder, href))
    listed = (item.attrib["idref"] for item in root.iter(f"{_PACKAGE}itemref"))
    chapters = list(dict.fromkeys(names[item] for item in listed if item in names))
    if not chapters:
        raise ValueError(f"{package} lists no chapters")
    return chapters


def _locked(archive: zipfile.ZipFile) -> set[str]:
    """The names of encrypted members."""
    if "META-INF/encryption.xml" not in archive.namelist():
        return set()
    return {unquote(found.attrib["URI"]) for found in _xml(archive, "META-INF/encryption.xml").iter(_ENCRYPTED)}
