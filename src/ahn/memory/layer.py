"""The memory of one attention layer: tiers in a row.

Letters: B batch, T tokens, D hidden size, N query heads, M key/value heads, H head size, G gate inputs, S sinks,
W window; R rows of positions: 1 where all of the batch are at the same position, else B.

Token t evicts token t - W from the window, from t = S + W on. The store, if there is one, takes it and evicts another
one once it is full; the cell writes what the tier above evicts into its state, then query t reads that state. Writes
and reads of many tokens are therefore two aligned slices, W tokens apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ahn import cells, stores
from ahn.cells.base import Cell
from ahn.config import AHNConfig
from ahn.errors import ConfigError, UnsupportedModelError
from ahn.memory import dense
from ahn.memory.batch import ForwardBatch, LayerBatch
from ahn.memory.buffer import LayerMemory
from ahn.memory.calls import Full
from ahn.memory.cell_tier import CellTier
from ahn.memory.evicted import Evicted
from ahn.memory.positions import Positions, Sizes, rotate
from ahn.memory.store_tier import StoreTier
from ahn.memory.tier import KeptTier, LastTier
from ahn.ops import dispatch, flex
from ahn.ops.banded import attend_one, attend_window
from ahn.ops.rotary import Rotary
from ahn.ops.softmax import AttentionOutput, merge_all
from ahn.ops.specs import Queries, Window
from ahn.stores.base import Store


def heads_of(attention: Any) -> tuple[int, int]:
    """Query heads and head size of an attention module."""
    heads, size = attention.config.num_attention_heads, attention.head_dim
    width = getattr(attention.o_proj, "in_features", heads * size)
    if width != heads * size:
        raise UnsupportedModelError(
            f"o_proj reads {width} numbers, not {heads} heads x {size}: the values' head size differs from the queries'"
        )
    return heads, size


class AHNLayer(nn.Module):
    """The memory of one attention layer, with the weights of its cell and of its store.

    A layer that the config leaves out has full attention (`window` None) and no other tier.
    """

    def __init__(self, attention: Any, config: AHNConfig, rotary: Rotary | None) -> None:
        super().__init__()
        kept = config.layers is None or attention.layer_idx in config.layers
        self.sizes = Sizes(config.window, config.sinks, config.store_size) if kept else Sizes(None, 0, 0)
        rotated = kept and getattr(attention, "use_rope", True)  # some bases leave positions out of some layers
        self.positions = Positions(
            self.sizes,
            rotary if rotated else None,
            clips_kept=config.sink_positions == "clipped",
            unrotates=config.memory_positions == "none",
        )
        self.cell = _cell(attention, config) if kept and config.cell is not None else None
        self.store = _store(attention, config) if kept and config.store is not None else None
        self.last: LastTier | None = None if self.cell is None else CellTier(self.cell, self.positions)
        self.kept: KeptTier | None = None
        if self.store is not None:
            self.kept = StoreTier(self.store, config.store_span, self.positions, self.cell)
        self.merge: dense.Merge = merge_all  # a compiled form may take its place
        self.full: dict[int, Full] = {}  # by thread, within `full_attention`

    @property
    def window(self) -> int | None:
        """W, or None: full attention."""
        return self.sizes.window

    @property
    def sinks(self) -> int:
        return self.sizes.sinks

    @property
    def lossless(self) -> int:
        """Tokens kept exactly."""
        return self.sizes.lossless

    @property
    def gate_width(self) -> int:
        """Numbers kept of each token in the window for its gates: G * N."""
        return 0 if self.last is None else self.last.gate_width

    @property
    def state_shape(self) -> tuple[int, int, int] | None:
        """N, K, H of the state, or None."""
        return None if self.last is None else self.last.state_shape

    def resize(self, window: int, sinks: int, store_size: int) -> None:
        """Other sizes from now on, for new memories and whole sequences; nothing in a layer with full attention."""
        if self.window is not None:
            self.sizes.window, self.sizes.sinks = window, sinks
            self.sizes.store = store_size if self.kept is not None else 0

    def memory(self) -> LayerMemory:
        """An empty memory for a new cache."""
        if self.kept is not None:
            return self.kept.memory(self.gate_width)
        last = LastTier() if self.last is None else self.last
        return last.memory(self.sizes)

    @property
    def steps_on_device(self) -> bool:
        """Whether one token a row can do without the host (`ahn.engine.graph`)."""
        return self.last is None or self.last.steps_on_device

    def is_full(self, batch: ForwardBatch) -> bool:
        """Whether each row of `batch` has a full store, or none: kernels of one token look for no empty slot."""
        return self.kept is None or self.kept.is_full(batch)

    def is_periodic(self, batch: ForwardBatch) -> bool:
        """Whether work that few positions ask for follows the one token a row of `batch`: such steps are a graph of
        their own."""
        return self.kept is not None and self.kept.is_periodic(batch)

    def compile_for_training(self) -> None:
        """Compile the steps around the kernels. Not with a store: who is evicted depends on the data."""
        if self.kept is not None:
            return
        self.positions.rotate = torch.compile(rotate)
        if self.last is not None:
            self.last.compile_for_training()

    def forward(self, new: LayerBatch, memory: LayerMemory | None) -> Tensor:
        """The input of o_proj, [B, T, N, H].

        Without a `memory` the batch is a whole sequence, nothing is stored, and gradients flow.
        """
        with dispatch.on(new.q.device):
            if memory is not None and memory.observer is not None and not new.batch.on_device:
                memory.observer(self, new.q, new.k, new.batch)
            return self._forward(new, memory)

    def _forward(self, new: LayerBatch, memory: LayerMemory | None) -> Tensor:
        batch = new.batch
        if memory is not None and batch.length == 1 and not batch.padded:
            memory.reserve(max(batch.after()), new.k, self.state_shape)
            return self._one(self._with_gate_inputs(new), memory)
        new = self._with_gate_inputs(new.compact())
        if memory is None:
            out = self._sequence(new)
        else:
            memory.reserve(max(batch.after()), new.k, self.state_shape)
            out = self._many(new, memory)
        return batch.restore(out, 1)

    def _with_gate_inputs(self, new: LayerBatch) -> LayerBatch:
        return new if self.last is None else new._replace(gate_inputs=self.last.gate_inputs(new.x))

    # A whole sequence, in shapes that do not depend on sinks and window.
    def _sequence(self, new: LayerBatch) -> Tensor:
        batch, read = new.batch, None
        new = new._replace(q_kept=self.positions.of_kept(new.q, batch))
        evicts = self.last is not None and max(batch.counts) > self.lossless
        if self.kept is not None:
            evictions = self.positions.evictions(batch, new.q.device) if evicts else None
            attended, read = self.kept.sequence(new, self.last, evictions)
        else:
            attended = self._attend_sequence(new)
            evictions = self.positions.evictions(batch, new.q.device) if evicts else None
            if self.last is not None and evictions is not None:
                read = self.last.read_sequence(new, evictions)
        if self.last is None or read is None or evictions is None:
            return attended[0].transpose(1, 2)
        return self.last.combine_sequence(attended, read, new, evictions)

    def _attend_sequence(self, new: LayerBatch) -> AttentionOutput:
        q, k, v, sizes = new.q, new.k, new.v, self.sizes
        kernel = dispatch.pick_whole_sequence(q.device.type, q.shape[-1], q.shape[2])
        if not new.batch.padded and sizes.window is not None and kernel.name == "flex":
            return flex.attend_sequence(new.queries, k, v, Window(sizes.window, sizes.sinks))
        sinks = k[:, :, : sizes.sinks], v[:, :, : sizes.sinks]
        start, window = new.batch.start_on(q.device), Window(sizes.reach, sinks[0].shape[2])
        return attend_window(new.queries, sinks, (k, v), start, window)

    # The next tokens of sequences that are remembered.
    def _many(self, new: LayerBatch, memory: LayerMemory) -> Tensor:
        batch, outs = new.batch, []
        if self._reads_ring(new):
            new = new._replace(q_kept=self.positions.of_kept(new.q, batch))
            parts, attend = dense.cuts(batch, self.sinks, self.window), self._attend_ring
        else:
            parts, attend = batch.on_grid(0 if self.kept is None else self.kept.grid), self._attend_window
        for at, part in parts:
            piece = new.part(at, part)
            attended, evicted = attend(piece, memory)
            outs.append(self._absorb(attended, piece, evicted, memory))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def _reads_ring(self, new: LayerBatch) -> bool:
        """Whether the ring is attended where it lies, in dense parts: rows all at one position, and no padding."""
        if self.kept is not None or new.batch.padded or len(new.batch.start) > 1:
            return False
        return not dispatch.window_in_one(new.q, self.sizes.reach) and dispatch.pick_attention(new.q).name != "torch"

    def _attend_ring(self, new: LayerBatch, memory: LayerMemory) -> tuple[AttentionOutput, Evicted | None]:
        attended, evicted = dense.attend_piece(new, memory, self.merge)
        return attended, None if evicted is None else Evicted(*evicted)

    def _attend_window(self, new: LayerBatch, memory: LayerMemory) -> tuple[AttentionOutput, Evicted | None]:
        """Put the tokens into the tiers that keep them and attend: the attention, and the tokens evicted by its last
        queries."""
        batch, sizes = new.batch, self.sizes
        window = memory.push(new)
        new = new._replace(q_kept=self.positions.of_kept(new.q, batch))
        put = None if self.kept is None else self.kept.put(new, window, memory)
        (keys, values), start = memory.kept, batch.start_on(new.q.device)
        window_kv = window[0], window[1]
        if put is None:
            sinks = keys[:, :, : sizes.sinks], values[:, :, : sizes.sinks]  # fewer in a short buffer
            seen = Window(sizes.reach, sinks[0].shape[2])
            attended = attend_window(new.queries, sinks, window_kv, start, seen)
        else:
            nothing, seen = (keys[:, :, :0], values[:, :, :0]), Window(sizes.reach, sizes.sinks)
            attended = attend_window(new.queries, nothing, window_kv, start, seen, put.kept)
        first = max(0, sizes.lossless - batch.first)  # that evicts a token
        count = batch.length - first
        if self.kept is not None:
            return attended, None if put is None else self.kept.commit(put, count, memory)
        if count <= 0:
            return attended, None
        oldest = window[0].shape[2] - batch.length + first - sizes.reach
        at = slice(oldest, oldest + count)
        return attended, Evicted(*(t[:, at] if t.dim() == 3 else t[:, :, at] for t in window))

    def _absorb(
        self, attended: AttentionOutput, new: LayerBatch, evicted: Evicted | None, memory: LayerMemory
    ) -> Tensor:
        """Attention, with the memory from the first query on that evicts a token."""
        out, lse = attended
        if self.last is None or evicted is None:
            return out.transpose(1, 2)
        first = new.batch.length - evicted.k.shape[2]
        evictions = self.positions.evictions(new.batch, new.q.device, first)
        late = (out[:, :, first:], lse[:, :, first:]), new.part(slice(first, None), new.batch)
        combined = self.last.absorb(*late, evicted, evictions, memory)
        if self.kept is not None:
            self.kept.after(new, memory)
        return torch.cat([out.transpose(1, 2)[:, :first], combined], 1) if first else combined

    # One token a row, none of them padding: the ring is read where it lies.
    def _one(self, new: LayerBatch, memory: LayerMemory) -> Tensor:
        batch, device, form = new.batch, new.q.device, None
        full = batch.first >= self.lossless
        if self.last is not None and full and self.is_full(batch):
            form = self.last.pick_step_form(device)
        evicted = memory.push_one(new)
        if self.kept is not None:
            evicted = self.kept.put_one(new, evicted, memory)
        attended = self._attend_one(new, memory, form is not None)
        if self.last is not None and full:
            evictions = self.positions.evictions(batch, device)
            out = self.last.absorb_one(attended, new, Evicted(*evicted), evictions, memory, form)
        else:
            out = attended[0].transpose(1, 2)
        if self.kept is not None:
            self.kept.after_one(new, memory)
        return out

    def _attend_one(self, new: LayerBatch, memory: LayerMemory, in_parts: bool) -> Any:
        """Arguments and result as of `attend_one`."""
        if self.kept is not None:
            return self.kept.attend_one(new, memory, in_parts)
        batch = new.batch
        filled = min(batch.first + 1, memory.capacity)
        all_full = not batch.on_device and int(batch.start.min()) + 1 >= filled
        last = None if all_full else batch.start_on(new.q.device)
        keys, values = (t[:, :, :filled] for t in memory.kept)
        queries = Queries(new.q, self.positions.of_kept(new.q, batch), new.scale)
        return attend_one(queries, keys, values, self.sinks, last, in_parts)

    # For the heads that find passages (`ahn.recall`).
    def without_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys [B, M, T, H] of tokens at `positions` [R, T], as they were before their rotation."""
        rotary = self.positions.rotary
        return x if rotary is None else rotary.rotate_by(x, -positions)

    def at_distance(self, q: Tensor, distance: int) -> Tensor:
        """Queries [B, N, T, H] without positions as they see keys without positions that many tokens before them."""
        rotary = self.positions.rotary
        return q if rotary is None else rotary.rotate_by(q, torch.full((1, 1), distance, device=q.device))


def _cell(attention: Any, config: AHNConfig) -> Cell:
    heads, size = heads_of(attention)
    weight = attention.o_proj.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    if dtype.itemsize == 1:  # 8-bit floats are for storing, the base computes in another dtype
        dtype = attention.config.dtype or torch.float32
    assert config.cell is not None
    cell = cells.get(config.cell)(attention.config.hidden_size, heads, size, dtype, weight.device)
    cell.extend(config.feature_maps, config.window_gate)
    return cell


def _store(attention: Any, config: AHNConfig) -> Store:
    assert config.store is not None
    kind, base = stores.get(config.store), attention.config
    if kind.reads_state and config.cell is None:
        raise ConfigError("{store} asks what the cell does not know: expected a cell", store=config.store)
    kv_heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    return kind(base.hidden_size, kv_heads, attention.layer_idx, device=attention.o_proj.weight.device)
