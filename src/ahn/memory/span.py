"""The tokens of one forward call, and where they are in their sequences.

Letters: B batch, T tokens; R rows of positions: 1 where all of the batch are at the same position, else B.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

FOREVER = 1 << 60  # window of a layer that keeps everything
T = TypeVar("T")


@dataclass
class Span:
    """The tokens of one forward call, and where they are in their sequences.

    Padding does not exist for the memory: `compact` moves the real tokens of each row to the front, where row b holds
    positions start[b], start[b] + 1, ...; what is behind them is computed and thrown away.
    """

    start: Tensor  # [R] int64, on the CPU: positions of the first token
    length: int  # T
    counts: list[int]  # real tokens, by row: R of them
    order: Tensor | None = None  # [B, T]: which token comes i-th, real ones first; None: nothing is padded
    back: Tensor | None = None  # [B, T]: its inverse
    written: bool = False  # whether a layer has begun to store it
    made: dict[Any, Any] = field(default_factory=dict)  # what `once` keeps
    on_device = False  # whether only the device knows the positions, see `ahn.engine.graph.Step`
    due = False  # of such a step: whether it does what few positions ask for

    @classmethod
    def of(cls, start: list[int], length: int, real: Tensor | None) -> Span:
        """`start`: tokens seen before, by row. `real`: bool [B, T] on the CPU, false for padding, or None."""
        if real is None or bool(real.all()):
            same = len(set(start)) == 1
            start = start[:1] if same else start
            return cls(torch.tensor(start), length, [length] * len(start))
        start = start * real.shape[0] if len(start) == 1 else start
        order = (~real).int().argsort(dim=1, stable=True)
        return cls(torch.tensor(start), length, real.sum(1).tolist(), order, order.argsort(dim=1))

    @property
    def padded(self) -> bool:
        return self.order is not None

    @property
    def first(self) -> int:
        """The furthest position any row starts at."""
        return int(self.start.max())

    # What depends on each token is computed on the device that asks: a host takes milliseconds for a long span.
    def start_on(self, device: torch.device) -> Tensor:
        return self.once(("start", device), lambda: self.start.to(device))

    def positions(self, device: torch.device) -> Tensor:
        """[R, T] after compaction."""

        def make() -> Tensor:
            return self.start_on(device)[:, None] + torch.arange(self.length, device=device)

        return self.once(("positions", device), make)

    def real(self, device: torch.device) -> Tensor:
        """bool [R, T] after compaction."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(self.length, device=device) < counts[:, None]

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What is the same for all layers, made for the first that asks: positions, angles, indices."""
        if key not in self.made:
            self.made[key] = make()
        found: T = self.made[key]
        return found

    def on_grid(self, grid: int) -> list[tuple[slice, Span]]:
        """After compaction, the tokens between multiples of `grid` of any row's positions; all at once if it is 0.
        The same for all layers."""
        return self.once(("grid", grid), lambda: self._on_grid(grid)) if grid else [(slice(None), self)]

    def _on_grid(self, grid: int) -> list[tuple[slice, Span]]:
        starts, parts = self.start.tolist(), []
        ends = sorted({end for at in starts for end in range(grid - at % grid, self.length, grid)} | {self.length})
        for low, high in zip([0, *ends], ends, strict=False):
            counts = [min(max(count - low, 0), high - low) for count in self.counts]
            start = [at + min(count, low) for at, count in zip(starts, self.counts, strict=True)]
            parts.append((slice(low, high), Span(torch.tensor(start), high - low, counts)))
        return parts

    def compact(self, x: Tensor, dim: int) -> Tensor:
        return x if self.order is None else gather(x, self.order, dim)

    def restore(self, x: Tensor, dim: int) -> Tensor:
        return x if self.back is None else gather(x, self.back, dim)

    @property
    def ends(self) -> Tensor:
        """Positions [R] of what comes after it."""
        return self.start + torch.tensor(self.counts)

    def after(self) -> list[int]:
        return self.ends.tolist()

    def aside(self, x: Tensor) -> AbstractContextManager[Any]:
        """Within is computed, from `x`, what nothing else that is done to the span waits for."""
        return nullcontext()


def expand(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """[B, L] -> the shape of x, where L is the size of `dim` (1 or 2) and dimension 0 is the batch."""
    shape = list(x.shape)
    shape[dim] = index.shape[1]
    middle = (slice(None), None) if dim == 2 else (slice(None),)
    index = index[middle]
    return index.view(*index.shape, *([1] * (x.dim() - index.dim()))).expand(shape)


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take tokens `index` [R, L] along `dim` of x."""
    index = index.to(x.device)
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    return x.gather(dim, expand(index, x, dim))
