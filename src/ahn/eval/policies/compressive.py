"""Compressive Transformer (arXiv 1911.05507), the paper's other baseline: evicted keys and values are pooled.

Letters: B batch, N query heads, M key/value heads, H head size, T tokens, E of them that push another one out,
C slots of the buffer; R rows of positions: 1 where all of the batch are at the same position, else B.

Tokens that leave the window are pooled four at a time, keys and values alike and after their rotary positions, into a
first-in-first-out buffer that is attended like the rest. Evicted token e belongs to group e // 4, which lies in slot
(e // 4) mod C; an incomplete group is the pool of its tokens so far, so that nothing vanishes and a prompt read
in pieces of any size is read alike. C is as many slots as fit into the bytes of the cell under comparison: its state
and the gates of the lossless tokens (the paper: "size matched to the state").
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ahn.cost import Shape, cell_bytes, cost
from ahn.errors import ConfigError, UnsupportedOperationError
from ahn.eval.kept import Kept, exact_part, memory_part, trained
from ahn.eval.policies.base import Policy
from ahn.hf.augment import augment
from ahn.memory.batch import LayerBatch
from ahn.memory.buffer import LayerMemory
from ahn.memory.evicted import Evicted, Evictions
from ahn.memory.handle import layers_of
from ahn.memory.positions import Sizes
from ahn.memory.tier import LastTier
from ahn.ops.softmax import AttentionOutput, attend, merge

RATE = 4  # tokens in one slot, as in the paper


class Compressive(Policy):
    """Sinks, window, and a buffer of pooled keys and values. Subclasses choose how four tokens are pooled."""

    needs_adapter = True
    maximum: ClassVar[bool]

    @classmethod
    def settings(cls, kept: Kept) -> dict[str, Any]:
        assert kept.adapter is not None
        found = super().settings(kept)
        config = trained(kept.adapter).config
        like = f"{config.cell}, key_maps {config.feature_maps}" if config.feature_maps > 1 else config.cell
        return found | {"rate": RATE, "sized_like": like}

    def prepare(self) -> None:
        config = memory_part(self.kept)
        shape, element = Shape.from_config(self.model.config), self.model.dtype.itemsize
        budget = cell_bytes(shape, config, config.lossless, element)
        self.slots = budget // (2 * shape.M * shape.H * element)
        if not self.slots:
            raise ConfigError(f"the {config.cell} cell holds {budget} bytes a layer, less than one slot of pooled keys")
        augment(self.model, exact_part(self.kept))
        for layer in layers_of(self.model):
            if layer.window is not None:
                layer.last = PooledTier(self.slots, self.maximum)

    def cache_bytes(self, tokens: int) -> int:
        exact = super().cache_bytes(tokens)
        if tokens <= self.kept.window + self.kept.sinks:
            return exact
        pooled = sum(isinstance(layer.last, PooledTier) for layer in layers_of(self.model))
        return exact + pooled * self.slots * 2 * self.shape.M * self.shape.H * self.model.dtype.itemsize

    def flops(self, tokens: int) -> tuple[int, int]:
        found = cost(self.shape, tokens, self.model.ahn_config)
        pooled = self.shape.layers * 4 * found.written * min(self.slots, -(-found.written // RATE))
        pooled *= self.shape.H * self.shape.N
        return found.mixing.memory + pooled, found.flops.memory + pooled


class PooledTier(LastTier):
    """Pools evicted tokens into `slots` slots, to which queries attend. With a cache only.

    Args:
        maximum: pool by the maximum, else by the mean.
    """

    steps_on_device = False

    def __init__(self, slots: int, maximum: bool) -> None:
        self.slots, self.maximum = slots, maximum

    def memory(self, sizes: Sizes) -> LayerMemory:
        assert sizes.window is not None
        return CompressiveMemory(sizes.window, sizes.sinks, self.slots, self.maximum)

    def absorb(
        self, attended: AttentionOutput, new: LayerBatch, evicted: Evicted, evictions: Evictions, memory: LayerMemory
    ) -> Tensor:
        assert isinstance(memory, CompressiveMemory)
        host, count = torch.device("cpu"), evicted.k.shape[2]
        numbers = new.batch.positions(host)[:, -count:] - memory.lossless
        leaves = (numbers >= 0) & new.batch.real(host)[:, -count:]
        pooled = attend(new.q, *memory.absorb(evicted.k, evicted.v, numbers, leaves), new.scale)
        return merge(attended, pooled)[0].transpose(1, 2)

    def read_sequence(self, new: LayerBatch, evictions: Evictions) -> Tensor:
        raise UnsupportedOperationError("the compressive baseline reads texts through its own cache")


class CompressiveMemory(LayerMemory):
    """Sinks, window, and `pooled_keys`, `pooled_values` [B, M, C, H]."""

    def __init__(self, window: int, sinks: int, slots: int, maximum: bool) -> None:
        super().__init__(window, sinks, 0)
        self.room, self.maximum = slots, maximum
        self.pooled_keys: Tensor | None = None
        self.pooled_values: Tensor | None = None

    @property
    def lossless(self) -> int:
        assert self.window is not None
        return self.sinks + self.window

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

    def absorb(self, k: Tensor, v: Tensor, numbers: Tensor, leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool tokens k, v [B, M, E, H] that leave one after the other.

        Args:
            numbers: [R, E] on the CPU, how many left before each. leaves: bool [R, E], false for those that do not.

        Returns:
            keys and values [B, M, C + E, H], and which of them the query sees that pushes out the i-th, bool
            [R, E, C + E]: of the buffer as it was before, and of the groups that these tokens complete or begin.
        """
        room, device = self.room, k.device
        first, last = numbers[:, :1].clamp(min=0) // RATE, numbers.where(leaves, -1).amax(1, keepdim=True)
        ends = leaves & ((numbers % RATE == RATE - 1) | (numbers == last)) & (numbers // RATE > last // RATE - room)
        rows, tokens = (index.to(device) for index in ends.nonzero(as_tuple=True))
        begun, slots = (first[:, 0] % room).to(device), (numbers[ends] // RATE % room).to(device)
        numbers, leaves, first = (t.to(device) for t in (numbers, leaves, first))
        every = torch.arange(len(k), device=device)
        parts = []
        for buffer, new in ((self.pooled_keys, k), (self.pooled_values, v)):
            assert buffer is not None
            running = _running(new, buffer[every, :, begun], numbers % RATE, self.maximum)
            parts.append(torch.cat([buffer, running], 2))
            if len(numbers) == 1:
                buffer.index_copy_(2, slots, running[:, :, tokens])
            else:
                buffer[rows, :, slots] = running[rows, :, tokens]
        groups = numbers // RATE
        mine = groups[..., None]
        held = first - 1 - (first - 1 - torch.arange(room, device=device)) % room  # group in each slot, [R, C]
        before = ((held >= 0)[:, None] & (held[:, None] > mine - room)).expand(-1, k.shape[2], -1)
        whole = (numbers % RATE == RATE - 1)[:, None] & (groups[:, None] < mine) & (groups[:, None] > mine - room)
        itself = torch.eye(k.shape[2], dtype=torch.bool, device=device)
        mask = torch.cat([before, (whole & leaves[:, None]) | itself], 2) & leaves[..., None]
        return parts[0], parts[1], mask


def _running(x: Tensor, begun: Tensor, places: Tensor, maximum: bool) -> Tensor:
    """x [B, M, E, H] pooled from the beginning of each group of RATE up to each token, whose places in their groups are
    `places` [R, E]; the first group goes on from `begun` [B, M, H], the pool of its tokens so far."""
    front = begun[:, :, None].expand(-1, -1, RATE - 1, -1)  # as many copies of a pool as it has are pooled to itself
    padded = torch.cat([front, x], 2)
    pooled = x if maximum else x.float()
    for back in range(1, RATE):
        mine = (places >= back)[:, None, :, None]
        other = padded[:, :, RATE - 1 - back : padded.shape[2] - back]
        pooled = torch.where(mine, pooled.maximum(other) if maximum else pooled + other, pooled)
    return pooled if maximum else (pooled / (places + 1)[:, None, :, None]).to(x.dtype)
