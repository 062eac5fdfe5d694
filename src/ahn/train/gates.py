"""How the gates of a store (`ahn.stores.learned`) are trained by the loss of the distillation itself (the idea of
TRIM-KV, arXiv 2512.03324).

Letters: B rows, T tokens, D hidden size, N query heads, M key/value heads, H head size, P places, Q blocks of queries.

Who is kept is a yes or no without a gradient. So the student keeps everything, but what is behind the window counts
less the further its score is from a place: its weight in the softmax is sigmoid((score - least) / warmth), where
`least` is such that the weights of all tokens that are behind the window by then add up to P. That is the budget: a
token can only gain what others lose. `warmth` falls while it trains, until weights are nearly yes or no. Spans are
judged by the best of their scores, as in the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from torch.utils.checkpoint import checkpoint

from ahn.errors import ConfigError
from ahn.hf.hooks import full_attention
from ahn.memory.handle import layers_of
from ahn.ops import dispatch

BLOCKS = 16  # of queries in a row: times to choose at
WARMTH = (1.0, 0.1)  # at first and at last
ALWAYS = -1e4  # `least` while there are free places
HALVINGS = 30  # of the interval that `least` is sought in, in plain torch


def warmth_at(done: float) -> float:
    """When this share of the steps is done, 0 to 1."""
    return WARMTH[0] * (WARMTH[1] / WARMTH[0]) ** done


@contextmanager
def attending(model: Any, warmth: float) -> Iterator[None]:
    """Within, whole sequences are attended as described above, with the window, sinks and places the model has now.
    The cells are not in it: what loses its place is gone."""

    def softly(attention: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, scale: float) -> Tensor:
        layer = attention.ahn
        near = layer.sinks, layer.window
        scores = pooled(scores_of(layer, x), layer.sinks, layer.kept.span)
        least = least_kept(scores.detach(), layer.sizes.store, *near, warmth)
        return attend(q, k, v, centred(scores, least, *near, warmth), least, warmth, *near, scale)

    with full_attention(model, attend=softly):
        yield


def parameters(model: Any) -> list[torch.nn.Parameter]:
    """The weights of all stores."""
    return [p for layer in layers_of(model) if layer.store is not None for p in layer.store.parameters()]


def scores_of(layer: Any, x: Tensor) -> Tensor:
    """What the store of a layer gives the tokens of whole sequences x [B, T, D], [B, M, T]."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    return layer.store.score(x, positions, _no_state)


def _no_state() -> Tensor:
    raise ConfigError("a store that is trained cannot also ask the cell's state")


def pooled(scores: Tensor, sinks: int, span: int) -> Tensor:
    """[B, M, T]: in each span of so many tokens, counted from the sinks, the best score of them."""
    if span == 1:
        return scores
    first, rest = scores[..., :sinks], scores[..., sinks:]
    parts = pad(rest, (0, -rest.shape[-1] % span), value=-torch.inf).unflatten(-1, (-1, span))
    best = parts.amax(-1, keepdim=True).expand_as(parts).flatten(-2)
    return torch.cat([first, best[..., : rest.shape[-1]]], -1)


def least_kept(scores: Tensor, places: int, sinks: int, window: int, warmth: float) -> Tensor:
    """[B, M, Q]: `least` when the first query of each block comes.

    Args:
        scores: [B, M, T].
    """
    if dispatch.pick_eviction(scores.device.type).name == "triton":
        from ahn.ops.kernels import soft_retention

        return soft_retention.least(scores, BLOCKS, places, sinks, window, warmth, ALWAYS)
    behind = _behind(scores, sinks, window)
    low, high = (
        bound[..., None].expand(*scores.shape[:2], BLOCKS)
        for bound in (scores.amin(-1) - 20 * warmth, scores.amax(-1) + 20 * warmth)
    )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _weights(scores, middle, warmth, behind).sum(-1) <= places
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return torch.where(behind.sum(-1) > places, high, ALWAYS)


def centred(scores: Tensor, least: Tensor, sinks: int, window: int, warmth: float) -> Tensor:
    """Scores less what `least` would move by if they moved, at the last block: the same number, without the gradient
    that would raise all of them alike."""
    weights = _weights(scores, least, warmth, _behind(scores, sinks, window))[..., -1, :].detach()
    share = weights * (1 - weights)
    moved = (share * scores).sum(-1, keepdim=True) / share.sum(-1, keepdim=True).clamp(min=1e-9)
    return scores - (moved - moved.detach())


def _behind(scores: Tensor, sinks: int, window: int) -> Tensor:
    """bool [Q, T]: the tokens behind the window when the first query of each block comes."""
    tokens = scores.shape[-1]
    first = torch.arange(BLOCKS, device=scores.device)[:, None] * -(-tokens // BLOCKS)
    at = torch.arange(tokens, device=scores.device)
    return (at >= sinks) & (at <= first - window)


def _weights(scores: Tensor, least: Tensor, warmth: float, behind: Tensor) -> Tensor:
    """[B, M, Q, T]"""
    return torch.sigmoid((scores[..., None, :] - least[..., None]) / warmth) * behind


def attend(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, least: Tensor, warmth: float, sinks: int, window: int, scale: float
) -> Tensor:
    """Causal attention with the weights above for what is behind the window and no sink, [B, T, N, H].

    Args:
        q: [B, N, T, H]. k, v: [B, M, T, H]. scores: [B, M, T] float32. least: [B, M, Q].

    Scores of queries and keys exist for one block of queries at a time, or less, and are computed again in the
    backward.
    """
    kept = logsigmoid((scores[..., None, :] - least[..., None]) / warmth)
    if dispatch.pick_soft_slots(q).name == "triton":
        from ahn.ops.kernels import soft_retention

        return soft_retention.attend(q, k, v, kept, sinks, window, scale).transpose(1, 2)
    return attend_plainly(q, k, v, kept, sinks, window, scale).transpose(1, 2)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, sinks: int, window: int, scale: float) -> Tensor:
    """As `ahn.ops.kernels.soft_retention.attend`."""
    tokens = q.shape[2]
    size, out = -(-tokens // kept.shape[2]), []
    for block, low in enumerate(range(0, tokens, size)):
        high = min(low + size, tokens)
        part = q[:, :, low:high], k[:, :, :high], v[:, :, :high], kept[..., block, :high]
        out.append(checkpoint(_attend, *part, sinks, window, scale, use_reentrant=False))
    return torch.cat(out, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, sinks: int, window: int, scale: float) -> Tensor:
    """The last queries of k's tokens, [B, N, C, H]."""
    j = torch.arange(k.shape[2], device=q.device)
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    logits = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2)).float() * scale
    logits = logits + torch.where((i - j >= window) & (j >= sinks), kept[:, :, None, None], 0)
    weights = logits.masked_fill(j > i, -torch.inf).softmax(-1).to(v.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)
