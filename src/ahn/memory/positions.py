"""Where the queries, kept keys and evicted keys of one layer are seen from.

Letters: B batch, T tokens, N query heads, M key/value heads, H head size, S sinks, W window, E evicted tokens;
R rows of positions: 1 where all of the batch are at the same position, else B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ahn.memory.batch import FOREVER, ForwardBatch
from ahn.memory.evicted import Angles, Evictions
from ahn.ops.ranks import position_of
from ahn.ops.rotary import Rotary

Rotate = Callable[[Rotary, Tensor, Angles], Tensor]


@dataclass
class Sizes:
    """Slots of the tiers of one layer; they may be set anew (`ahn.hf.augment.set_window`)."""

    window: int | None  # W; None: full attention
    sinks: int  # S
    store: int  # per key/value head; 0 without a store

    @property
    def lossless(self) -> int:
        """Tokens kept exactly."""
        return self.sinks + self.store + self.reach

    @property
    def reach(self) -> int:
        """W, or more than any text."""
        return self.window or FOREVER


def rotate(rotary: Rotary, q: Tensor, angles: Angles) -> Tensor:
    return rotary.rotate(q, angles)


class Positions:
    """The rotations of one layer.

    With clipped sink positions no query sees sinks and store further away than S + W. A key that enters the store is
    rotated to position S, right behind the sinks, so that stored tokens are all at distance W, at which they left the
    window.

    Args:
        rotary: the base's rotation; None: the layer has none, or none is needed.
        clips_kept: whether sink positions are clipped. unrotates: whether the cell gets queries and keys without
            positions.
    """

    def __init__(self, sizes: Sizes, rotary: Rotary | None, clips_kept: bool, unrotates: bool) -> None:
        self.sizes, self.rotary, self.clips_kept, self.unrotates = sizes, rotary, clips_kept, unrotates
        self.rotate: Rotate = rotate  # a compiled or fused form may take its place

    @property
    def moves_stored(self) -> Rotary | None:
        """The rotation, if stored keys are rotated."""
        return self.rotary if self.clips_kept else None

    # Queries.
    def kept_angles(self, batch: ForwardBatch, device: torch.device) -> Angles | None:
        """The angles that rotate queries to where sinks and store meet them; None: they stay where they are."""
        rotary, sizes = self.rotary, self.sizes
        if rotary is None or not self.clips_kept or not (sizes.sinks or sizes.store) or sizes.window is None:
            return None
        furthest = sizes.sinks + sizes.window
        if batch.first + batch.length - 1 <= furthest:
            return None
        positions = batch.positions(device)
        angles = batch.memo("kept", lambda: rotary.angles(positions.clamp(max=furthest) - positions))
        cos, sin = (t.to(device) for t in angles)
        return cos, sin

    def of_kept(self, q: Tensor, batch: ForwardBatch) -> Tensor:
        """The queries as sinks and store meet them: the same tensor where nothing is rotated."""
        angles = self.kept_angles(batch, q.device)
        return q if angles is None or self.rotary is None else self.rotate(self.rotary, q, angles)

    # The cell.
    def evictions(self, batch: ForwardBatch, device: torch.device, first: int = 0) -> Evictions:
        """The evictions of a batch, from its token `first` on."""
        return batch.memo(
            ("evictions", self.rotary is None, device), lambda: self._make_evictions(batch, device, first)
        )

    def _make_evictions(self, batch: ForwardBatch, device: torch.device, first: int) -> Evictions:
        sizes, rotary = self.sizes, self.rotary
        assert sizes.window is not None
        positions = batch.positions(device)[:, first:]
        total = (positions - sizes.lossless + 1).clamp(min=1)
        writes = None
        if batch.on_device or min(batch.counts) < batch.length or int(batch.start.min()) + first < sizes.lossless:
            writes = (positions >= sizes.lossless) & batch.real(device)[:, first:]
        angles = None
        if self.unrotates and rotary is not None:
            # each head of a store evicts tokens at positions of its own, which it rotates itself (`from_store`)
            keys = None if sizes.store else rotary.angles(sizes.window - positions)
            angles = rotary.angles(-positions), keys
        return Evictions(writes, total, torch.full((), sizes.window, device=device), angles)

    def for_cell(self, q: Tensor, k: Tensor, evictions: Evictions) -> tuple[Tensor, Tensor]:
        """Queries and evicted keys, without positions if the cell is not to see any."""
        if evictions.angles is None or self.rotary is None:
            return q, k
        now, then = evictions.angles
        return self.rotary.rotate(q, now), k if then is None else self.rotary.rotate(k, then)

    # The store.
    def into_store(self, k: Tensor, batch: ForwardBatch, positions: Tensor) -> Tensor:
        """Keys [B, M, E, H] evicted from the window at `positions` [R, E], as they are stored."""
        if (rotary := self.moves_stored) is None or not k.shape[2]:
            return k
        return rotary.rotate_by(k, batch.memo(("stored", k.device), lambda: self.sizes.sinks - positions))

    def from_store(self, k: Tensor, ranks: Tensor) -> Tensor:
        """Stored keys [B, M, E, H] of tokens with these ranks [B, M, E], as the cell is given them."""
        if (rotary := self.moves_stored) is None:
            return self.unrotated(k, position_of(ranks))
        if self.unrotates:
            return rotary.rotate_by(k, torch.full((1, 1), -self.sizes.sinks, device=k.device))
        return _rotated(rotary, k, position_of(ranks) - self.sizes.sinks)

    def unrotated(self, k: Tensor, positions: Tensor) -> Tensor:
        """Keys as the attention has them, at positions [B, M, E], as the cell is given them."""
        return _rotated(self.rotary, k, -positions) if self.unrotates and self.rotary is not None else k


def _rotated(rotary: Rotary, k: Tensor, delta: Tensor) -> Tensor:
    """Keys [B, M, E, H], each rotated by its own `delta` [B, M, E]."""
    rotated = rotary.rotate_by(k.flatten(0, 1)[:, None], delta.flatten(0, 1))
    return rotated[:, 0].unflatten(0, k.shape[:2])
