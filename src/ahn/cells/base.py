"""What a recurrent memory cell is.

Letters: B batch, T tokens, D hidden size, N query heads, H head size, G gates of the cell.
Heads come before tokens (BNTH), as the base model's attention has them.

A cell owns a state of H x H numbers per query head and does three things:

1. `gates`: from the layer input of a token that is to be written, G numbers per head. **All gates zero must leave
   the state as it is**: the frame zeroes them where nothing is written (padding, sinks, the first window).
2. a recurrence in three forms that agree: `naive` (the definition), `chunk` (fast over many tokens), `step` (one
   token, in place). In each, token i is written first and then the state is read with query i.
3. `output`: normalise, gate and project what was read, from the layer input of the reading token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahn import kernels

Gates = tuple[Tensor, ...]


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
    """

    name: ClassVar[str]
    num_gates: ClassVar[int]
    decay_parameters: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
    authors_name: ClassVar[str | None] = None
    authors_unused: ClassVar[tuple[str, ...]] = ()
    fla_operation: ClassVar[str | None] = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        extras: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.extras = extras
        # Zero: an untrained memory leaves the sinks-and-window model as it is.
        self.o_proj = Projection(torch.zeros(num_heads, head_dim, head_dim, dtype=dtype, device=device))
        wide = [int(name[4:]) for name in extras if name.startswith("wide")]
        self.key_size = head_dim * (wide[0] if wide else 1)
        self.wide = bool(wide)
        if "maps" in extras or wide:
            eye = torch.eye(head_dim, dtype=dtype, device=device)
            if wide:
                eye = torch.cat([eye, -eye], 1) * 4
                for _ in range(wide[0] // 2 - 1):
                    turn = torch.linalg.qr(torch.randn(head_dim, head_dim))[0].to(eye)
                    eye = torch.cat([eye, turn * 4, -turn * 4], 1)
            eye = eye.repeat(num_heads, 1, 1)
            self.q_map, self.k_map = Map(eye.clone()), Map(eye.clone())
        if "share" in extras:
            self.share_proj = linear(hidden_size, num_heads, dtype, device, bias=True)
            nn.init.zeros_(self.share_proj.weight)
            self.share_norm = nn.Parameter(torch.zeros(num_heads, dtype=dtype, device=device))
            self.share_count = nn.Parameter(torch.zeros(num_heads, dtype=dtype, device=device))
        if "mix" in extras:
            self.w_proj = Projection(torch.zeros(num_heads, head_dim, head_dim, dtype=dtype, device=device))

    def keys(self, q_BNTH: Tensor, k_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        if self.wide:
            q, k = (unit(t).to(t.dtype) for t in (q_BNTH, k_BNTH))
            return unit(F.silu(self.q_map(q))), unit(F.silu(self.k_map(k)))
        if "maps" in self.extras:
            q_BNTH, k_BNTH = self.q_map(q_BNTH), self.k_map(k_BNTH)
        return unit(q_BNTH), unit(k_BNTH)

    def gate(self, g: Tensor) -> Tensor:
        return 2 * g.sigmoid() if "open" in self.extras else F.silu(g)

    def add(self, out_BTNH: Tensor, norm_BNT: Tensor, read_BNTH: Tensor, x_BTD: Tensor, evicted: Tensor) -> Tensor:
        added = self.output(read_BNTH, x_BTD)
        if "mix" in self.extras:
            added = added + self.w_proj(out_BTNH.transpose(1, 2))
        if "share" in self.extras:
            z = self.share_proj(x_BTD).float()
            if "norm" in self.extras:
                z = z + self.share_norm.float() * norm_BNT.transpose(1, 2)
                z = z + self.share_count.float() * evicted[..., None].float().log()
            out_BTNH = out_BTNH * (2 * z.sigmoid()).to(out_BTNH.dtype)[..., None]
        return out_BTNH + added

    def gate_inputs(self, x_BTD: Tensor) -> Tensor:
        """What must be kept of a token in the window so that its gates can be computed when it leaves.

        Returns [B, T, G * N] in the dtype of x: the linear part only, so that nothing is rounded twice.
        """
        raise NotImplementedError

    def gates(self, inputs_BTG: Tensor) -> Gates:
        """From `gate_inputs`: G tensors [B, N, T], float32, zero meaning "nothing is written, nothing forgotten"."""
        raise NotImplementedError

    def naive(
        self, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, gates: Gates, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition, token by token in float32; the oracle of the other forms.

        Args:
            q_BNTH, k_BNTH: of unit length, q_i reads after k_i, v_i are written.
            state: [B, N, H, H] float32 (key, value), before the first write.

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

    def fla(self, q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `chunk`, by flash-linear-attention on CUDA: tokens before heads, gates [B, T, N]."""
        raise NotImplementedError

    def scan(
        self, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, gates: Gates, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`chunk` by the best kernel there is for this device and dtype (`ahn.kernels`); q and k of any length."""
        fla = kernels.choose(self.fla_operation, q_BNTH).name == "fla"
        return self.run(*self.ready(q_BNTH, k_BNTH, v_BNTH, gates, fla), state, fla)

    def ready(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, fla: bool) -> tuple[Tensor, Tensor, Tensor, Gates]:
        """As the kernel takes them."""
        dtype = q.dtype
        q, k = self.keys(q, k)
        if not fla:
            return q, k, v.float(), gates
        q, k, v = (t.transpose(1, 2).to(dtype).contiguous() for t in (q, k, v))
        return q, k, v, tuple(g.transpose(1, 2).contiguous() for g in gates)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor, fla: bool
    ) -> tuple[Tensor, Tensor]:
        if fla:
            read, state = self.fla(q, k, v, gates, state)
            return read.transpose(1, 2), state
        return self.chunk(q, k, v, gates, state)

    def output(self, read_BNTH: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm, gate and per-head projection of what was read; returns [B, T, N, H] in the dtype of x."""
        raise NotImplementedError


class Projection(nn.Module):
    """One H x H matrix per head: out[n, o] = sum_i x[n, i] weight[n, i, o] (paper, section 3)."""

    def __init__(self, weight_NHH: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_NHH)

    def forward(self, x_BNTH: Tensor) -> Tensor:
        return torch.matmul(x_BNTH, self.weight.to(x_BNTH.dtype)).transpose(1, 2)


class Map(nn.Module):
    def __init__(self, weight_NHH: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_NHH)

    def forward(self, x_BNTH: Tensor) -> Tensor:
        return torch.matmul(x_BNTH, self.weight.to(x_BNTH.dtype))


class Norm(nn.Module):
    """RMSNorm over the last dimension in float32, eps 1e-5."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-5)


class Linear(nn.Linear):
    """A linear layer whose weights may be of higher precision than what it reads, as they are in training."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def unit(x: Tensor) -> Tensor:
    """x over its length in float32, with eps 1e-6 on the squared length."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def linear(
    hidden_size: int, num_heads: int, dtype: torch.dtype, device: torch.device | str | None, bias: bool = False
) -> nn.Linear:
    """D -> N, one number per head, from the initialisation the authors use (normal, deviation 0.02)."""
    layer = Linear(hidden_size, num_heads, bias=bias, dtype=dtype, device=device)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def head_gates(inputs_BTG: Tensor, count: int) -> tuple[Tensor, ...]:
    """[B, T, G * N] -> G tensors [B, N, T] in float32."""
    return tuple(part.transpose(1, 2) for part in inputs_BTG.float().chunk(count, dim=-1))


def log_uniform(size: int, low: float, high: float, device: torch.device | str | None) -> Tensor:
    return torch.exp(
        torch.empty(size, device=device).uniform_(torch.tensor(low).log().item(), torch.tensor(high).log().item())
    )


def inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
