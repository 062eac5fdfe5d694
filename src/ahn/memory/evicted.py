"""The tokens that a tier evicts, and the queries that they are evicted with.

Letters: B batch, T tokens, N query heads, M key/value heads, H head size, G gate inputs, W window, E evicted tokens;
R rows of positions: 1 where all of the batch are at the same position, else B.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Angles = tuple[Tensor, Tensor]  # cos and sin of a rotation


class Evicted(NamedTuple):
    """Tokens that a tier evicts, one with each of the last E queries of a batch."""

    k: Tensor  # [B, M, E, H]
    v: Tensor
    gate_inputs: Tensor | None = None  # [B, E, G * N], if there is a cell


class Evictions(NamedTuple):
    """Which tokens of a batch evict one from the tiers above the cell. All layers share it.

    T counts from the first token of the batch that may evict one.
    """

    writes: Tensor | None  # bool [R, T]: whether token t evicts one; None: each does
    total: Tensor  # [R, T]: tokens evicted so far, at least 1
    window: Tensor  # W, on the device: code compiled for one window is right for any
    angles: tuple[Angles, Angles | None] | None  # rotate queries and evicted keys back to where they have no position

    def part(self, at: slice) -> Evictions:
        """Some of the tokens, for a tier that rotates the keys itself."""
        writes = None if self.writes is None else self.writes[:, at]
        angles = None if self.angles is None else ((self.angles[0][0][:, at], self.angles[0][1][:, at]), None)
        return Evictions(writes, self.total[:, at], self.window, angles)
