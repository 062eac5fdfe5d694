"""The buffer of one layer: sinks and window, exactly, and the state of the cell.

Letters: B batch, T tokens, N query heads, M key/value heads, H head size, S sinks, W window, G gate inputs;
R rows of positions: 1 where all of the batch are at the same position, else B.

A layer keeps one buffer of S + W slots: the sinks in the first S, the window as a ring in the rest. Token t lies in
slot t while t < S, else in S + (t - S) mod W, so a new token takes the slot of the one it pushes out, and a buffer that
is not full yet is simply shorter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ahn.memory.batch import ForwardBatch, LayerBatch, expand, gather
from ahn.ops import dispatch


class LayerMemory(CacheLayerMixin):
    """The memory of one layer: sinks and window in `keys`, `values` [B, M, S + W, H] and `inputs` [B, S + W, G * N],
    and the compressed rest in `state` [B, N, K, H] (`ahn.cells.base`).

    Args:
        window: W, or None to keep everything. sinks: S. gate_width: G * N gate inputs of a token, 0 without a cell.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    shift = 0  # slots between the sinks and the ring
    observer: Callable[[Any, Tensor, Tensor, ForwardBatch], None] | None = None
    """Called with the layer, queries [B, N, T, H], keys [B, M, T, H] and batch of new tokens, before they are read.
    Steps of a graph are not observed."""

    def __init__(self, window: int | None, sinks: int, gate_width: int) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.window, self.sinks, self.gate_width = window, sinks, gate_width
        self.inputs: Tensor | None = None
        self.state: Tensor | None = None

    def __repr__(self) -> str:
        return f"LayerMemory(window={self.window}, sinks={self.sinks}, nbytes={self.nbytes})"

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"keys": self.keys, "values": self.values, "inputs": self.inputs, "state": self.state}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy whose tensors are changed by a function."""
        twin = copy.copy(self)
        for name, tensor in self.tensors.items():
            setattr(twin, name, change(tensor))
        return twin

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    @property
    def compressed(self) -> Tensor:
        assert self.state is not None
        return self.state

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored(self) -> Tensor | None:
        """The positions that a store keeps, [B, places of all heads], -1 where it keeps none."""
        return None

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def reserve(self, tokens: int, k: Tensor, state: tuple[int, int, int] | None) -> None:
        """Room for `tokens` tokens, at most the S + W that are ever kept; doubling, so that growing stays cheap."""
        tokens = max(tokens, 1)  # a first piece may be all padding
        if self.window is not None:
            tokens = min(tokens, self.sinks + self.window)
        if tokens <= self.capacity:
            return
        room = max(tokens, 2 * self.capacity)
        room = room if self.window is None else min(room, self.sinks + self.window)
        batch, kv_heads, _, size = k.shape
        self.keys = _grown(self.keys, (batch, kv_heads, room, size), 2, k)
        self.values = _grown(self.values, (batch, kv_heads, room, size), 2, k)
        if state is not None:
            self.inputs = _grown(self.inputs, (batch, room, self.gate_width), 1, k)
            if self.state is None:
                self.state = torch.zeros(batch, *state, device=k.device)
        self.is_initialized = True

    def slots(self, positions: Tensor) -> Tensor:
        """Where the tokens at `positions` lie."""
        if self.window is None:
            return positions
        ring = self.sinks + self.shift + (positions - self.sinks) % self.window
        return torch.where(positions < self.sinks, positions, ring)

    def push(self, new: LayerBatch) -> tuple[Tensor, ...]:
        """Put the tokens of a compacted batch into sinks and ring. Returns keys, values and gate inputs of the window
        before the batch and of the batch, in order."""
        old = self.window_before(new.batch)
        window = tuple(
            torch.cat(pair, dim=1 if pair[0].dim() == 3 else 2) for pair in zip(old, new.tokens, strict=True)
        )
        self.put(new.batch, new.k, new.v, new.gate_inputs)
        return window

    def push_one(self, new: LayerBatch) -> tuple[Tensor, ...]:
        """Put one token a row into the ring, in the slot of the token that it evicts. Returns that one's keys, values
        [B, M, 1, H] and gate inputs [B, 1, G * N], or nothing if it evicts none."""
        batch, k, v, inputs = new.batch, new.k, new.v, new.gate_inputs
        if batch.on_device and dispatch.pick_one_token(k.device.type).name == "triton":
            from ahn.ops.kernels import moves

            return moves.exchange(self, batch.start, k, v, inputs)
        evicts = self.window is not None and batch.first >= self.sinks + self.window
        return self.exchange(self.slots(batch.start), k, v, inputs, old=evicts)

    def window_before(self, batch: ForwardBatch) -> tuple[Tensor, ...]:
        """Copies of the window's keys, values and gate inputs before `batch`, oldest first, ending at each row's last
        token; rows that have fewer hold rubbish in front, at positions that are below S or negative."""
        slots = batch.memo(("before", self._form), lambda: self._slots_before(batch))
        tensors = [(self.keys, 2), (self.values, 2), (self.inputs, 1)]
        return tuple(gather(t, slots, dim) for t, dim in tensors if t is not None)

    def put(self, batch: ForwardBatch, k: Tensor, v: Tensor, inputs: Tensor | None) -> None:
        """Write the tokens of a compacted batch into their slots: those that are still kept at its end."""
        row, token, slots = batch.memo(("put", self._form), lambda: self._slots_of(batch))
        for buffer, new, dim in ((self.keys, k, 2), (self.values, v, 2), (self.inputs, inputs, 1)):
            if buffer is None or new is None:
                continue
            if len(batch.counts) == 1:
                buffer.index_copy_(dim, slots, _select(new, token, dim))
            elif dim == 2:
                buffer[row, :, slots] = new[row, :, token]
            else:
                buffer[row, slots] = new[row, token]

    @property
    def _form(self) -> tuple[Any, ...]:
        """Everything that the slots of a batch depend on."""
        return self.window, self.shift, self.capacity, self.kept[0].device

    def _slots_before(self, batch: ForwardBatch) -> Tensor:
        length, device = max(0, batch.first - self.sinks), self.kept[0].device
        length = length if self.window is None else min(length, self.window)
        positions = batch.start_on(device)[:, None] + torch.arange(-length, 0, device=device)
        return self.slots(positions.clamp(min=self.sinks)).clamp(max=max(self.capacity + self.shift - 1, 0))

    def _slots_of(self, batch: ForwardBatch) -> tuple[Tensor, ...]:
        """Rows and tokens of a batch that are still kept at its end, and their slots. Of one row they are known without
        a look at the device."""
        device = self.kept[0].device
        if len(batch.counts) == 1:
            start, count = batch.first, batch.counts[0]
            sinks = min(count, max(0, self.sinks - start))
            first = sinks if self.window is None else max(sinks, count - self.window)  # of the window
            token = torch.cat([torch.arange(sinks, device=device), torch.arange(first, count, device=device)])
            return torch.zeros_like(token), token, self.slots(batch.start_on(device) + token)
        positions, last, kept = batch.positions(device), torch.tensor(batch.after(), device=device), batch.real(device)
        if self.window is not None:
            kept = kept & ((positions < self.sinks) | (positions >= last[:, None] - self.window))
        row, token = kept.nonzero(as_tuple=True)
        return row, token, self.slots(positions)[row, token]

    def exchange(self, slots: Tensor, k: Tensor, v: Tensor, inputs: Tensor | None, old: bool) -> tuple[Tensor, ...]:
        """Put one token a row into `slots` [R]; returns copies of what was there before if `old`."""
        slots = slots.to(k.device)
        index = slots[:, None]
        before: list[Tensor] = []
        for buffer, new, dim in ((self.keys, k, 2), (self.values, v, 2), (self.inputs, inputs, 1)):
            if buffer is None or new is None:
                continue
            if old:
                before.append(gather(buffer, index, dim))
            if len(slots) == 1:
                buffer.index_copy_(dim, slots, new)
            else:
                buffer.scatter_(dim, expand(index, new, dim), new)
        return tuple(before)

    def select_rows(self, rows: Tensor) -> None:
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    # The interface of a transformers cache layer; the attention function does the work.
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a LayerMemory is filled by the augmented model")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("asked of the AHNCache")

    def get_seq_length(self) -> int:
        raise NotImplementedError("asked of the AHNCache")

    def get_max_length(self) -> int:
        return -1


def _grown(old: Tensor | None, shape: tuple[int, ...], dim: int, like: Tensor) -> Tensor:
    new = torch.zeros(shape, dtype=like.dtype, device=like.device)
    if old is not None:
        new.narrow(dim, 0, old.shape[dim]).copy_(old)
    return new


def _select(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """index_select, without the copy where all is selected."""
    return x if len(index) == x.shape[dim] else x.index_select(dim, index)
