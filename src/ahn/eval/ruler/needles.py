"""Needles in a haystack: sentences with a key and a value, in noise, essays or other needles."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ahn.errors import EvalError
from ahn.eval.places import Span, only_place
from ahn.eval.records import open_text
from ahn.eval.ruler.text import NOISE, Text, bundled, words

DEPTHS = 40  # of a needle: that many from 0 to 1
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)
_NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
_NIAH_ONE = _NIAH.replace("Some", "A").replace("are all", "is").replace("are hidden", "is hidden")
_NIAH_ONE_PREFIX = _NIAH_PREFIX.replace("are", "is")


@dataclass(frozen=True)
class Needles:
    """A kind of needles.

    Args:
        haystack: "noise", "essay" or "needle".
        keys, values: "words", "numbers" or "uuids".
        num_values: of each key.
        num_asked: keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1


SETS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_asked=4),
}


def essay(data: Path | None) -> list[str]:
    """Words of the essays."""
    if data is None:
        return bundled().split()
    paths = [data] if data.is_file() else sorted(data.rglob("*.txt"))
    words = [word for path in paths for word in open_text(path).split()]
    if not words:
        raise EvalError(f"{data}: no text (.txt) for the haystack")
    return words


def _sentences(words: Sequence[str], count: int) -> list[str]:
    """The first `count` words, cut into sentences. After the last word they begin again."""
    repeated = [words[i % len(words)] for i in range(count)]
    return re.split(r"(?<=[.!?]) ", " ".join(repeated))


def _drawn(kind: str, chance: random.Random) -> str:
    if kind == "numbers":
        return str(chance.randrange(10**6, 10**7))
    if kind == "words":
        return f"{chance.choice(words()['adjectives'])}-{chance.choice(words()['nouns'])}"
    digits = f"{chance.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], "8" + digits[17:20], digits[20:]))


def _different(kind: str, count: int, chance: random.Random, taken: set[str]) -> list[str]:
    """`count` names that are not in `taken`. They are added to it."""
    drawn: list[str] = []
    while len(drawn) < count:
        one = _drawn(kind, chance)
        if one not in taken:
            taken.add(one)
            drawn.append(one)
    return drawn


def niah(kind: Needles, essay: Sequence[str], chance: random.Random, units: int) -> Text:
    taken: set[str] = set()
    keys = _different(kind.keys, kind.num_keys, chance, taken)
    values = [_different(kind.values, kind.num_values, chance, taken) for _ in keys]
    asked = sorted(chance.sample(range(len(keys)), kind.num_asked))
    needles = [(k, value) for k, of_key in enumerate(values) for value in of_key]
    chance.shuffle(needles)
    depths = sorted(d / (DEPTHS - 1) for d in chance.sample(range(DEPTHS), len(needles)))

    def sentence(key: str, value: str) -> str:
        return NEEDLE.format(kind=kind.values, key=key, value=value)

    if kind.haystack == "essay":
        hay, joint = _sentences(essay, units), " "
    elif kind.haystack == "noise":
        hay, joint = [NOISE] * units, "\n"
    else:
        others = _different(kind.keys, units, chance, taken)
        false = _different(kind.values, units, chance, taken)
        hay, joint = [sentence(*pair) for pair in zip(others, false, strict=True)], "\n"

    one = len(asked) * kind.num_values == 1
    what = kind.values.removesuffix("s") if one else kind.values
    query = _listed([keys[k] for k in asked])
    before, after = (_NIAH_ONE if one else _NIAH).split("{context}")
    text, spans = before.format(kind=what), []
    last = 0
    for (key, value), depth in zip(needles, depths, strict=True):
        at = round(depth * len(hay))
        text += "".join(piece + joint for piece in hay[last:at])
        if key in asked:
            spans.append((len(text), len(text + sentence(keys[key], value))))
        text += sentence(keys[key], value) + joint
        last = at
    text = (text + joint.join(hay[last:])).rstrip() + after.format(kind=what, query=query)
    return Text(
        prompt=text,
        answer_prefix=(_NIAH_ONE_PREFIX if one else _NIAH_PREFIX).format(kind=what, query=query),
        answers=tuple(value for k in asked for value in values[k]),
        facts=tuple(spans),
        depth=next(depth for (key, _), depth in zip(needles, depths, strict=True) if key in asked) if one else None,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]


def needle_lines(prompt: str, answers: Sequence[str]) -> tuple[Span, ...]:
    """The needles that hold the answers, in the order of the text. Empty unless every answer is in one."""
    spans = []
    for answer in answers:
        place = only_place(prompt, f" is: {answer}.")
        start = prompt.rfind(NEEDLE[:24], 0, place[0]) if place else -1
        if not place or start < 0:
            return ()
        spans.append((start, place[1]))
    return tuple(sorted(spans))
