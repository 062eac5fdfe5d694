"""Linear recurrences over many tokens as matrix products on blocks of tokens: plain torch, any device, differentiable.

Letters: B batch, N heads, T tokens, H head size, C tokens in a block, L blocks, K features of a key (H without maps).

Within a block the recurrence is solved in closed form, between blocks the state is carried, in groups of blocks side by
side: a few dozen small steps instead of T. With g_i the sum of log-decays up to token i of its block (all <= 0), the
influence of token j on token i >= j is exp(g_i - g_j), never above 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
BLOCKS = 64  # whose states are summed in one product
GROUP = 8  # blocks that are carried through one after the other


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S <- a S; S <- S + beta k (v - S^T k)^T; o = scale * S^T q   (Gated DeltaNet, arXiv 2412.06464).

    Args:
        q, k: [B, N, T, K], v: [B, N, T, H], float32, q and k of unit length.
        beta: [B, N, T] in 0..1. log_decay: [B, N, T], log a <= 0, or None for a = 1.
        state: [B, N, K, H] float32 (key, value). scale: of what is read.

    Returns:
        o [B, N, T, H] and the state after the last token.
    """
    tokens, size = q.shape[2], v.shape[-1]
    q, k, v, beta = (_blocks(t) for t in (q, k, v, beta))
    decay = _Decay(_blocks(log_decay) if log_decay is not None else None)
    # Token i writes u_i, which depends on the writes before it in the block: (I + A) u = beta (v - S^T k).
    # Solved for both terms, u = writes - keys S. So from block to block S <- (a I - K^T keys) S + K^T writes.
    scores = k @ k.transpose(-1, -2) * beta[..., None]
    right = torch.cat([v, decay.since_start(k)], -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(decay.pairs(scores).tril(-1), right, upper=False, unitriangular=True)
    writes, keys = solved[..., :size], solved[..., size:]
    ends = decay.until_end(k).transpose(-1, -2)
    one = torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)
    states, state = _carry(decay.whole() * one - ends @ keys, ends @ writes, state)
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
    """States before each block [B, N, L, K, H] and after the last: S <- decay S + added, many blocks in one product."""
    before = []
    for decays, adds in zip(log_decay.split(BLOCKS, 2), added.split(BLOCKS, 2), strict=True):
        total = F.pad(decays.cumsum(-1), (1, 0))  # up to before block l, and to the end
        since = (total[..., :, None] - total[..., None, 1:]).clamp(max=0).exp().tril(-1)
        states = (since @ adds.flatten(3)).unflatten(3, adds.shape[3:])
        states = states + total.exp()[..., None, None] * state[:, :, None]
        before.append(states[:, :, :-1])
        state = states[:, :, -1]
    return torch.cat(before, 2), state


def _carry(mixing: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before each block [B, N, L, K, H] and after the last: S <- mixing S + added.

    Many blocks are folded into groups that go side by side, from the identity and zero, because a block's state is
    linear in the state before its group; then the same from group to group.
    """
    blocks, keys = mixing.shape[2:4]
    if blocks <= GROUP:
        before = []
        flat = state.flatten(0, 1)
        for mix, new in zip(mixing.flatten(0, 1).unbind(1), added.flatten(0, 1).unbind(1), strict=True):
            before.append(flat)
            flat = torch.baddbmm(new, mix, flat)
        return torch.stack(before, 1).unflatten(0, state.shape[:2]), flat.view(state.shape)
    one = torch.eye(keys, dtype=state.dtype, device=state.device)
    missing = -blocks % GROUP
    mixing = torch.cat([mixing, one.expand(*mixing.shape[:2], missing, keys, keys)], 2).unflatten(2, (-1, GROUP))
    added = F.pad(added, (keys, 0, 0, 0, 0, missing)).unflatten(2, (-1, GROUP))
    start = torch.cat([one, torch.zeros_like(state[0, 0])], -1).expand(*state.shape[:2], mixing.shape[2], -1, -1)
    inner, whole = _carry(mixing.flatten(1, 2), added.flatten(1, 2), start.flatten(1, 2))
    inner, whole = inner.unflatten(1, mixing.shape[1:3]), whole.unflatten(1, mixing.shape[1:3])
    groups, state = _carry(whole[..., :keys], whole[..., keys:], state)
    before_each = inner[..., :keys] @ groups[:, :, :, None] + inner[..., keys:]
    return before_each.flatten(2, 3)[:, :, :blocks], state


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

    def whole(self) -> Tensor | float:
        """[B, N, L, 1, 1], over each block."""
        return 1.0 if self.total is None else self.total[..., -1, None, None].exp()


def _blocks(x: Tensor) -> Tensor:
    """[B, N, T, ...] -> [B, N, L, C, ...], zeros behind: zero gates change nothing."""
    missing = -x.shape[2] % BLOCK
    if missing:
        x = F.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))
    return x.unflatten(2, (-1, BLOCK))
