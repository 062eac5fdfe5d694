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
BLOCKS = 64  # whose states are summed in one product


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
    # Solved for both terms: u = writes - keys S, so that from block to block S <- (a I - K^T keys) S + K^T writes.
    scores = k @ k.transpose(-1, -2) * beta[..., None]
    right = torch.cat([v, decay.since_start(k)], -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(decay.pairs(scores).tril(-1), right, upper=False, unitriangular=True)
    writes, keys = solved[..., :size], solved[..., size:]
    ends = decay.until_end(k).transpose(-1, -2)
    states, state = _carry(-(ends @ keys), decay.whole(), ends @ writes, state)
    reads = decay.pairs(q @ k.transpose(-1, -2)).tril()
    out = decay.since_start(q) @ states + reads @ (writes - keys @ states)
    return out.flatten(2, 3)[:, :, :tokens] * scale, state


def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S <- a S + k v^T; o = S^T q   (Mamba2 in its attention form, arXiv 2405.21060). Arguments as above."""
    tokens = q.shape[2]
    q, k, v = (_blocks(t) for t in (q, k, v))
    decays = _blocks(log_decay)
    decay = _Decay(decays)
    states, state = _faded_sums(decays.sum(-1), decay.until_end(k).transpose(-1, -2) @ v, state)
    out = decay.since_start(q) @ states + decay.pairs(q @ k.transpose(-1, -2)).tril() @ v
    return out.flatten(2, 3)[:, :, :tokens], state


def _faded_sums(log_decay: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before each block [B, N, L, H, H] and after the last: S <- decay S + added, many blocks in one product."""
    before = []
    for decays, adds in zip(log_decay.split(BLOCKS, 2), added.split(BLOCKS, 2), strict=True):
        total = F.pad(decays.cumsum(-1), (1, 0))  # up to before block l, and to the end
        since = (total[..., :, None] - total[..., None, 1:]).clamp(max=0).exp().tril(-1)
        states = (since @ adds.flatten(3)).unflatten(3, adds.shape[3:])
        states = states + total.exp()[..., None, None] * state[:, :, None]
        before.append(states[:, :, :-1])
        state = states[:, :, -1]
    return torch.cat(before, 2), state


def _carry(mixing: Tensor, decay: Tensor | None, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before each block [B, N, L, H, H] and after the last: S <- (decay I + mixing) S + added.

    The only loop over blocks, one matrix product a step.
    """
    shape = state.shape
    state = state.flatten(0, 1)
    adds = added.flatten(0, 1).unbind(1)
    mixes = mixing.flatten(0, 1).unbind(1)
    fades = decay.flatten(0, 1)[..., None, None].unbind(1) if decay is not None else [None] * len(adds)
    before = []
    for mix, fade, new in zip(mixes, fades, adds, strict=True):
        before.append(state)
        kept = new + state if fade is None else torch.addcmul(new, state, fade)
        state = torch.baddbmm(kept, mix, state)
    return torch.stack(before, 1).unflatten(0, shape[:2]), state.view(shape)


class _Decay:
    """Factors of decay inside blocks, from log-decays [B, N, L, C] or None."""

    def __init__(self, log_decay: Tensor | None) -> None:
        self.total = log_decay.cumsum(-1) if log_decay is not None else None
        if self.total is not None:
            self.between = (self.total[..., :, None] - self.total[..., None, :]).clamp(max=0).exp()

    def pairs(self, scores: Tensor) -> Tensor:
        """scores[i, j] * exp(g_i - g_j); only j <= i means anything."""
        return scores if self.total is None else scores * self.between

    def since_start(self, x: Tensor) -> Tensor:
        return x if self.total is None else x * self.total.exp()[..., None]

    def until_end(self, x: Tensor) -> Tensor:
        return x if self.total is None else x * (self.total[..., -1:] - self.total).exp()[..., None]

    def whole(self) -> Tensor | None:
        """[B, N, L], over each block."""
        return None if self.total is None else self.total[..., -1].exp()


def _blocks(x: Tensor) -> Tensor:
    """[B, N, T, ...] -> [B, N, L, C, ...], zeros behind: zero gates change nothing."""
    missing = -x.shape[2] % BLOCK
    if missing:
        x = F.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))
    return x.unflatten(2, (-1, BLOCK))
