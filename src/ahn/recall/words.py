"""Words of a text, as a lexical search compares them."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

import regex

_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_RUN = rf"[[{_SPACELESS}]&&[\p{{L}}\p{{M}}\p{{N}}]]"
_OTHER = rf"[[\p{{L}}\p{{N}}]--[{_SPACELESS}]][[\p{{L}}\p{{M}}\p{{N}}]--[{_SPACELESS}]]*"
_WORD = regex.compile(rf"{_RUN}+|{_OTHER}", regex.V1)
_PLAIN_WORD = re.compile(r"[^\W_]+")  # where there are neither marks nor scripts without spaces; twice as fast
_PLAIN = regex.compile(rf"[^{_SPACELESS}\p{{M}}]*+", regex.V1)
_SPACELESS_RUN = regex.compile(_RUN, regex.V1)
_CHARACTER = regex.compile(r"\X")  # with its combining marks
_INVISIBLE = str.maketrans(dict.fromkeys("\u00ad\u200c\u200d"))  # soft hyphen and joiners, within a word


def words(text: str) -> list[str]:
    """Words in lower case, compatibility forms made one. Scripts without spaces give pairs of neighbouring characters,
    which find words of any length without a dictionary."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_INVISIBLE)
    text = text.casefold()
    if text.isascii() or _PLAIN.fullmatch(text):
        return _PLAIN_WORD.findall(text)
    found: list[str] = []
    for run in _WORD.findall(text):
        characters = _CHARACTER.findall(run) if _SPACELESS_RUN.match(run) else [run]
        found += map("".join, pairwise(characters)) if len(characters) > 1 else characters
    return found
