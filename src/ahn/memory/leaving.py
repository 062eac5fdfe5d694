"""Which tokens push one out of the window, in a span.

Letters: T tokens, W window; R rows of positions: 1 where all of the batch are at the same position, else B.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Turn = tuple[Tensor, Tensor]  # cos and sin


class Leaving(NamedTuple):
    """Which tokens of a span push one out of the window, and which one. The same in all layers.

    Where the first tokens of a span cannot, it begins at the first that can.
    """

    writes: Tensor | None  # bool [R, T]: token t pushes token t - W out; None: each does
    evicted: Tensor  # [R, T]: how many have left then, at least 1
    window: Tensor  # W, on the device: code compiled for one window is right for any
    angles: tuple[Turn, Turn | None] | None  # turns queries, and keys that leave, back to where nothing has a position

    def part(self, at: slice) -> Leaving:
        """Of some of the tokens, for a layer that turns the keys itself."""
        writes = None if self.writes is None else self.writes[:, at]
        angles = None if self.angles is None else ((self.angles[0][0][:, at], self.angles[0][1][:, at]), None)
        return Leaving(writes, self.evicted[:, at], self.window, angles)
