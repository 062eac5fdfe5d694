"""Linear recurrences over many tokens as matrix products on blocks of tokens: plain torch, any device, differentiable.

Letters: B batch, N heads, T tokens, H head size, C tokens in a block, L blocks.

Within a block the recurrence is solved in closed form, between blocks the state is carried: T / C small steps instead
of T. With g_i the sum of log-decays up to token i of its block (all <= 0), the influence of token j on token i >= j is
exp(g_i - g_j), never above 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S <- a S; S <- S + beta k (v - S^T k)^T; o = scale * S^T q   (Gated DeltaNet, arXiv 2412.06464).

    Args:
        q, k, v: [B, N, T, H] float32, q and k of unit length.
        beta: [B, N, T] in 0..1. log_decay: [B, N, T], log a <= 0, or None for a = 1.
        state: [B, N, H, H] float32 (key, value).

    Returns:
        o [B, N, T, H] and the state after the last token.
    """
    tokens, size = q.shape[2], v.shape[-1]
    q, k, v, beta = (_blocks(t) for t in (q, k, v, beta))
    decay = _Decay(_blocks(log_decay) if log_decay is not None else None)
    # What token i writes, u_i, depends on what the tokens before it in the block wrote: (I + A) u = beta (v - S^T k).
    scores = k @ k.transpose(-1, -2) * beta[..., None]
    system = decay.pairs(scores).tril(-1)
    right = torch.cat([v, decay.since_start(k)], -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    writes, keys = solved[..., :size], solved[..., size:]
    reads = decay.pairs(q @ k.transpose(-1, -2)).tril()
    q, k = decay.since_start(q), decay.until_end(k).transpose(-1, -2)
    out = []
    for i in range(q.shape[2]):
        u = torch.baddbmm(_flat(writes[:, :, i]), _flat(keys[:, :, i]), _flat(state), alpha=-1)
        o = torch.baddbmm(torch.bmm(_flat(q[:, :, i]), _flat(state)), _flat(reads[:, :, i]), u)
        out.append(o.view_as(v[:, :, i]))
        state = decay.carry(state, i) + torch.bmm(_flat(k[:, :, i]), u).view_as(state)
    return _join(out, tokens) * scale, state


def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S <- a S + k v^T; o = S^T q   (Mamba2 in its attention form, arXiv 2405.21060). Arguments as above."""
    tokens = q.shape[2]
    q, k, v = (_blocks(t) for t in (q, k, v))
    decay = _Decay(_blocks(log_decay))
    inside = decay.pairs(q @ k.transpose(-1, -2)).tril() @ v
    written = decay.until_end(k).transpose(-1, -2) @ v
    q = decay.since_start(q)
    out = []
    for i in range(q.shape[2]):
        out.append(inside[:, :, i] + q[:, :, i] @ state)
        state = decay.carry(state, i) + written[:, :, i]
    return _join(out, tokens), state


class _Decay:
    """Factors of decay inside blocks, from log-decays [B, N, L, C] or None."""

    def __init__(self, log_decay: Tensor | None) -> None:
        self.total = log_decay.cumsum(-1) if log_decay is not None else None

    def pairs(self, scores: Tensor) -> Tensor:
        """scores[i, j] * exp(g_i - g_j); only j <= i means anything."""
        if self.total is None:
            return scores
        return scores * (self.total[..., :, None] - self.total[..., None, :]).clamp(max=0).exp()

    def since_start(self, x: Tensor) -> Tensor:
        return x if self.total is None else x * self.total.exp()[..., None]

    def until_end(self, x: Tensor) -> Tensor:
        return x if self.total is None else x * (self.total[..., -1:] - self.total).exp()[..., None]

    def carry(self, state: Tensor, block: int) -> Tensor:
        return state if self.total is None else state * self.total[:, :, block, -1].exp()[..., None, None]


def _flat(x: Tensor) -> Tensor:
    """[B, N, ...] -> [B * N, ...]: a plain batch of matrices for bmm."""
    return x.flatten(0, 1)


def _blocks(x: Tensor) -> Tensor:
    """[B, N, T, ...] -> [B, N, L, C, ...], zeros behind: zero gates change nothing."""
    missing = -x.shape[2] % BLOCK
    if missing:
        x = F.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))
    return x.unflatten(2, (-1, BLOCK))


def _join(blocks: list[Tensor], tokens: int) -> Tensor:
    return torch.stack(blocks, 2).flatten(2, 3)[:, :, :tokens]
