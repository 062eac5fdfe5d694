"""The parts of cells: projections, maps of keys, norms, and how they are initialised.

Letters: as in `ahn.cells.base`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def by_head(x_BNTH: Tensor, weight_NHK: Tensor) -> Tensor:
    """Each head times its own matrix, [B, N, T, K]. The rows of one token each are multiplied together: `matmul` would
    copy the weight for each row."""
    if len(x_BNTH) == 1 or x_BNTH.shape[2] > 1:
        return x_BNTH @ weight_NHK
    return (x_BNTH[:, :, 0].transpose(0, 1) @ weight_NHK).transpose(0, 1)[:, :, None]


class Projection(nn.Module):
    """One H x H matrix per head: out[n, o] = sum_i x[n, i] weight[n, i, o] (paper, section 3)."""

    def __init__(self, weight_NHH: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_NHH)

    def extra_repr(self) -> str:
        """peft, which finds it by its name where `o_proj` is meant, shows this when it refuses."""
        return r"part of a memory; leave it out with exclude_modules=r'.*\.ahn\..*'"

    def forward(self, x_BNTH: Tensor) -> Tensor:
        return by_head(x_BNTH, self.weight.to(x_BNTH.dtype)).transpose(1, 2)


class KeyMap(nn.Module):
    """Learned features of queries or keys, one H x K matrix per head, then unit length.

    K = H: linear. K > H: silu of the mapped unit vector, so that there are K directions to write to instead of H.
    """

    def __init__(self, weight_NHK: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_NHK)

    def forward(self, x_BNTH: Tensor) -> Tensor:
        weight = self.weight.to(x_BNTH.dtype)
        if weight.shape[1] == weight.shape[2]:
            return unit(by_head(x_BNTH, weight))
        return unit(F.silu(by_head(unit(x_BNTH).to(x_BNTH.dtype), weight)))


def initial_map(size: int, times: int) -> Tensor:
    """[H, times * H]: the identity, or orthogonal maps and their opposites, scaled so that silu bends them a little."""
    if times == 1:
        return torch.eye(size)
    rotations = [torch.linalg.qr(torch.randn(size, size))[0] for _ in range(times // 2)]
    return torch.cat([part for q in rotations for part in (q, -q)], 1) * (size**0.5 / 2)


class Room(nn.Module):
    """A factor on the window's attention that makes room for the memory: 0 to 2 per token and head, 1 at first.

    Softmax over the window alone shares all its weight among the window; full attention gives part of it to
    older tokens. The size of that part depends on the token, on the window's lse and on how many tokens have left.
    """

    def __init__(self, hidden_size: int, num_heads: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.proj = linear(hidden_size, num_heads, dtype, device, bias=True)
        nn.init.zeros_(self.proj.weight)
        self.by_norm = nn.Parameter(torch.zeros(num_heads, dtype=dtype, device=device))
        self.by_count = nn.Parameter(torch.zeros(num_heads, dtype=dtype, device=device))

    def forward(self, x_BTD: Tensor, lse_BNT: Tensor, evicted_RT: Tensor) -> Tensor:
        """[B, T, N, 1] float32."""
        value = self.proj(x_BTD).float() + self.by_norm.float() * lse_BNT.transpose(1, 2).float()
        value = value + self.by_count.float() * evicted_RT[..., None].float().log()
        return 2 * value.sigmoid()[..., None]


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
