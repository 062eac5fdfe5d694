"""The memory of one attention layer: how it reads, writes and stores.

Letters: B batch, T tokens, D hidden size, N query heads, M key/value heads, H head size, G gate inputs, S sinks,
W window; R rows of positions: 1 where all of the batch are at the same position, else B.

Token t pushes token t - W out of the window, from t = S + W on: it is written into the state, then the state is read
with query t. Writes and reads of many tokens are therefore two aligned slices, W tokens apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ahn import cells
from ahn.cells.base import Cell, Gates
from ahn.config import AHNConfig
from ahn.errors import UnsupportedModelError
from ahn.memory import dense
from ahn.memory.buffer import LayerMemory
from ahn.memory.calls import Full
from ahn.memory.leaving import Leaving, Turn
from ahn.memory.span import FOREVER, Span
from ahn.ops import dispatch, flex
from ahn.ops.banded import attend_one, attend_window
from ahn.ops.rotary import Rotary
from ahn.ops.shift import Shift
from ahn.ops.softmax import Softmax, merge_all
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
    """The memory of one attention layer, and the cell's weights.

    `cell` None: sinks and window only. `window` None: full attention.
    """

    def __init__(self, attention: Any, config: AHNConfig, rotary: Rotary | None) -> None:
        super().__init__()
        kept = config.layers is None or attention.layer_idx in config.layers
        self.window = config.window if kept else None
        self.sinks = config.sinks if kept else 0
        turned = kept and getattr(attention, "use_rope", True)  # some bases leave positions out of some layers
        self.rotary = [rotary if turned else None]  # in a list: the base's rotary module is not ours to register
        self.clips_sinks = config.sink_positions == "clipped"
        self.turns_back = config.memory_positions == "none"
        self.cell: Cell | None = None
        self.store: Store | None = None  # of a `StoringLayer`
        if kept and config.cell is not None:
            heads, size = heads_of(attention)
            weight = attention.o_proj.weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            if dtype.itemsize == 1:  # 8-bit floats are for storing, the base computes in another dtype
                dtype = attention.config.dtype or torch.float32
            self.cell = cells.get(config.cell)(attention.config.hidden_size, heads, size, dtype, weight.device)
            self.cell.extend(config.key_maps, config.make_room)
        self.full: dict[int, Full] = {}  # by thread, within `full_attention`

    @property
    def has_far(self) -> bool:
        """Whether anything behind the window is attended."""
        return self.sinks > 0

    @property
    def lossless(self) -> int:
        """Tokens kept exactly."""
        return self.sinks + (self.window or FOREVER)

    def memory(self) -> LayerMemory:
        """An empty memory for a new cache."""
        return LayerMemory(self.window, self.sinks, self.gate_width)

    def steps_on_device(self, span: Span) -> bool:
        """Whether the one token a row of `span` can do without the host (`ahn.engine.graph`)."""
        return True

    def due(self, span: Span) -> bool:
        """Whether the layer does something after it that few positions ask for: such steps are a graph of their own."""
        return False

    @property
    def gate_width(self) -> int:
        """Numbers kept of each token in the window for its gates: G * N."""
        return 0 if self.cell is None else self.cell.num_gates * self.cell.num_heads

    @property
    def state_shape(self) -> tuple[int, int, int] | None:
        """N, K, H of the state, or None."""
        return None if self.cell is None else (self.cell.num_heads, self.cell.key_size, self.cell.head_dim)

    def compile_for_training(self) -> None:
        """Compile what surrounds the kernels; shapes do not depend on sinks and window, so it happens once."""
        self._turn = torch.compile(self._turn)  # type: ignore[method-assign]
        if self.cell is not None:
            self._prepare_shifted = torch.compile(self._prepare_shifted)  # type: ignore[method-assign]
            self._combine = torch.compile(self._combine)  # type: ignore[method-assign]
            if type(self.cell).chunk is not Cell.chunk:  # the naive form is a loop over all tokens
                self.cell.chunk = torch.compile(self.cell.chunk)  # type: ignore[method-assign]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, span: Span, memory: LayerMemory | None, scale: float
    ) -> Tensor:
        """q [B, N, T, H], k, v [B, M, T, H], x [B, T, D] of the tokens of `span` -> what o_proj reads, [B, T, N, H].

        Without a `memory` the span is a whole sequence, nothing is stored, and gradients flow.
        """
        with dispatch.on(q.device):
            if memory is not None and memory.observer is not None and not span.on_device:
                memory.observer(self, q, k, span)
            return self._forward(q, k, v, x, span, memory, scale)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, span: Span, memory: LayerMemory | None, scale: float
    ) -> Tensor:
        if memory is not None and span.length == 1 and not span.padded:
            memory.reserve(max(span.after()), k, self.state_shape)
            return self._one(q, k, v, x, span, memory, scale)
        q, k, v = (span.compact(t, 2) for t in (q, k, v))
        x = span.compact(x, 1)
        inputs = None if self.cell is None else self.cell.gate_inputs(x)
        if memory is None:
            out = self._whole(q, k, v, x, inputs, span, scale)
        else:
            memory.reserve(max(span.after()), k, self.state_shape)
            out = self._many(q, k, v, x, inputs, span, memory, scale)
        return span.restore(out, 1)

    def _whole(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, inputs: Tensor | None, span: Span, scale: float
    ) -> Tensor:
        """A whole sequence, in shapes that do not depend on sinks and window."""
        q_sinks = self._seen_by_sinks(q, span)
        kernel = dispatch.whole_sequence(q.device.type, q.shape[-1], q.shape[2])
        if not span.padded and self.window is not None and kernel.name == "flex":
            out, norm = flex.attend_sequence(q, q_sinks, k, v, self.sinks, self.window, scale)
        else:
            sinks = k[:, :, : self.sinks], v[:, :, : self.sinks]
            start = span.start_on(q.device)
            out, norm = attend_window(q, q_sinks, sinks, (k, v), start, self.window or FOREVER, scale)
        out = out.transpose(1, 2)
        if self.cell is None or inputs is None or max(span.counts) <= self.sinks + (self.window or FOREVER):
            return out
        leaving = self._leaving(span, q.device)
        fla = self.cell.uses_fla(q)
        ready = self._prepare_shifted(q, k, v, inputs, leaving, fla)
        state = torch.zeros(len(q), *(self.state_shape or ()), device=q.device)
        read, _ = self.cell.run(*ready, state, fla)
        return self._combine(out, norm, read, x, leaving)

    def _many(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        inputs: Tensor | None,
        span: Span,
        memory: LayerMemory,
        scale: float,
    ) -> Tensor:
        """The next tokens of sequences that are remembered."""
        alike = not span.padded and len(span.start) == 1
        in_parts = not dispatch.window_in_one(q, self.window or FOREVER) and dispatch.attention(q).name != "torch"
        if alike and in_parts:
            return self._dense(q, k, v, x, inputs, span, memory, scale)
        (out, norm), window = self._attend_many(q, k, v, inputs, span, memory, scale)
        out, reach = out.transpose(1, 2), self.window or FOREVER
        first = max(0, self.sinks + reach - span.first)  # that pushes a token out
        tokens = span.length - first
        if self.cell is None or tokens <= 0:
            return out
        leaving = self._leaving(span, q.device, first)
        oldest = window[0].shape[2] - span.length + first - reach
        k, v = (t[:, :, oldest : oldest + tokens] for t in window[:2])
        inputs = window[2][:, oldest : oldest + tokens]
        fla = self.cell.uses_fla(q)
        ready = self._prepare(q[:, :, first:], k, v, inputs, leaving, fla)
        read, state = self.cell.run(*ready, memory.compressed, fla)
        memory.compressed.copy_(state)
        combined = self._combine(out[:, first:], norm[:, :, first:], read, x[:, first:], leaving)
        return torch.cat([out[:, :first], combined], 1) if first else combined

    def _dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        inputs: Tensor | None,
        span: Span,
        memory: LayerMemory,
        scale: float,
    ) -> Tensor:
        """`_many` of rows that are all at one position, none of them padding: the ring is read where it lies."""
        q_sinks = self._seen_by_sinks(q, span)
        outs, low = [], 0
        for piece in dense.pieces(span, self.sinks, self.window):
            part = slice(low, low + piece.length)
            new = tuple(t[:, :, part] for t in (k, v)) + ((inputs[:, part],) if inputs is not None else ())
            queries = q[:, :, part]
            (out, norm), old = dense.attend_piece(queries, q_sinks[:, :, part], new, memory, piece, scale, self._merge)
            out = out.transpose(1, 2)
            if old is not None and self.cell is not None:
                leaving = self._leaving(piece, q.device)
                fla = self.cell.uses_fla(q)
                ready = self._prepare(queries, old[0], old[1], old[2], leaving, fla)
                found, state = self.cell.run(*ready, memory.compressed, fla)
                memory.compressed.copy_(state)
                out = self._combine(out, norm, found, x[:, part], leaving)
            outs.append(out)
            low += piece.length
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def _attend_many(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Tensor | None,
        span: Span,
        memory: LayerMemory,
        scale: float,
    ) -> tuple[Softmax, tuple[Tensor, ...]]:
        """Store the tokens and attend to sinks and window; also returns keys, values and gate inputs of the window
        before the span and of the span, in order."""
        new = tuple(t for t in (k, v, inputs) if t is not None)
        old = memory.window_before(span)
        window = tuple(torch.cat(pair, dim=1 if pair[0].dim() == 3 else 2) for pair in zip(old, new, strict=True))
        memory.put(span, k, v, inputs)
        keys, values = memory.kept
        sinks = keys[:, :, : self.sinks], values[:, :, : self.sinks]
        start, reach = span.start_on(q.device), self.window or FOREVER
        q_sinks = self._seen_by_sinks(q, span)
        return attend_window(q, q_sinks, sinks, (window[0], window[1]), start, reach, scale), window

    def _one(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, span: Span, memory: LayerMemory, scale: float) -> Tensor:
        """One token a row, none of them padding: the ring is read where it lies."""
        inputs = None if self.cell is None else self.cell.gate_inputs(x)
        form, writes = None, span.first >= self.lossless and (span.on_device or self.steps_on_device(span))
        if self.cell is not None and writes and dispatch.one_token(q.device.type).name == "triton":
            form = self.cell.step_form()
        found, old = self._attend_one(q, k, v, x, inputs, span, memory, scale, form is not None)
        if form is not None:
            return self._one_fused(form, found, q, old, x, self._leaving(span, q.device), memory.compressed)
        out, norm = found
        out = out.transpose(1, 2)
        if self.cell is None or span.first < self.lossless:
            return out
        leaving = self._leaving(span, q.device)
        ready = self._prepare(q, old[0], old[1], old[2], leaving, fla=False)
        read = self.cell.step(*ready, memory.compressed)
        return self._combine(out, norm, read, x, leaving)

    def _one_fused(
        self,
        form: Any,
        parts: Any,
        q: Tensor,
        old: tuple[Tensor, ...],
        x: Tensor,
        leaving: Leaving,
        state: Tensor,
    ) -> Tensor:
        """Merge, write, read and combine by `ahn.ops.kernels.decode`; what goes beyond the paper stays plain torch."""
        from ahn.ops.kernels import decode

        assert self.cell is not None
        (k, v, inputs), writes = old, leaving.writes
        q, k = self._turn_back(q, k, leaving)
        mapped = self.cell.q_map is not None
        if mapped:
            q, k = self.cell.keys(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        read = decode.recur(form, q, k, v, inputs, writes, state, not mapped, parts)
        out, norm = parts.out.transpose(1, 2), parts.norm
        if self.cell.room is not None:
            room = out * self.cell.room(x, norm, leaving.evicted).to(out.dtype)
            out = room if writes is None else torch.where(writes[..., None, None], room, out)
        return decode.add_read(form, out, read, form.gate(x), self.cell.o_proj.weight, writes)

    def _attend_one(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        inputs: Tensor | None,
        span: Span,
        memory: LayerMemory,
        scale: float,
        in_parts: bool = False,
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """`_attend_many` for one token a row; also returns what it pushes out, if it does. `in_parts`: as
        `attend_one`."""
        old = self._exchange(k, v, inputs, span, memory)
        filled = min(span.first + 1, memory.capacity)
        last = span.start_on(q.device) if len(span.start) > 1 or span.on_device else None
        keys, values = (t[:, :, :filled] for t in memory.kept)
        return attend_one(q, self._seen_by_sinks(q, span), keys, values, self.sinks, last, scale, in_parts), old

    def _exchange(
        self, k: Tensor, v: Tensor, inputs: Tensor | None, span: Span, memory: LayerMemory
    ) -> tuple[Tensor, ...]:
        """Put one token a row into the ring, in the place of the one that it pushes out: returns that if there is one,
        keys, values [B, M, 1, H] and gate inputs [B, 1, G * N]."""
        if span.on_device and dispatch.one_token(k.device.type).name == "triton":
            from ahn.ops.kernels import decode

            return decode.exchange(memory, span.start, k, v, inputs)
        pushes = self.window is not None and span.first >= self.sinks + self.window
        return memory.exchange(memory.slots(span.start), k, v, inputs, old=pushes)

    def _leaving(self, span: Span, device: torch.device, first: int = 0) -> Leaving:
        return span.once(("leaving", self.rotary[0] is None, device), lambda: self._make_leaving(span, device, first))

    def _make_leaving(self, span: Span, device: torch.device, first: int) -> Leaving:
        assert self.window is not None
        positions = span.positions(device)[:, first:]
        evicted = (positions - self.lossless + 1).clamp(min=1)
        writes = None
        if span.on_device or min(span.counts) < span.length or int(span.start.min()) + first < self.lossless:
            writes = (positions >= self.lossless) & span.real(device)[:, first:]
        angles, (rotary,) = None, self.rotary
        if self.turns_back and rotary is not None:
            angles = rotary.angles(-positions), self._turn_of_leaving(rotary, positions)
        return Leaving(writes, evicted, torch.full((), self.window, device=device), angles)

    def _turn_of_leaving(self, rotary: Rotary, positions: Tensor) -> Turn | None:
        """The turn of the keys that leave at `positions` [R, T] back to where nothing has a position."""
        assert self.window is not None
        return rotary.angles(self.window - positions)

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Tensor, leaving: Leaving, fla: bool
    ) -> tuple[Tensor, Tensor, Tensor, Gates]:
        """What the cell's kernel takes, from queries and the keys, values and gate inputs that leave with them."""
        assert self.cell is not None
        q, k = self._turn_back(q, k, leaving)
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        gates = self.cell.gates(inputs)
        if leaving.writes is not None:
            gates = tuple(gate * leaving.writes[:, None] for gate in gates)
        return self.cell.ready(q, k, v, gates, fla)

    def _turn_back(self, q: Tensor, k: Tensor, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Queries and keys that leave, without positions if the cell is not to see any."""
        (rotary,) = self.rotary
        if leaving.angles is None or rotary is None:
            return q, k
        now, then = leaving.angles
        return rotary.turn(q, now), k if then is None else rotary.turn(k, then)

    def _prepare_shifted(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Tensor, leaving: Leaving, fla: bool
    ) -> tuple[Tensor, Tensor, Tensor, Gates]:
        """`_prepare` with all tokens of a sequence: each query beside what it pushes out."""
        k, v = Shift.apply(k, leaving.window, 2), Shift.apply(v, leaving.window, 2)
        return self._prepare(q, k, v, Shift.apply(inputs, leaving.window, 1), leaving, fla)

    def _combine(self, out: Tensor, norm: Tensor, read: Tensor, x: Tensor, leaving: Leaving) -> Tensor:
        """Attention and memory; attention alone where nothing has left yet."""
        assert self.cell is not None
        with_memory = self.cell.combine(out, norm, read, x, leaving.evicted)
        return with_memory if leaving.writes is None else torch.where(leaving.writes[..., None, None], with_memory, out)

    def sink_angles(self, span: Span, device: torch.device) -> Turn | None:
        """What turns the queries of `span` to where the sinks meet them: with clipped positions, never further than
        sinks + window. None: nothing does."""
        (rotary,) = self.rotary
        if rotary is None or not self.clips_sinks or not self.has_far or self.window is None:
            return None
        furthest = self.sinks + self.window
        if span.first + span.length - 1 <= furthest:
            return None
        positions = span.positions(device)
        angles = span.once("sinks", lambda: rotary.angles(positions.clamp(max=furthest) - positions))
        cos, sin = (t.to(device) for t in angles)
        return cos, sin

    def _seen_by_sinks(self, q: Tensor, span: Span) -> Tensor:
        """The queries as the sinks meet them."""
        angles, (rotary,) = self.sink_angles(span, q.device), self.rotary
        return q if angles is None or rotary is None else self._turn(rotary, q, angles)

    def without_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys [B, M, T, H] of tokens at `positions` [R, T], as they were before their rotation."""
        (rotary,) = self.rotary
        return x if rotary is None else rotary.turn_by(x, -positions)

    def at_distance(self, q: Tensor, distance: int) -> Tensor:
        """Queries [B, N, T, H] without positions as they see keys without positions that many tokens before them."""
        (rotary,) = self.rotary
        return q if rotary is None else rotary.turn_by(q, torch.full((1, 1), distance, device=q.device))

    def _turn(self, rotary: Rotary, q: Tensor, angles: Turn) -> Tensor:
        return rotary.turn(q, angles)

    def _merge(self, parts: list[Softmax], early: Softmax | None) -> Softmax:
        return merge_all(parts, early)
