"""Words to count: common among others, or coded words of falling frequency."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from functools import cache

from ahn.eval.ruler.text import Text, bundled, words

CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


@cache
def _vocabulary() -> tuple[str, ...]:
    """Words to count: single ones, then pairs, as many as any length may need."""
    lists = words()
    single = {*lists["adjectives"], *lists["nouns"], *re.findall(r"\b[a-z]{4,}\b", bundled())}
    pairs = (f"{adjective}-{noun}" for adjective in lists["adjectives"] for noun in lists["nouns"])
    return (*sorted(single), *pairs)


def common_words(chance: random.Random, units: int, small: bool) -> Text:
    """Ten words are common (30 times), `units` others are not (3 times); shorter texts have fewer of both."""

    def numbered(words: Sequence[str]) -> str:
        return " ".join(f"{n}. {word}" for n, word in enumerate(words, 1))

    def drawn(others: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = chance.sample(_vocabulary()[: max(4000, 2 * (others + 10))], others + 10)
        mixed = words[:10] * often + words[10:] * seldom
        chance.shuffle(mixed)
        return numbered(mixed), words[:10]

    context, answers = drawn(10, 3, 1) if small else drawn(30, 10, 3)
    shot = CWE.format(context=context) + _CWE_PREFIX + " " + numbered(answers) + "\n"
    context, answers = drawn(units, 6, 1) if small else drawn(units, 30, 3)
    return Text(shot + CWE.format(context=context), _CWE_PREFIX, tuple(answers))


def frequent_words(chance: random.Random, units: int, vocabulary: int) -> Text:
    """Coded words, the k-th most frequent with share k^-2 / zeta(2) of ten times `units`; the first is "..."."""
    coded: list[str] = []
    while len(coded) < vocabulary:
        word = "".join(chance.choices(string.ascii_lowercase, k=6))
        if word not in coded:
            coded.append(word)
    coded[0] = "..."
    total = 10 * units + 30  # so many that the fourth occurs at all
    said = [word for k, word in enumerate(coded, 1) for _ in range(int(total * k**-2 / 1.6449340668482264))]
    chance.shuffle(said)
    return Text(FWE.format(context=" ".join(said)), _FWE_PREFIX, tuple(coded[1:4]))
