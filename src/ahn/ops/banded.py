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
from ahn.ops.specs import KeptKeys, Queries, Window

QUERY_BLOCK = 128  # queries attended at once: few enough that little of the band between blocks is masked


def visible(query: Tensor, key: Tensor, sinks: int, window: int) -> Tensor:
    """Which window keys a query sees, by their positions (broadcast): causal, in the window, not a sink."""
    return (key <= query) & (key > query - window) & (key >= sinks)


def attend_one(queries: Queries, k: Tensor, v: Tensor, sinks: int, last: Tensor | None, in_parts: bool = False) -> Any:
    """Attention of one new token over a ring buffer, in any order and without copying it.

    Args:
        queries: one a row. k, v: [B, M, K, H], the sinks first.
        last: [R], position of the new token where slots are not all filled: a slot above it is empty. Or None.
        in_parts: return `ahn.ops.specs.Parts`, where there are Triton kernels.

    Returns: AttentionOutput, unless `in_parts`.
    """
    if dispatch.pick_one_token(k.device.type).name == "triton":
        from ahn.ops.kernels import decode

        attend = decode.attend_parts if in_parts else decode.attend
        return attend(queries, k, v, sinks, last)
    filled = None if last is None else (torch.arange(k.shape[2], device=k.device) <= last[:, None])[:, None]
    return attend_slots(queries, k, v, sinks, filled)


def attend_slots(queries: Queries, k: Tensor, v: Tensor, sinks: int, filled: Tensor | None) -> AttentionOutput:
    """`attend_one` over any slots, in plain torch.

    Args:
        sinks: how many of the first slots are met as sinks are. filled: bool [R, 1 or M, K], or None for all.
    """
    q, q_kept, scale = queries
    mask = None if filled is None else filled[:, :, None]
    if q_kept is q:
        return attend(q, k, v, mask, scale)
    first, rest = (
        attend(query, k[:, :, part], v[:, :, part], None if mask is None else mask[..., part], scale)
        for query, part in ((q_kept, slice(sinks)), (q, slice(sinks, None)))
    )
    return merge(first, rest)


def attend_window(
    queries: Queries,
    sinks_kv: tuple[Tensor, Tensor],
    window_kv: tuple[Tensor, Tensor],
    start: Tensor,
    window: Window,
    kept: KeptKeys | None = None,
) -> AttentionOutput:
    """Attention of consecutive queries over sinks and window, block by block.

    Args:
        queries: query i is at position start + i.
        sinks_kv: [B, M, S, H]; none with `kept`.
        window_kv: [B, M, K, H], the K tokens up to and including the last query, in order.
        start: [R], positions of the first query.
        window: its keys at positions below `window.sinks` are left out, because they are met as sinks.
        kept: sinks and store, in the place of `sinks_kv`.
    """
    q, q_kept, scale = queries
    count, sinks = q.shape[2], window.sinks
    if dispatch.pick_band(q, with_gradients(q, window_kv[0])).name == "triton":
        from ahn.ops.kernels import banded as triton

        kept = kept or KeptKeys.of_sinks(sinks_kv, start, count)
        return triton.attend(queries, window_kv, start, window, kept)
    before = window_kv[0].shape[2] - count
    device = q.device
    out: list[AttentionOutput] = []
    for low in range(0, count, QUERY_BLOCK):
        high = min(low + QUERY_BLOCK, count)
        first = max(0, before + low - window.size + 1)
        at = (start[:, None] + torch.arange(low, high, device=device))[..., None]
        keys = start[:, None, None] + torch.arange(first - before, high, device=device)
        k, v = (t[:, :, first : before + high] for t in window_kv)
        part = attend(q[:, :, low:high], k, v, visible(at, keys, sinks, window.size), scale)
        if kept is not None:
            seen = kept.seen(low, high, count)
            if seen[0].shape[2]:
                part = merge(attend(q_kept[:, :, low:high], *seen, scale), part)
        elif sinks:
            causal = None if low >= sinks else torch.arange(sinks, device=device) <= at
            part = merge(attend(q_kept[:, :, low:high], *sinks_kv, causal, scale), part)
        out.append(part)
    outs, lses = zip(*out, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)
