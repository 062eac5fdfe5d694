"""Trains the gates of a store (`ahn.stores.learned`) by the loss of the distillation itself (the idea of TRIM-KV, arXiv
2512.03324).

Letters: B rows, T tokens, D hidden size, N query heads, M key/value heads, H head size, Q blocks of queries.

Whether a token is kept is a yes or no, which has no gradient. So in training the student keeps every token, but a token
behind the window counts less, the lower its score is. Its weight in the softmax is sigmoid((score - least) / warmth).
`least` is chosen so that the weights of all tokens behind the window add up to the size of the store: that is the
budget, and a token can only gain what others lose. `warmth` falls during training, until weights are nearly 0 or 1.
As in the store, the tokens of a span all have the best score among them.
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
from ahn.memory.batch import LayerBatch
from ahn.memory.handle import layers_of
from ahn.ops import dispatch
from ahn.ops.specs import Window

BLOCKS = 16  # of queries in a row; `least` is found once for each
WARMTH = (1.0, 0.1)  # in the first step and in the last
ALWAYS = -1e4  # `least` while the store has free slots
HALVINGS = 30  # of the interval that holds `least`, in plain torch


def warmth_at(done: float) -> float:
    """The warmth once this share of the steps is done, 0 to 1: it falls geometrically."""
    return WARMTH[0] * (WARMTH[1] / WARMTH[0]) ** done


@contextmanager
def attending(model: Any, warmth: float) -> Iterator[None]:
    """Within, the model attends to whole sequences as described above, with its present window, sinks and store size.

    The cells take no part: a token that the store does not keep is lost.
    """

    def softly(attention: Any, tokens: LayerBatch) -> Tensor:
        layer = attention.ahn
        window = Window(layer.window, layer.sinks)  # always seen with their full weight
        scores = pooled(scores_of(layer, tokens.x), layer.sinks, layer.kept.span)
        least = least_kept(scores.detach(), layer.sizes.store, window, warmth)
        weights = log_weights(centred(scores, least, window, warmth), least, warmth)
        return attend(tokens.q, tokens.k, tokens.v, weights, window, tokens.scale)

    with full_attention(model, attend=softly):
        yield


def parameters(model: Any) -> list[torch.nn.Parameter]:
    """The trainable parameters of all stores."""
    return [p for layer in layers_of(model) if layer.store is not None for p in layer.store.parameters()]


def scores_of(layer: Any, x: Tensor) -> Tensor:
    """The scores [B, M, T] that the store of a layer gives the tokens of whole sequences x [B, T, D]."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    return layer.store.score(x, positions, _no_state)


def _no_state() -> Tensor:
    raise ConfigError("a store that is trained cannot also ask the cell's state")


def pooled(scores: Tensor, sinks: int, span: int) -> Tensor:
    """Scores [B, M, T] in which each token has the best score of its span. The first span begins behind the sinks."""
    if span == 1:
        return scores
    first, rest = scores[..., :sinks], scores[..., sinks:]
    parts = pad(rest, (0, -rest.shape[-1] % span), value=-torch.inf).unflatten(-1, (-1, span))
    best = parts.amax(-1, keepdim=True).expand_as(parts).flatten(-2)
    return torch.cat([first, best[..., : rest.shape[-1]]], -1)


def least_kept(scores: Tensor, store_size: int, window: Window, warmth: float) -> Tensor:
    """`least` at the first query of each block, [B, M, Q].

    Args:
        scores: [B, M, T].
    """
    if dispatch.pick_eviction(scores.device.type).name == "triton":
        from ahn.ops.kernels import soft_retention

        return soft_retention.least(scores, BLOCKS, store_size, window, warmth, ALWAYS)
    behind = _behind(scores, window)
    low, high = (
        bound[..., None].expand(*scores.shape[:2], BLOCKS)
        for bound in (scores.amin(-1) - 20 * warmth, scores.amax(-1) + 20 * warmth)
    )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _weights(scores, middle, warmth, behind).sum(-1) <= store_size
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return torch.where(behind.sum(-1) > store_size, high, ALWAYS)


def centred(scores: Tensor, least: Tensor, window: Window, warmth: float) -> Tensor:
    """The same scores, with the gradient that they have when `least` of the last block follows them.

    `least` itself has no gradient. Without this correction the gradient could raise all scores alike, which changes
    no choice.
    """
    weights = _weights(scores, least, warmth, _behind(scores, window))[..., -1, :].detach()
    share = weights * (1 - weights)
    moved = (share * scores).sum(-1, keepdim=True) / share.sum(-1, keepdim=True).clamp(min=1e-9)
    return scores - (moved - moved.detach())


def log_weights(scores: Tensor, least: Tensor, warmth: float) -> Tensor:
    """Log of the weight of each token behind the window for each block of queries, [B, M, Q, T] float32.

    Args:
        scores: [B, M, T] float32.
        least: [B, M, Q].
    """
    return logsigmoid((scores[..., None, :] - least[..., None]) / warmth)


def _behind(scores: Tensor, window: Window) -> Tensor:
    """Mask of the tokens that are behind the window at the first query of each block, bool [Q, T]. Sinks are not."""
    tokens = scores.shape[-1]
    first = torch.arange(BLOCKS, device=scores.device)[:, None] * -(-tokens // BLOCKS)
    at = torch.arange(tokens, device=scores.device)
    return (at >= window.sinks) & (at <= first - window.size)


def _weights(scores: Tensor, least: Tensor, warmth: float, behind: Tensor) -> Tensor:
    """Weights of the tokens that are `behind` the window, 0 for the others, [B, M, Q, T]."""
    return torch.sigmoid((scores[..., None, :] - least[..., None]) / warmth) * behind


def attend(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, window: Window, scale: float) -> Tensor:
    """Causal attention in which tokens behind the window have the given weights, [B, T, N, H].

    Scores of queries against keys exist for at most one block of queries at a time. The backward pass computes them
    again.

    Args:
        q: [B, N, T, H].
        k, v: [B, M, T, H].
        weights: their logs, [B, M, Q, T], see `log_weights`.
        scale: of the scores.
    """
    if dispatch.pick_soft_slots(q).name == "triton":
        from ahn.ops.kernels import soft_retention

        return soft_retention.attend(q, k, v, weights, window, scale).transpose(1, 2)
    return attend_plainly(q, k, v, weights, window, scale).transpose(1, 2)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, window: Window, scale: float) -> Tensor:
    """As `attend`, in plain torch, but returns [B, N, T, H]: the reference for the Triton kernel."""
    tokens = q.shape[2]
    size, out = -(-tokens // weights.shape[2]), []
    for block, low in enumerate(range(0, tokens, size)):
        high = min(low + size, tokens)
        part = q[:, :, low:high], k[:, :, :high], v[:, :, :high], weights[..., block, :high]
        out.append(checkpoint(_attend, *part, window, scale, use_reentrant=False))
    return torch.cat(out, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, window: Window, scale: float) -> Tensor:
    """The same for one block of C queries, which belong to the last C tokens of k, [B, N, C, H]."""
    j = torch.arange(k.shape[2], device=q.device)
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    logits = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2)).float() * scale
    behind = (i - j >= window.size) & (j >= window.sinks)
    logits = logits + torch.where(behind, weights[:, :, None, None], 0)
    shares = logits.masked_fill(j > i, -torch.inf).softmax(-1).to(v.dtype)
    return (shares @ v[:, :, None]).flatten(1, 2)
