"""The tokens of one forward call, where they are in their sequences, and their tensors in one layer.

Letters: B batch, T tokens, D hidden size, N query heads, M key/value heads, H head size, G gate inputs;
R rows of positions: 1 where all of the batch are at the same position, else B.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ahn.ops.specs import Queries

FOREVER = 1 << 60  # window of a layer that keeps everything
T = TypeVar("T")


@dataclass
class ForwardBatch:
    """The tokens of one forward call, and where they are in their sequences. All layers share it.

    The memory knows no padding: `compact` moves the real tokens of each row to the front, where row b holds positions
    start[b], start[b] + 1, ...; the tokens behind them are computed and thrown away.
    """

    start: Tensor  # [R] int64, on the CPU: positions of the first token
    length: int  # T
    counts: list[int]  # real tokens, by row: R of them
    order: Tensor | None = None  # [B, T]: the order that puts real tokens first; None: nothing is padded
    back: Tensor | None = None  # [B, T]: its inverse
    written: bool = False  # whether a layer has begun to store it
    memos: dict[Any, Any] = field(default_factory=dict)  # kept by `memo`
    on_device = False  # whether only the device knows the positions, see `ahn.engine.graph.DecodeBatch`
    periodic = False  # of a step of a graph: whether it includes the work of few positions (`AHNLayer.is_periodic`)

    filling = False  # of a step of a graph: whether there may be rows whose store is not full

    @classmethod
    def of(cls, start: list[int], length: int, real: Tensor | None) -> ForwardBatch:
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

    # Tensors with a number per token are made on the device that asks: a host takes milliseconds for a long batch.
    def start_on(self, device: torch.device) -> Tensor:
        return self.memo(("start", device), lambda: self.start.to(device))

    def positions(self, device: torch.device) -> Tensor:
        """[R, T] after compaction."""

        def make() -> Tensor:
            return self.start_on(device)[:, None] + torch.arange(self.length, device=device)

        return self.memo(("positions", device), make)

    def real(self, device: torch.device) -> Tensor:
        """bool [R, T] after compaction."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(self.length, device=device) < counts[:, None]

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """A value that all layers share, such as positions, angles or indices: made for the first layer that asks."""
        if key not in self.memos:
            self.memos[key] = make()
        found: T = self.memos[key]
        return found

    def on_grid(self, grid: int) -> list[tuple[slice, ForwardBatch]]:
        """After compaction, the tokens between multiples of `grid` of any row's positions; all at once if it is 0."""
        return self.memo(("grid", grid), lambda: self._on_grid(grid)) if grid else [(slice(None), self)]

    def _on_grid(self, grid: int) -> list[tuple[slice, ForwardBatch]]:
        starts, parts = self.start.tolist(), []
        ends = sorted({end for at in starts for end in range(grid - at % grid, self.length, grid)} | {self.length})
        for low, high in zip([0, *ends], ends, strict=False):
            counts = [min(max(count - low, 0), high - low) for count in self.counts]
            start = [at + min(count, low) for at, count in zip(starts, self.counts, strict=True)]
            parts.append((slice(low, high), ForwardBatch(torch.tensor(start), high - low, counts)))
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

    def side_stream(self, x: Tensor) -> AbstractContextManager[Any]:
        """Run work on `x` on a side stream, if there is one; nothing later in the same step may depend on it."""
        return nullcontext()


class LayerBatch(NamedTuple):
    """The tensors of a `ForwardBatch` in one layer."""

    batch: ForwardBatch
    q: Tensor  # [B, N, T, H]
    k: Tensor  # [B, M, T, H]
    v: Tensor
    x: Tensor  # [B, T, D], the layer's input
    scale: float  # of the scores
    gate_inputs: Tensor | None = None  # [B, T, G * N], if there is a cell
    q_kept: Tensor | None = None  # [B, N, T, H]: the queries as sinks and store meet them, once they are known

    @property
    def queries_of_kept(self) -> Tensor:
        assert self.q_kept is not None
        return self.q_kept

    @property
    def queries(self) -> Queries:
        return Queries(self.q, self.queries_of_kept, self.scale)

    @property
    def tokens(self) -> tuple[Tensor, ...]:
        """Keys, values and gate inputs, if there are any: everything a window keeps of a token."""
        return tuple(t for t in (self.k, self.v, self.gate_inputs) if t is not None)

    def compact(self) -> LayerBatch:
        """The same with the real tokens of each row in front."""
        q, k, v = (self.batch.compact(t, 2) for t in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v, x=self.batch.compact(self.x, 1))

    def part(self, at: slice, batch: ForwardBatch) -> LayerBatch:
        """Some of the tokens, which are those of `batch`."""
        return LayerBatch(
            batch,
            self.q[:, :, at],
            self.k[:, :, at],
            self.v[:, :, at],
            self.x[:, at],
            self.scale,
            None if self.gate_inputs is None else self.gate_inputs[:, at],
            None if self.q_kept is None else self.q_kept[:, :, at],
        )


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
