"""Guesses the encoding of bytes that do not name it."""

from __future__ import annotations

import codecs
import re

_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE = 64 * 1024
_ASCII = bytes(range(128))
_CONTROLS = bytes([*range(8), *range(0x0E, 0x1B), *range(0x1C, 0x20)])
_HIGH_WORD = re.compile(rb"[\x80-\xff]{3,}")
_ASCII_TEXT = bytes([*range(0x20, 0x7F), 0x09, 0x0A, 0x0C, 0x0D])
# The legacy encodings of scripts other than Latin. Between those of Latin script no statistics are reliable.
_LEGACY = ["cp1251", "koi8_r", "cp1253", "cp1255", "cp1256", "cp932", "euc_jp", "gb18030", "big5", "cp949", "cp874"]


def marked(data: bytes) -> str | None:
    """The encoding that a byte order mark at the start of `data` names, as a codec that removes the mark."""
    return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)


def wide(data: bytes) -> str | None:
    """The codec, if `data` begins a text in UTF-16 or UTF-32 without a mark; else None."""
    data = data[:_SAMPLE]
    plain = len(data) - len(data.translate(None, delete=_ASCII_TEXT))
    if not binary(data) or plain > 0.8 * len(data):  # more would be ASCII with a few NULs in it
        return None
    blocks = {}
    for encoding, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
        if len(data) % width:
            continue
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(data)
        except UnicodeDecodeError:
            continue
        if all(letter.isprintable() or letter.isspace() for letter in text):
            blocks[encoding] = len({ord(letter) >> 8 for letter in text})
    # with the wrong byte order, letters of one script are scattered over all of Unicode
    return min(blocks, key=lambda encoding: blocks[encoding], default=None)


def guess(data: bytes, whole: bool = True) -> str:
    """The encoding of text without a mark: UTF-8 if most of the bytes beyond ASCII fit it, else that of the likeliest
    script, else cp1252.

    Args:
        whole: whether the text ends with `data`; else its last character may be cut.
    """
    high = len(data.translate(None, delete=_ASCII))
    broken = codecs.getincrementaldecoder("utf-8")("replace").decode(data, whole).count("\ufffd")
    if broken <= high // 3:
        return "utf-8"
    words = _HIGH_WORD.findall(data)
    if sum(map(len, words)) > high // 2:  # in Latin script bytes beyond ASCII stand alone
        from charset_normalizer import from_bytes

        best = from_bytes(data[:_SAMPLE], cp_isolation=_LEGACY).best()
        if best is not None:
            return best.encoding
    return "cp1252"


def binary(data: bytes) -> str:
    """Why `data`, the beginning of something in a single-byte or UTF-8 encoding, is not text; "" if it can be text."""
    if b"\0" in data:
        return f"NUL at byte {data.index(0):,}"
    controls = len(data) - len(data.translate(None, delete=_CONTROLS))
    return f"{controls:,} control characters" if controls > len(data) // 50 else ""
