"""Draws sinks and a window for each batch (paper, section 3.1), so that the memory works with any of them."""

from __future__ import annotations

import math
import random

from ahn.errors import ConfigError

LOSSLESS = tuple(2**i for i in range(5, 14))  # 32 .. 8,192
SINKS = (0, 32, 64, 128, 512, 2048, 4096)


def allowed(length: int, lossless: tuple[int, ...] = LOSSLESS) -> list[int]:
    """The lossless sizes from 1/8 of a sequence of `length` tokens to all but one. Raises ConfigError if none is."""
    fitting = [size for size in lossless if length / 8 <= size < length]
    if not fitting:
        raise ConfigError(
            f"lossless={list(lossless)} with length={length}: expected a size of {math.ceil(length / 8)} (1/8 of the "
            f"length) to {length - 1}, so that tokens to train on lie behind it"
        )
    return fitting


def pairs(length: int, lossless: tuple[int, ...] = LOSSLESS, sinks: tuple[int, ...] = SINKS) -> list[tuple[int, int]]:
    """All pairs (lossless size, sinks) that can be drawn.

    Raises:
        ConfigError: no size fits, or no number of sinks fits one of the sizes.
    """
    return [(size, kept) for size in allowed(length, lossless) for kept in _at_most_half(size, sinks)]


def draw(
    seed: int, step: int, length: int, lossless: tuple[int, ...] = LOSSLESS, sinks: tuple[int, ...] = SINKS
) -> tuple[int, int]:
    """Window and sinks of one batch. They depend on the seed and the step alone, so a resumed run draws the same.

    The lossless size is drawn first: at least 1/8 of the sequence of `length` tokens, and shorter than it. At most half
    of it are sinks. The rest is the window.
    """
    chance = random.Random(f"{seed}/{step}")
    size = chance.choice(allowed(length, lossless))
    kept = chance.choice(_at_most_half(size, sinks))
    return size - kept, kept


def _at_most_half(size: int, sinks: tuple[int, ...]) -> list[int]:
    fitting = [count for count in sinks if count <= size / 2]
    if not fitting:
        raise ConfigError(
            f"sinks={list(sinks)} with a lossless size of {size}: expected sinks of at most {size // 2}, half of it: "
            "the rest is the window"
        )
    return fitting
