"""Places in a prompt, in characters: the text, its evidence, the question. And how they move when a prompt is cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]


def on_a_text(
    template: str, context: str, evidence: Span | None = None, question: str = "", **fields: str
) -> dict[str, Any]:
    """The fields of an `Example` that say where its text, evidence and question are.

    Args:
        template: of the prompt, with {context} and the names in `fields`.
        context: the text.
        evidence: characters of `context`.
        question: about the context; empty if there is none.
    """
    before, after = (part.format(**fields) for part in template.split("{context}"))
    start, end = len(before), len(before + context)
    place = evidence and (evidence[0] + start, evidence[1] + start)
    return {
        "prompt": before + context + after,
        "evidence": place,
        "depth": evidence and evidence[0] / len(context),
        "begins": start,
        "asks": end + len(after) - len(after.lstrip()) if question.strip() else None,
        "question": question.strip(),
        "needs": ((place,),) if place else (),
    }


def places(text: str, answers: Sequence[str], start: int = 0) -> tuple[tuple[Span, ...], ...]:
    """`Example.needs` of a fact that stands wherever an answer occurs in `text`; empty if none does.

    Args:
        start: of the text in the prompt.
    """
    spans = {
        (start + place.start(), start + place.end())
        for answer in answers
        if answer.strip()
        for place in re.finditer(re.escape(answer.strip()), text, re.IGNORECASE)
    }
    return (tuple(sorted(spans)),) if spans else ()


def only_place(text: str, wanted: str) -> Span | None:
    """The place of `wanted`, if it occurs exactly once."""
    at = text.find(wanted) if wanted else -1
    return None if at < 0 or text.find(wanted, at + 1) >= 0 else (at, at + len(wanted))


def runs(numbers: Sequence[int]) -> list[Span]:
    """First and last of each run of consecutive numbers."""
    runs: list[Span] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return runs


def moved(span: Span, pieces: Sequence[Span]) -> Span | None:
    """The place of `span` when only the pieces are left. None if no piece holds it."""
    before = 0
    for start, end in pieces:
        if start <= span[0] and span[1] <= end:
            return span[0] - start + before, span[1] - start + before
        before += end - start
    return None


def before(place: int, pieces: Sequence[Span]) -> int:
    """The number of characters in front of `place` when only the pieces are left."""
    return sum(min(max(place - start, 0), end - start) for start, end in pieces)
