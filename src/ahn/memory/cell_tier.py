"""The last tier of a layer: a recurrent cell, which compresses evicted tokens into a state of fixed size.

Letters: B batch, T tokens, D hidden size, N query heads, M key/value heads, H head size, G gate inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ahn.cells.base import Cell, Gates
from ahn.memory.batch import LayerBatch
from ahn.memory.buffer import LayerMemory
from ahn.memory.evicted import Evicted, Evictions
from ahn.memory.positions import Positions
from ahn.memory.tier import LastTier
from ahn.ops import dispatch
from ahn.ops.shift import Shift
from ahn.ops.softmax import AttentionOutput
from ahn.ops.specs import Write

Prepared = tuple[Tensor, Tensor, Tensor, Gates]


@dataclass
class Forms:
    """The steps around a cell's kernels. Compiled and fused forms may take their place."""

    gate_inputs: Callable[[Tensor], Tensor]
    prepare: Callable[[Tensor, Tensor, Tensor, Tensor, Evictions, bool], Prepared]
    prepare_shifted: Callable[[Tensor, Tensor, Tensor, Tensor, Evictions, bool], Prepared]
    combine: Callable[[Tensor, Tensor, Tensor, Tensor, Evictions], Tensor]


class CellTier(LastTier):
    """A cell behind the window, or behind a store. The state lies in `LayerMemory.state`."""

    def __init__(self, cell: Cell, positions: Positions) -> None:
        self.cell, self.positions = cell, positions
        self.gate_width = cell.num_gates * cell.num_heads
        self.state_shape: tuple[int, int, int] = cell.num_heads, cell.key_size, cell.head_dim
        self.forms = Forms(cell.gate_inputs, self.prepare, self.prepare_shifted, self.combine)

    def compile_for_training(self) -> None:
        """Compile the steps around the kernels; no shape depends on sinks and window, so it happens once."""
        self.forms.prepare_shifted = torch.compile(self.prepare_shifted)
        self.forms.combine = torch.compile(self.combine)
        if type(self.cell).chunk is not Cell.chunk:  # the naive form is a loop over all tokens
            self.cell.chunk_form = torch.compile(self.cell.chunk)

    def gate_inputs(self, x: Tensor) -> Tensor:
        return self.forms.gate_inputs(x)

    def absorb(
        self, attended: AttentionOutput, new: LayerBatch, evicted: Evicted, evictions: Evictions, memory: LayerMemory
    ) -> Tensor:
        read, state = self.recur(new.q, evicted, evictions, memory.compressed)
        memory.compressed.copy_(state)
        return self.forms.combine(attended[0].transpose(1, 2), attended[1], read, new.x, evictions)

    def recur(self, q: Tensor, evicted: Evicted, evictions: Evictions, state: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens evicted with queries q [B, N, T, H], read with each: reads [B, N, T, H] and the state."""
        assert evicted.gate_inputs is not None
        fla = self.cell.uses_fla(q)
        ready = self.forms.prepare(q, evicted.k, evicted.v, evicted.gate_inputs, evictions, fla)
        return self.cell.run(*ready, state, fla)

    def pick_step_form(self, device: torch.device) -> Any:
        return self.cell.step_form() if dispatch.pick_one_token(device.type).name == "triton" else None

    def absorb_one(
        self, attended: Any, new: LayerBatch, evicted: Evicted, evictions: Evictions, memory: LayerMemory, form: Any
    ) -> Tensor:
        if form is not None:
            return self._absorb_one_fused(attended, new, evicted, evictions, memory, form)
        assert evicted.gate_inputs is not None
        out, lse = attended
        ready = self.forms.prepare(new.q, evicted.k, evicted.v, evicted.gate_inputs, evictions, False)
        read = self.cell.step(*ready, memory.compressed)
        return self.forms.combine(out.transpose(1, 2), lse, read, new.x, evictions)

    def _absorb_one_fused(
        self, parts: Any, new: LayerBatch, evicted: Evicted, evictions: Evictions, memory: LayerMemory, form: Any
    ) -> Tensor:
        """Merge, write, read and combine by `ahn.ops.kernels.decode`. Parts that the paper does not have stay plain
        torch."""
        from ahn.ops.kernels import decode

        assert evicted.gate_inputs is not None
        writes, x = evictions.writes, new.x
        q, k = self.positions.for_cell(new.q, evicted.k, evictions)
        mapped = self.cell.q_map is not None
        if mapped:
            q, k = self.cell.keys(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        write = Write(k, evicted.v, evicted.gate_inputs, writes)
        read = decode.recur(form, q, write, memory.compressed, not mapped, parts)
        out, lse = parts.out.transpose(1, 2), parts.lse
        if self.cell.room is not None:
            room = out * self.cell.room(x, lse, evictions.total).to(out.dtype)
            out = room if writes is None else torch.where(writes[..., None, None], room, out)
        return decode.add_read(form, out, read, form.gate(x), self.cell.o_proj.weight, writes)

    def read_sequence(self, new: LayerBatch, evictions: Evictions) -> Tensor:
        assert new.gate_inputs is not None
        fla = self.cell.uses_fla(new.q)
        ready = self.forms.prepare_shifted(new.q, new.k, new.v, new.gate_inputs, evictions, fla)
        state = torch.zeros(len(new.q), *self.state_shape, device=new.q.device)
        return self.cell.run(*ready, state, fla)[0]

    def combine_sequence(
        self, attended: AttentionOutput, read: Tensor, new: LayerBatch, evictions: Evictions
    ) -> Tensor:
        return self.forms.combine(attended[0].transpose(1, 2), attended[1], read, new.x, evictions)

    # The plain forms.
    def prepare(self, q: Tensor, k: Tensor, v: Tensor, inputs: Tensor, evictions: Evictions, fla: bool) -> Prepared:
        """The arguments of the cell's kernel, from queries and the keys, values and gate inputs evicted with them."""
        q, k = self.positions.for_cell(q, k, evictions)
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        gates = self.cell.gates(inputs)
        if evictions.writes is not None:
            gates = tuple(gate * evictions.writes[:, None] for gate in gates)
        return self.cell.ready(q, k, v, gates, fla)

    def prepare_shifted(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Tensor, evictions: Evictions, fla: bool
    ) -> Prepared:
        """`prepare` with all tokens of a sequence: each query beside the token it evicts."""
        k, v = Shift.apply(k, evictions.window, 2), Shift.apply(v, evictions.window, 2)
        return self.prepare(q, k, v, Shift.apply(inputs, evictions.window, 1), evictions, fla)

    def combine(self, out: Tensor, lse: Tensor, read: Tensor, x: Tensor, evictions: Evictions) -> Tensor:
        """Attention and memory; attention alone where nothing was evicted yet."""
        with_memory = self.cell.combine(out, lse, read, x, evictions.total)
        return (
            with_memory
            if evictions.writes is None
            else torch.where(evictions.writes[..., None, None], with_memory, out)
        )
