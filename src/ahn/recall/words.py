"""Words of a text, as a lexical search compares them."""

from __future__ import annotations

import re
import unicodedata

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+")
_WRITTEN_WITHOUT_SPACES = re.compile(rf"[{_CJK}]")


def words(text: str) -> list[str]:
    """Words in lower case, compatibility forms made one. Scripts without spaces give pairs of neighbouring characters,
    which find words of any length without a dictionary."""
    text = unicodedata.normalize("NFKC", text).casefold()
    runs: list[str] = _WORD.findall(text)
    if not _WRITTEN_WITHOUT_SPACES.search(text):
        return runs
    found: list[str] = []
    for run in runs:
        if len(run) > 1 and _WRITTEN_WITHOUT_SPACES.match(run):
            found += (run[i : i + 2] for i in range(len(run) - 1))
        else:
            found.append(run)
    return found
