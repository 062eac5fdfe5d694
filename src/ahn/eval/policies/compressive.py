"""Compressive Transformer (arXiv 1911.05507), the paper's other baseline: evicted keys and values are pooled.

Letters: B batch, N query heads, M key/value heads, H head size, T tokens, E of them that push another one out,
C slots of the buffer.

Tokens that leave the window are pooled four at a time, keys and values alike and after their rotary positions, into a
first-in-first-out buffer that is attended like the rest. Evicted token e belongs to group e // 4, which lies in slot
(e // 4) mod C; a group that is not complete yet is the pool of what it has, so that nothing vanishes and a prompt read
in pieces of any size is read alike. C is as many slots as fit into the bytes of the cell under comparison: its state
and the gates of the lossless tokens (the paper: "size matched to the state").
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ahn.attention import attend, merge
from ahn.augmentation import augment, layers_of
from ahn.cache import AHNCache, LayerMemory, Span
from ahn.cost import Shape, cost
from ahn.errors import ConfigError, UnsupportedOperationError
from ahn.eval.policies.base import Policy, exact_part, memory_bytes, trained
from ahn.layer import AHNLayer

RATE = 4  # tokens in one slot, as in the paper


class Compressive(Policy):
    """Sinks, window, and a buffer of pooled keys and values. Subclasses say how four become one."""

    needs_adapter = True
    maximum: ClassVar[bool]

    @classmethod
    def settings(
        cls, *, window: int, sinks: int, adapter: str | None = None, yarn: float | None = None
    ) -> dict[str, Any]:
        assert adapter is not None
        found = super().settings(window=window, sinks=sinks, adapter=adapter, yarn=yarn)
        return found | {"rate": RATE, "sized_like": trained(adapter).config.cell}

    def prepare(self) -> None:
        assert self.adapter is not None
        cell = trained(self.adapter).config.cell
        assert cell is not None
        shape, element = Shape.from_config(self.model.config), self.model.dtype.itemsize
        budget = memory_bytes(cell, shape, self.window + self.sinks, element)
        self.slots = budget // (2 * shape.M * shape.H * element)
        if not self.slots:
            raise ConfigError(f"the {cell} cell holds {budget} bytes a layer, less than one slot of pooled keys")
        augment(self.model, exact_part(self.window, self.sinks, self.adapter))
        for layer in layers_of(self.model):
            if layer.window is not None:
                layer.__class__ = CompressiveLayer  # the same layer with the same settings, and a buffer
                assert isinstance(layer, CompressiveLayer)
                layer.slots, layer.maximum = self.slots, self.maximum

    def cache(self) -> AHNCache:
        cache = AHNCache(self.model)
        for i, layer in enumerate(layers_of(self.model)):
            if isinstance(layer, CompressiveLayer):
                cache.layers[i] = CompressiveMemory(layer)
        return cache

    def cache_bytes(self, tokens: int) -> int:
        exact = super().cache_bytes(tokens)
        if tokens <= self.window + self.sinks:
            return exact
        pooled = sum(isinstance(layer, CompressiveLayer) for layer in layers_of(self.model))
        return exact + pooled * self.slots * 2 * self.shape.M * self.shape.H * self.model.dtype.itemsize

    def flops(self, tokens: int) -> tuple[int, int]:
        found = cost(self.shape, tokens, self.window, self.sinks, None)
        pooled = self.shape.layers * 4 * found.written * min(self.slots, -(-found.written // RATE))
        pooled *= self.shape.H * self.shape.N
        return found.mixing.memory + pooled, found.flops.memory + pooled


class CompressiveLayer(AHNLayer):
    """Sinks and window as in AHNLayer, merged with softmax attention over the pooled rest. One text, with a cache."""

    steps_on_device = False
    slots: int
    maximum: bool  # else the mean is taken

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, span: Span, memory: LayerMemory | None, scale: float
    ) -> Tensor:
        if not isinstance(memory, CompressiveMemory) or span.padded or len(span.counts) > 1:
            raise UnsupportedOperationError("the compressive baseline reads texts of one length through its own cache")
        assert self.window is not None
        memory.reserve(max(span.after()), k, self.state_shape)
        lossless = self.sinks + self.window
        pushing = max(0, span.first + span.length - max(span.first, lossless))
        seen = span.first + span.length - pushing - lossless  # evicted before
        if span.length == 1:
            exact, leaving = self._attend_one(q, k, v, None, span, memory, scale, bool(pushing))
        else:
            exact, window = self._attend_many(q, k, v, None, span, memory, scale)
            oldest = window[0].shape[2] - pushing - self.window
            leaving = tuple(t[:, :, oldest : oldest + pushing] for t in window)
        if pushing:
            pooled = attend(q[:, :, -pushing:], *memory.absorb(leaving[0], leaving[1], seen), scale)
            old, late = (tuple(t[:, :, part] for t in exact) for part in (slice(-pushing), slice(-pushing, None)))
            exact = torch.cat([old[0], merge((late[0], late[1]), pooled)[0]], 2), exact[1]
        return exact[0].transpose(1, 2)


class CompressiveMemory(LayerMemory):
    """Sinks, window, and `pooled_keys`, `pooled_values` [B, M, C, H]."""

    def __init__(self, layer: CompressiveLayer) -> None:
        super().__init__(layer)
        self.room, self.maximum = layer.slots, layer.maximum
        self.pooled_keys: Tensor | None = None
        self.pooled_values: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"pooled_keys": self.pooled_keys, "pooled_values": self.pooled_values}
        return super().tensors | {name: tensor for name, tensor in held.items() if tensor is not None}

    def reserve(self, tokens: int, k: Tensor, state: tuple[int, int, int] | None) -> None:
        super().reserve(tokens, k, state)
        assert self.window is not None
        if self.pooled_keys is None and tokens > self.sinks + self.window:
            shape = (k.shape[0], k.shape[1], self.room, k.shape[3])
            self.pooled_keys, self.pooled_values = k.new_zeros(shape), k.new_zeros(shape)

    def absorb(self, k: Tensor, v: Tensor, seen: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pool tokens k, v [B, M, E, H] that leave one after the other, after `seen` that left before.

        Returns:
            keys and values [B, M, K, H], and which of them the query sees that pushes out the i-th, bool [1, E, K].
        """
        room, device = self.room, k.device
        numbers = torch.arange(seen, seen + k.shape[2], device=device)
        groups = numbers // RATE
        first = seen // RATE
        before = torch.arange(max(0, first - room), first, device=device)  # complete, as far as they are still there
        parts = []
        for buffer, new in ((self.pooled_keys, k), (self.pooled_values, v)):
            assert buffer is not None
            running = _running(new, buffer[:, :, first % room], seen % RATE, self.maximum)
            parts.append(torch.cat([buffer.index_select(2, before % room), running], 2))
            last = (groups[1:] != groups[:-1]).nonzero()[:, 0]  # where a group ends, and where the tokens do
            last = torch.cat([last, last.new_tensor([len(groups) - 1])])[-room:]
            buffer.index_copy_(2, groups[last] % room, running[:, :, last])
        mine = groups[:, None]
        whole = (numbers % RATE == RATE - 1) & (groups < mine) & (groups > mine - room)
        itself = torch.eye(len(numbers), dtype=torch.bool, device=device)
        mask = torch.cat([(before > mine - room).expand(len(numbers), -1), whole | itself], 1)
        return parts[0], parts[1], mask[None]


def _running(x: Tensor, begun: Tensor, count: int, maximum: bool) -> Tensor:
    """x [B, M, E, H] pooled from the beginning of each group of RATE up to each token; the first group goes on from
    `begun` [B, M, H], the pool of `count` tokens."""
    front = begun[:, :, None].expand(-1, -1, count, -1)  # as many copies of a pool are pooled to itself
    tokens = count + x.shape[2]
    padded = torch.cat([front, x, x[:, :, -1:].expand(-1, -1, -tokens % RATE, -1)], 2)
    grouped = padded.unflatten(2, (-1, RATE))
    if maximum:
        pooled = grouped.cummax(3).values
    else:
        sizes = torch.arange(1, RATE + 1, device=x.device)[:, None]
        pooled = (grouped.float().cumsum(3) / sizes).to(x.dtype)
    return pooled.flatten(2, 3)[:, :, count:tokens]
