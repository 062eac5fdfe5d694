"""A text of RULER, and the words that come with this package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ahn.eval.places import Span

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Text:
    """One draw.

    Args:
        facts: places of the statements or documents that answer.
        depth: of the fact, where a single place was chosen for it.
        needs: as in `Example`, where the answer stands at known places within a fact; default: the facts.
    """

    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]
    facts: tuple[Span, ...] = ()
    depth: float | None = None
    needs: tuple[tuple[Span, ...], ...] = ()


@cache
def words() -> dict[str, list[str]]:
    """Adjectives and nouns."""
    text = files("ahn.eval.data").joinpath("words.json").read_text(encoding="utf-8")
    return {kind: words.split() for kind, words in json.loads(text).items()}


@cache
def bundled() -> str:
    """The stories that come with this package."""
    return files("ahn").joinpath("data/arsene-lupin.txt").read_text(encoding="utf-8")
