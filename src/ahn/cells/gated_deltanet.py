"""Gated DeltaNet (arXiv 2412.06464) as the memory cell: forgets by a gate, overwrites by the delta rule."""

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


class GatedDeltaNet(Cell):
    """S <- a S; S <- S + beta k (v - S^T k)^T; read H^-0.5 S^T q, RMSNorm per head, times silu(g).

    beta = sigmoid(b_proj x), log a = -exp(A_log) softplus(a_proj x + dt_bias), g = g_proj x (paper, section 3.2).
    """

    name = "gated_deltanet"
    num_gates = 2
    decay_parameters = ("A_log", "dt_bias")
    authors_name = "GatedDeltaNet"
    authors_unused: ClassVar[tuple[str, ...]] = ("D",)
    fla_operation = "gated_delta_rule"
    vectors: ClassVar[dict[str, int]] = {"N": 3, "H": 1}  # with the authors' `D`, as the paper counts

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim, dtype, device)
        self.A_log = nn.Parameter(torch.empty(num_heads, device=device).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(num_heads, 1e-3, 1e-1, device)))
        self.a_proj = linear(hidden_size, num_heads, dtype, device)
        self.b_proj = linear(hidden_size, num_heads, dtype, device)
        self.g_proj = linear(hidden_size, num_heads, dtype, device)
        self.o_norm = Norm(head_dim, dtype, device)

    def gate_inputs(self, x_BTD: Tensor) -> Tensor:
        return torch.cat([self.b_proj(x_BTD), self.a_proj(x_BTD)], -1)

    def gates(self, inputs_BTG: Tensor) -> Gates:
        b, a = head_gates(inputs_BTG, 2)
        log_decay = -self.A_log.float().exp()[:, None] * F.softplus(a + self.dt_bias.float()[:, None])
        return b.sigmoid(), log_decay

    def naive(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        beta, log_decay = gates
        reads = []
        for t in range(q.shape[2]):
            state = state * log_decay[:, :, t, None, None].exp()
            error = v[:, :, t] - torch.einsum("bnkv,bnk->bnv", state, k[:, :, t])
            state = state + torch.einsum("bnk,bnv->bnkv", k[:, :, t], beta[:, :, t, None] * error)
            reads.append(torch.einsum("bnkv,bnk->bnv", state, q[:, :, t]))
        return torch.stack(reads, 2) * self.head_dim**-0.5, state

    def chunk(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        beta, log_decay = gates
        return chunked.gated_delta_rule(q, k, v, beta, log_decay, state, self.head_dim**-0.5)

    def step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> Tensor:
        beta, log_decay = gates
        return delta_step(q, k, v, beta, state.mul_(log_decay.exp()[..., None]), self.head_dim**-0.5)

    def step_form(self) -> Form:
        from ahn.ops.specs import Form

        return Form(
            True,
            (self.A_log, self.dt_bias),
            self.head_dim**-0.5,
            (self.b_proj, self.a_proj),
            self.g_proj,
            self.o_norm.weight,
        )

    def fla(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        beta, log_decay = gates
        return fla.gated_delta_rule(q, k, v, beta, log_decay, state, self.head_dim**-0.5)

    def output(self, read_BNTH: Tensor, x_BTD: Tensor) -> Tensor:
        return gated_output(self, read_BNTH, x_BTD)


def delta_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float) -> Tensor:
    """One delta-rule write into `state` (in place), then the read. Shapes as `Cell.step`."""
    error = torch.baddbmm(v.flatten(0, 1), k.flatten(0, 1), state.flatten(0, 1), alpha=-1).view_as(v)
    state.add_(k.transpose(-1, -2) * (error * beta[..., None]))
    return q @ state * scale


def gated_output(cell: Any, read_BNTH: Tensor, x_BTD: Tensor) -> Tensor:
    """RMSNorm per head, then times silu of one number per head, then the projection."""
    gate_BNT = F.silu(cell.g_proj(x_BTD).float()).transpose(1, 2)
    return cell.o_proj((cell.o_norm(read_BNTH) * gate_BNT[..., None]).to(x_BTD.dtype))
