"""PDF: pypdf extracts the text, and wrapped lines are joined to paragraphs again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from ahn.documents.base import Format, Piece, clean
from ahn.errors import DocumentError

MAX_PAGES = 20_000
MAX_UNREADABLE = 0.3  # share of the characters; beyond it the fonts do not say which letters they show

_WORD = re.compile(r"[^\W\d_]+")
_BROKEN = re.compile(r"(?<![^\W\d_])[^\W\d_]+[-\u2010]\s*\n\s*[^\W\d_]+")  # a word broken at a line's end
_ITEM = re.compile(r"(?:[-*•▪➢✓–—]|\(?(?:\d{1,3}|[a-zA-Z])[.)])\s")
_CHINESE = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")  # Chinese and Japanese, which have no spaces
_NARROW = 30  # characters: text in shorter lines is no running text
_FULL = 0.85  # share of a page's width from which a line counts as full, because letters differ in width


class PDF(Format):
    name = "pdf"
    title = "PDF"
    suffixes = (".pdf",)
    max_bytes = 512 * 2**20
    hint = "; scanned pages need OCR first"

    def marks(self, head: bytes) -> bool:
        return b"%PDF-" in head[:1024]

    def read(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, WrongPasswordError

        try:
            reader = PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):
                raise WrongPasswordError
            count = len(reader.pages)
        except (WrongPasswordError, DependencyError) as error:
            raise DocumentError(f"{name}: an encrypted PDF; expected one that opens without a password") from error
        if count > MAX_PAGES:
            raise DocumentError(f"{name}: a PDF of {count:,} pages; expected at most {MAX_PAGES:,}")
        known: set[str] = set()
        written = unreadable = 0
        for number, page in enumerate(reader.pages, 1):
            try:
                raw = page.extract_text()
            except Exception as error:  # whatever a damaged object trips over
                raise ValueError(f"page {number}: {error or type(error).__name__}") from error
            text = join_lines(clean(re.sub("\xad[ \t]*\r?\n[ \t]*", "", raw)), known)
            unreadable += text.count("\ufffd")
            if unreadable > 100 and unreadable > MAX_UNREADABLE * (written + len(text)):
                raise DocumentError(f"{name}: the fonts of this PDF do not name their letters; it needs OCR first")
            if text:
                yield Piece(f"\n{text}\n" if written else f"{text}\n", number)
                written += len(text)


def join_lines(text: str, known: set[str]) -> str:
    """A page's text with one line for each paragraph and single spaces.

    A line was wrapped if the first word of the next one would not have fitted behind it. Rows of a table, items of a
    list and verse stay as they are. A word that is hyphenated at a line end is joined unless both halves are words.

    Args:
        known: words seen so far, lower case; those of this page are added.
    """
    known.update(word.lower() for word in _WORD.findall(_BROKEN.sub(" ", text)))
    lines = [" ".join(line.split()) for line in text.split("\n")]
    widths = sorted(len(line) for line in lines if line)
    width = widths[-1 - len(widths) // 20] if widths else 0
    verse = sum(line[0].isupper() for line in lines if line) > 0.75 * len(widths) and len(widths) > 3
    joined: list[str] = []
    last = ""  # line, as it is on the page
    for line in lines:
        if not verse and width >= _NARROW and _continues(last, line, width):
            joined[-1] = _join(joined[-1], line, known)
        else:
            joined.append(line)
        last = line
    return re.sub(r"\n{3,}", "\n\n", "\n".join(joined)).strip("\n")


def _continues(line: str, following: str, width: int) -> bool:
    if not line or not following or _ITEM.match(following) or _is_row(line) or _is_row(following):
        return False
    if _half_word(line) and following[0].isalnum():
        return True
    new_sentence = line.rstrip("\"'”’»)]")[-1:] in (".", "!", "?", ":") and not following[0].islower()
    return len(line) + 1 + len(following.split(" ", 1)[0]) > (1 if new_sentence else _FULL) * width


def _is_row(line: str) -> bool:
    words = line.split(" ")
    return sum(any(map(str.isdigit, word)) for word in words) > 0.4 * len(words)


def _half_word(line: str) -> str:
    """The letters before a hyphen at the end of a line."""
    if line[-1] not in "-\u2010":
        return ""
    words = _WORD.findall(line[:-1].rsplit(" ", 1)[-1])
    return words[-1] if words and line[-2].isalpha() else ""


def _join(line: str, following: str, known: set[str]) -> str:
    left = _half_word(line).lower()
    if left and following[0].isalnum():
        rest = _WORD.match(following)
        right = rest[0].lower() if rest else ""
        compound = not following[0].islower() or (left + right not in known and left in known and right in known)
        return (line if compound else line[:-1]) + following
    if _CHINESE.match(line[-1]) and _CHINESE.match(following):
        return line + following
    return f"{line} {following}"
