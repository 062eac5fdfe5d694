"""The interface of a recurrent memory cell.

Letters: B batch, T tokens, D hidden size, N query heads, H head size, G gates of the cell.
Heads come before tokens (BNTH), as the base model's attention has them.

A cell owns a state of K x H numbers per query head (K = H, or more with wide maps) and does three things:

1. `gates`: from the layer input of a token that is to be written, G numbers per head. **All gates zero must leave
   the state as it is**: the frame zeroes them where nothing is written (padding, sinks, the first window).
2. a recurrence in three forms that agree: `naive` (the definition), `chunk` (fast over many tokens), `step` (one
   token, in place). In each, token i is written first and then the state is read with query i.
3. `output`: normalise, gate and project what was read, from the layer input of the reading token.

Two parts the paper does not have can be added to any cell (`Cell.extend`): maps of queries and keys before they meet
the state, and a gate on the window's attention, which makes room for the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ahn.cells.modules import KeyMap, Projection, Room, initial_map, unit
from ahn.ops import dispatch

if TYPE_CHECKING:
    from ahn.ops.specs import Form


Gates = tuple[Tensor, ...]
Chunk = Callable[[Tensor, Tensor, Tensor, Gates, Tensor], tuple[Tensor, Tensor]]


class CellSize(NamedTuple):
    """The parameters that one cell adds to a layer: gate projections, an H x H output matrix a head, and vectors.

    Args:
        gates: number of projections D -> N, of the write (of the evicted token) and of the read (of the current one).
        kept: number of those of the write. Their N numbers are computed when a token arrives and wait beside its K/V.
        small: parameters in vectors (biases, decay rates, norm weights).
        small_formula: `small` in letters.
    """

    gates: int
    kept: int
    small: int
    small_formula: str


class Cell(nn.Module):
    """Base of all cells. A new one needs `name`, `num_gates`, `gate_inputs`, `gates`, `naive` and `output`.

    Args:
        hidden_size: D. num_heads: N. head_dim: H. dtype, device: of the projections; gate biases stay float32.

    Class attributes:
        name: the file's name. num_gates: G.
        decay_parameters: names that training leaves out of weight decay and that stay float32.
        tolerance: largest ||out - naive|| / ||naive|| of a fast form, by dtype of q, k, v.
        authors_name, authors_unused: how the authors' checkpoints call the cell, and tensors of theirs with no effect.
        fla_operation: operation of flash-linear-attention that computes `chunk` on CUDA.
        vectors: for `ahn cost`, parameters that are neither D -> N nor the output, by the letters of their sizes:
            {"N": 3, "H": 1} is 3N + H. Default: counted on the module.
    """

    name: ClassVar[str]
    num_gates: ClassVar[int]
    decay_parameters: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
    authors_name: ClassVar[str | None] = None
    authors_unused: ClassVar[tuple[str, ...]] = ()
    fla_operation: ClassVar[str | None] = None
    vectors: ClassVar[dict[str, int] | None] = None

    @classmethod
    def size(cls, D: int, N: int, H: int) -> CellSize:
        """The parameters of the cell in one layer, without feature maps and window gate."""
        parameters = list(cls(D, N, H, device="meta").parameters())
        gates = sum(parameter.shape == (N, D) for parameter in parameters)
        if cls.vectors is None:
            small = sum(parameter.numel() for parameter in parameters) - gates * N * D - N * H * H
            return CellSize(gates, cls.num_gates, small, "counted")
        letters = {"N": N, "H": H, "NH": N * H}
        small = sum(count * letters[name] for name, count in cls.vectors.items())
        formula = " + ".join(f"{count if count > 1 else ''}{name}" for name, count in cls.vectors.items())
        return CellSize(gates, cls.num_gates, small, formula)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        # Zero: an untrained memory leaves the sinks-and-window model as it is.
        self.o_proj = Projection(torch.zeros(num_heads, head_dim, head_dim, dtype=dtype, device=device))
        self.key_size = head_dim  # K: the state is K x H
        self.q_map: KeyMap | None = None
        self.k_map: KeyMap | None = None
        self.room: Room | None = None
        self.chunk_form: Chunk | None = None  # a compiled form of `chunk`

    def extend(self, feature_maps: int, window_gate: bool) -> None:
        """Add what AHNConfig names so; both leave an untrained memory without effect."""
        weight = self.o_proj.weight
        if feature_maps:
            self.key_size = feature_maps * self.head_dim
            matrix = initial_map(self.head_dim, feature_maps).to(weight).repeat(self.num_heads, 1, 1)
            self.q_map, self.k_map = KeyMap(matrix.clone()), KeyMap(matrix.clone())
        if window_gate:
            self.room = Room(self.hidden_size, self.num_heads, weight.dtype, weight.device)

    def keys(self, q_BNTH: Tensor, k_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they meet the state: of unit length, [B, N, T, K], float32."""
        return unit(q_BNTH) if self.q_map is None else self.q_map(q_BNTH), self.key(k_BNTH)

    def key(self, k_BNTH: Tensor) -> Tensor:
        """The half of `keys` that is written."""
        return unit(k_BNTH) if self.k_map is None else self.k_map(k_BNTH)

    def error(self, k_BNTH: Tensor, v_BNTH: Tensor, gates: Gates, state: Tensor) -> Tensor:
        """The norm of the part of each value that the state does not return, times the write strength, [B, N, T]."""
        missing = v_BNTH.float() - self.key(k_BNTH) @ state
        return gates[0] * torch.linalg.vector_norm(missing, dim=-1)

    def combine(
        self, out_BTNH: Tensor, lse_BNT: Tensor, read_BNTH: Tensor, x_BTD: Tensor, evicted_RT: Tensor
    ) -> Tensor:
        """The attention's output with what the memory adds.

        Args:
            out_BTNH, lse_BNT: attention over sinks and window, and its lse.
            read_BNTH: the cell's read, [B, N, T, H]. x_BTD: layer input. evicted_RT: tokens that have left the window.
        """
        added = self.output(read_BNTH, x_BTD)
        if self.room is not None:
            out_BTNH = out_BTNH * self.room(x_BTD, lse_BNT, evicted_RT).to(out_BTNH.dtype)
        return out_BTNH + added

    def gate_inputs(self, x_BTD: Tensor) -> Tensor:
        """The numbers of a token that wait in the window, from which `gates` are computed when the token leaves it.

        Returns [B, T, G * N] in the dtype of x: the linear part only, so that nothing is rounded twice.
        """
        raise NotImplementedError

    def gates(self, inputs_BTG: Tensor) -> Gates:
        """From `gate_inputs`: G tensors [B, N, T], float32, zero meaning "nothing is written, nothing forgotten". The
        first says how strongly a token is written."""
        raise NotImplementedError

    def naive(
        self, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, gates: Gates, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition, token by token in float32; the oracle of the other forms.

        Args:
            q_BNTH, k_BNTH: of unit length, q_i reads after k_i, v_i are written.
            state: [B, N, K, H] float32 (key, value), before the first write; K is `key_size`.

        Returns:
            reads [B, N, T, H] float32 and the state after the last write.
        """
        raise NotImplementedError

    def chunk(
        self, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, gates: Gates, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `naive`, fast over many tokens and differentiable."""
        return self.naive(q_BNTH, k_BNTH, v_BNTH, gates, state)

    def step(self, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, gates: Gates, state: Tensor) -> Tensor:
        """As `naive` for one token (T = 1); `state` is updated in place. Returns the read [B, N, 1, H] float32."""
        read, new_state = self.naive(q_BNTH, k_BNTH, v_BNTH, gates, state)
        state.copy_(new_state)
        return read

    def step_form(self) -> Form | None:
        """The form of `step` and `combine` that `ahn.ops.kernels.decode` computes on CUDA, or None if it has none."""
        return None

    def fla(self, q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `chunk`, by flash-linear-attention on CUDA: tokens before heads, gates [B, T, N]."""
        raise NotImplementedError

    def scan(
        self, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, gates: Gates, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`chunk` by the best kernel there is for this device and dtype (`ahn.ops.dispatch`); q and k of any length."""
        fla = self.uses_fla(q_BNTH)
        return self.run(*self.ready(q_BNTH, k_BNTH, v_BNTH, gates, fla), state, fla)

    def uses_fla(self, like: Tensor) -> bool:
        gradients = torch.is_grad_enabled() and (like.requires_grad or self.o_proj.weight.requires_grad)
        return dispatch.pick_cell(self.fla_operation, like, gradients).name == "fla"

    def ready(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, fla: bool) -> tuple[Tensor, Tensor, Tensor, Gates]:
        """The arguments of `run`, in the layout of its kernel."""
        dtype = q.dtype
        q, k = self.keys(q, k)
        if not fla:
            return q, k, v.float(), gates
        q, k, v = (t.transpose(1, 2).to(dtype).contiguous() for t in (q, k, v))
        return q, k, v, tuple(gate.transpose(1, 2).contiguous() for gate in gates)

    def run(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor, fla: bool) -> tuple[Tensor, Tensor]:
        """The recurrence on what `ready` returned: reads [B, N, T, H] and the state."""
        chunk = self.chunk_form or self.chunk
        if not fla and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *gates)):
            # what it computes is many times what it is given
            result: tuple[Tensor, Tensor] = checkpoint(chunk, q, k, v, gates, state, use_reentrant=False)
            return result
        if not fla:
            return chunk(q, k, v, gates, state)
        read, state = self.fla(q, k, v, gates, state)
        return read.transpose(1, 2), state

    def output(self, read_BNTH: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm, gate and per-head projection of what was read; returns [B, T, N, H] in the dtype of x."""
        raise NotImplementedError
