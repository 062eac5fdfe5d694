"""DeltaNet (arXiv 2406.06484) as the memory cell: overwrites by the delta rule, never forgets on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ahn.cells.base import Cell, Gates
from ahn.cells.gated_deltanet import delta_step, gated_output
from ahn.cells.modules import Norm, head_gates, linear
from ahn.ops import chunked, fla

if TYPE_CHECKING:
    from ahn.ops.specs import Form


class DeltaNet(Cell):
    """S <- S + beta k (v - S^T k)^T; read H^-0.5 S^T q, RMSNorm per head, times silu(g).

    beta = sigmoid(b_proj x), g = g_proj x (paper, section 3.2 and its appendix).
    """

    name = "deltanet"
    num_gates = 1
    authors_name = "DeltaNet"
    fla_operation = "delta_rule"
    vectors: ClassVar[dict[str, int]] = {"H": 1}

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim, dtype, device)
        self.b_proj = linear(hidden_size, num_heads, dtype, device)
        self.g_proj = linear(hidden_size, num_heads, dtype, device)
        self.o_norm = Norm(head_dim, dtype, device)

    def gate_inputs(self, x_BTD: Tensor) -> Tensor:
        return self.b_proj(x_BTD)

    def gates(self, inputs_BTG: Tensor) -> Gates:
        (b,) = head_gates(inputs_BTG, 1)
        return (b.sigmoid(),)

    def naive(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        (beta,) = gates
        reads = []
        for t in range(q.shape[2]):
            error = v[:, :, t] - torch.einsum("bnkv,bnk->bnv", state, k[:, :, t])
            state = state + torch.einsum("bnk,bnv->bnkv", k[:, :, t], beta[:, :, t, None] * error)
            reads.append(torch.einsum("bnkv,bnk->bnv", state, q[:, :, t]))
        return torch.stack(reads, 2) * self.head_dim**-0.5, state

    def chunk(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        return chunked.gated_delta_rule(q, k, v, gates[0], None, state, self.head_dim**-0.5)

    def step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> Tensor:
        return delta_step(q, k, v, gates[0], state, self.head_dim**-0.5)

    def step_form(self) -> Form:
        from ahn.ops.specs import Form

        return Form(True, None, self.head_dim**-0.5, (self.b_proj,), self.g_proj, self.o_norm.weight)

    def fla(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        return fla.delta_rule(q, k, v, gates[0], state, self.head_dim**-0.5)

    def output(self, read_BNTH: Tensor, x_BTD: Tensor) -> Tensor:
        return gated_output(self, read_BNTH, x_BTD)
