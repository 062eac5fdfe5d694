"""Softmax attention over what is kept exactly: sinks and window.

Letters: B batch, N query heads, M key/value heads, C queries, K keys, H head size, S sinks, W window;
R rows of positions: 1 where all of the batch are at the same position, else B.

One predicate says what may be seen (`visible`). Sinks and window are attended apart and merged by their normalisers,
because with clipped sink positions a query meets the two at different angles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ahn.ops import dispatch
from ahn.ops.softmax import AttentionOutput, attend, merge, with_gradients
from ahn.ops.specs import KeptKeys

QUERY_BLOCK = 128  # queries attended at once: few enough that little of the band between blocks is masked


def visible(query: Tensor, key: Tensor, sinks: int, window: int) -> Tensor:
    """Which window keys a query sees, by their positions (broadcast): causal, in the window, not a sink."""
    return (key <= query) & (key > query - window) & (key >= sinks)


def attend_one(
    q: Tensor,
    q_sinks: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: int,
    last: Tensor | None,
    scale: float,
    in_parts: bool = False,
) -> Any:
    """Attention of one new token over a ring buffer, in any order and without copying it.

    Args:
        q, q_sinks: [B, N, 1, H], as the window and as the sinks meet it. k, v: [B, M, K, H], the sinks first.
        last: [R], position of the new token where slots are not all filled: a slot above it is empty. Or None.
        in_parts: return `ahn.ops.specs.Parts`, where there are Triton kernels.

    Returns: AttentionOutput, unless `in_parts`.
    """
    if dispatch.pick_one_token(q.device.type).name == "triton":
        from ahn.ops.kernels import decode

        attend = decode.attend_parts if in_parts else decode.attend
        return attend(q, q_sinks, k, v, sinks, last, scale)
    filled = None if last is None else (torch.arange(k.shape[2], device=k.device) <= last[:, None])[:, None]
    return attend_slots(q, q_sinks, k, v, sinks, filled, scale)


def attend_slots(
    q: Tensor, q_sinks: Tensor, k: Tensor, v: Tensor, sinks: int, filled: Tensor | None, scale: float
) -> AttentionOutput:
    """`attend_one` over any slots, in plain torch.

    Args:
        sinks: how many of the first slots are met as sinks are. filled: bool [R, 1 or M, K], or None for all.
    """
    mask = None if filled is None else filled[:, :, None]
    if q_sinks is q:
        return attend(q, k, v, mask, scale)
    first, rest = (
        attend(query, k[:, :, part], v[:, :, part], None if mask is None else mask[..., part], scale)
        for query, part in ((q_sinks, slice(sinks)), (q, slice(sinks, None)))
    )
    return merge(first, rest)


def attend_window(
    q: Tensor,
    q_sinks: Tensor,
    sinks_kv: tuple[Tensor, Tensor],
    window_kv: tuple[Tensor, Tensor],
    start: Tensor,
    window: int,
    scale: float,
    far: KeptKeys | None = None,
    sinks: int | None = None,
) -> AttentionOutput:
    """Attention of consecutive queries over sinks and window, block by block.

    Args:
        q, q_sinks: [B, N, C, H], as the window and as the sinks meet them; query i is at position start + i.
        sinks_kv: [B, M, S, H]. window_kv: [B, M, K, H], the K tokens up to and including the last query, in order.
        start: [R], positions of the first query. far: seen instead of the sinks, of which it
            has `sinks`.
    """
    queries, sinks = q.shape[2], sinks_kv[0].shape[2] if sinks is None else sinks
    if dispatch.pick_band(q, with_gradients(q, window_kv[0])).name == "triton":
        from ahn.ops.kernels import banded as triton

        far = far or KeptKeys.of_sinks(sinks_kv, start, queries)
        return triton.attend(q, q_sinks, window_kv, start, window, scale, far, sinks)
    before = window_kv[0].shape[2] - queries
    device = q.device
    out: list[AttentionOutput] = []
    for low in range(0, queries, QUERY_BLOCK):
        high = min(low + QUERY_BLOCK, queries)
        first = max(0, before + low - window + 1)
        at = (start[:, None] + torch.arange(low, high, device=device))[..., None]
        keys = start[:, None, None] + torch.arange(first - before, high, device=device)
        k, v = (t[:, :, first : before + high] for t in window_kv)
        part = attend(q[:, :, low:high], k, v, visible(at, keys, sinks, window), scale)
        if far is not None:
            seen = far.seen(low, high, queries)
            if seen[0].shape[2]:
                part = merge(attend(q_sinks[:, :, low:high], *seen, scale), part)
        elif sinks:
            causal = None if low >= sinks else torch.arange(sinks, device=device) <= at
            part = merge(attend(q_sinks[:, :, low:high], *sinks_kv, causal, scale), part)
        out.append(part)
    outs, norms = zip(*out, strict=True)
    return torch.cat(outs, 2), torch.cat(norms, 2)
