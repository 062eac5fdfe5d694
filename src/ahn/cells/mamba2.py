"""Mamba2 (arXiv 2405.21060) as the memory cell: adds what is written, forgets by a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahn.cells.base import Cell, Gates
from ahn.cells.modules import Norm, head_gates, inverse_softplus, linear, log_uniform
from ahn.ops import chunked, fla

if TYPE_CHECKING:
    from ahn.ops.specs import Form


class Mamba2(Cell):
    """S <- exp(dt A) S + dt k v^T; read S^T q times silu(g), then RMSNorm over all heads together.

    dt = softplus(dt_proj x + dt_bias), A = -exp(A_log), g = g_proj x (paper, section 3.2 and its appendix).
    """

    name = "mamba2"
    num_gates = 1
    decay_parameters = ("A_log", "dt_bias")
    authors_name = "Mamba2"
    fla_operation = "simple_gla"
    vectors: ClassVar[dict[str, int]] = {"N": 4, "NH": 1}

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim, dtype, device)
        self.A_log = nn.Parameter(torch.arange(1, num_heads + 1, dtype=torch.float32, device=device).log())
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(num_heads, 1e-3, 1e-1, device)))
        self.dt_proj = linear(hidden_size, num_heads, dtype, device, bias=True)
        self.g_proj = linear(hidden_size, num_heads, dtype, device, bias=True)
        self.norm = Norm(num_heads * head_dim, dtype, device)

    def gate_inputs(self, x_BTD: Tensor) -> Tensor:
        return self.dt_proj(x_BTD)

    def gates(self, inputs_BTG: Tensor) -> Gates:
        (dt,) = head_gates(inputs_BTG, 1)
        dt = F.softplus(dt + self.dt_bias.float()[:, None])
        return dt, -self.A_log.float().exp()[:, None] * dt

    def naive(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        dt, log_decay = gates
        reads = []
        for t in range(q.shape[2]):
            write = torch.einsum("bnk,bnv->bnkv", k[:, :, t], dt[:, :, t, None] * v[:, :, t])
            state = state * log_decay[:, :, t, None, None].exp() + write
            reads.append(torch.einsum("bnkv,bnk->bnv", state, q[:, :, t]))
        return torch.stack(reads, 2), state

    def chunk(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        dt, log_decay = gates
        return chunked.linear_attention(q, k, v * dt[..., None], log_decay, state)

    def step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> Tensor:
        dt, log_decay = gates
        state.mul_(log_decay.exp()[..., None]).add_(k.transpose(-1, -2) * (v * dt[..., None]))
        return q @ state

    def step_form(self) -> Form:
        from ahn.ops.specs import Form

        return Form(False, (self.A_log, self.dt_bias), 1.0, (self.dt_proj,), self.g_proj, self.norm.weight)

    def fla(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        dt, log_decay = gates
        return fla.simple_gla(q, k, v * dt[..., None].to(v.dtype), log_decay, state)

    def output(self, read_BNTH: Tensor, x_BTD: Tensor) -> Tensor:
        gate_BTN = F.silu(self.g_proj(x_BTD).float())
        gated = (read_BNTH.transpose(1, 2) * gate_BTN[..., None]).flatten(2)
        normed = self.norm(gated).unflatten(-1, (self.num_heads, self.head_dim))
        return self.o_proj(normed.transpose(1, 2).to(x_BTD.dtype))
