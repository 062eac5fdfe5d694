"""Variable tracking: a chain of assignments in noise."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from itertools import pairwise

from ahn.eval.places import Span
from ahn.eval.ruler.text import NOISE, Text

VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above."
)
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)


def variables(chance: random.Random, units: int, hops: int = 4) -> Text:
    """One chain of assignments in noise, behind a short example of one."""

    def chain(letters: int, noise: int) -> Text:
        names = _variable_names(letters, hops + 1, chance)
        value = str(chance.randrange(10000, 100000))
        said = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
        places = sorted(chance.random() for _ in said)
        before, after = VT.split("{context}")
        text, last, spans = before, 0, []
        for assignment, place in zip(said, places, strict=True):
            at = round(place * noise)
            text += (NOISE + "\n") * (at - last)
            spans.append((len(text), len(text + assignment)))
            text += assignment + "\n"
            last = at
        text = (text + (NOISE + "\n") * (noise - last)).removesuffix("\n") + after.format(query=value)
        prefix = _VT_PREFIX.format(count=len(names), query=value)
        return Text(text, prefix, tuple(names), tuple(spans))

    shown = chain(letters=3, noise=5)
    shot = shown.prompt + shown.answer_prefix + " ".join(shown.answers) + "\n\n"
    asked = chain(letters=5, noise=units)
    facts = tuple((start + len(shot), end + len(shot)) for start, end in asked.facts)
    return Text(shot + asked.prompt, asked.answer_prefix, asked.answers, facts)


def _variable_names(letters: int, count: int, chance: random.Random) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(chance.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return names


def assignments(prompt: str, names: Sequence[str]) -> tuple[Span, ...]:
    """The assignments of these variables. Empty unless each variable is assigned in exactly one place."""
    found = [list(re.finditer(rf"VAR {re.escape(name)} = (?:VAR )?\w+", prompt)) for name in names]
    if any(len(places) != 1 for places in found):
        return ()
    return tuple(sorted(place.span() for (place,) in found))
