"""How much the fuzz tests try: a few fixed cases in CI, many new ones in `make fuzz`.

AHN_FUZZ_SEED and AHN_FUZZ_EFFORT (a factor on every count) are set by `make fuzz`, which prints the seed.
"""

import os
import random

SEED = int(os.environ.get("AHN_FUZZ_SEED", "0"))
EFFORT = float(os.environ.get("AHN_FUZZ_EFFORT", "1"))


def times(count):
    return max(1, round(count * EFFORT))


def draw_for(*names):
    """A generator of its own for each case, so that one can be run alone."""
    return random.Random(f"{SEED} {names}")
