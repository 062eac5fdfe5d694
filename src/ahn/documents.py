"""Documents as text: plain text, Markdown, HTML, PDF, or standard input."""

from __future__ import annotations

import codecs
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from ahn.errors import DocumentError

ALLOWED = "expected text (UTF-8), Markdown, HTML, PDF, or - for standard input"

_HIDDEN = re.compile("script|style|noscript|template|svg")
_PARAGRAPH = re.compile("blockquote|dl|figure|h[1-6]|ol|p|pre|table|title|ul")
_BLOCK = re.compile(
    f"{_PARAGRAPH.pattern}|address|article|aside|body|br|caption|dd|div|dt|figcaption|footer|form|header|hr|legend|li|"
    "main|nav|option|section|summary|td|th|tr"
)


def read_document(source: str | Path) -> str:
    """Text of a document, with `\\n` for line ends and no byte order mark.

    HTML and PDF are known by their extension or first bytes and reduced to their text; everything else must be text.

    Args:
        source: path of a file, or "-" for standard input.

    Raises:
        DocumentError: missing, not a file, unreadable, empty, not text, or a damaged or encrypted PDF.
    """
    name = "standard input" if str(source) == "-" else str(source)
    data = _read_bytes(source, name)
    suffix = Path(source).suffix.lower()
    if suffix == ".pdf" or data.startswith(b"%PDF-"):
        text = _pdf_text(data, name)
    elif suffix in (".html", ".htm", ".xhtml") or data[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        text = _html_text(data, name)
    else:
        text = _decode(data, name)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DocumentError(f"{name}: no text in it")
    return text


def _read_bytes(source: str | Path, name: str) -> bytes:
    if str(source) == "-":
        data = sys.stdin.buffer.read()
    else:
        path = Path(source)
        if path.is_dir():
            raise DocumentError(f"{name}: is a folder; {ALLOWED}")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DocumentError(f"{name}: no such file; {ALLOWED}") from None
        except OSError as error:
            raise DocumentError(f"{name}: cannot be read ({error.strerror}); {ALLOWED}") from error
    if not data:
        raise DocumentError(f"{name}: is empty; {ALLOWED}")
    return data


def _decode(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """`data` in `encoding`, unless a byte order mark says otherwise."""
    for mark, marked in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        encoding = marked if data.startswith(mark) else encoding
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{name}: not text (byte {error.start} is not {encoding.upper()}); {ALLOWED}") from error
    except LookupError as error:
        raise DocumentError(f"{name}: declares the unknown encoding {encoding!r}; {ALLOWED}") from error
    if "\0" in text:
        raise DocumentError(f"{name}: not text (NUL at character {text.index(chr(0))}); {ALLOWED}")
    return text


class _VisibleText(HTMLParser):
    """Collects what a browser would show, one line per block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += bool(_HIDDEN.fullmatch(tag))
        self.preformatted += tag == "pre"
        if _BLOCK.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= bool(_HIDDEN.fullmatch(tag)) and self.hidden > 0
        self.preformatted -= tag == "pre" and self.preformatted > 0
        if _PARAGRAPH.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            after_space = not self.parts or self.parts[-1][-1].isspace()
            data = data.removeprefix(" ") if after_space else data
        if data:
            self.parts.append(data)


def _html_text(data: bytes, name: str) -> str:
    # HTML looks for the declaration in the first 1,024 bytes
    declared = re.search(rb"<meta[^>]+charset=[\"']?([\w-]+)", data[:1024], re.IGNORECASE)
    parser = _VisibleText()
    parser.feed(_decode(data, name, declared[1].decode() if declared else "utf-8"))
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _pdf_text(data: bytes, name: str) -> str:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, WrongPasswordError

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise WrongPasswordError
        pages = [page.extract_text() for page in reader.pages]
    except (WrongPasswordError, DependencyError) as error:
        raise DocumentError(f"{name}: an encrypted PDF; expected one that opens without a password") from error
    except Exception as error:  # pypdf raises whatever a damaged object trips over: KeyError, RecursionError, ...
        raise DocumentError(f"{name}: a damaged PDF ({error or type(error).__name__})") from error
    if not any(page.strip() for page in pages):
        raise DocumentError(f"{name}: no text in this PDF; scanned pages need OCR first")
    return "\n\n".join(page.strip() for page in pages) + "\n"
