"""Softmax attention of many queries over the window and what is kept from far behind it, in Triton. No gradients.

Letters: B batch, N query heads, M key/value heads, T queries, K far keys, H head size, S sinks, W window;
R rows of positions: 1 where all of the batch are at the same position, else B.

One program has a block of queries of one head. It goes through the part of the window that any of them sees, then
through the far keys, met by the queries as the sinks are, with one running softmax over both. Of the far keys, many
newcomers lose their place at the step at which they come: those that no query sees are left out of the list that the
programs go through, which ends for each of them where its last query does.

Under TRITON_INTERPRET=1 it runs on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ahn.attention import Far, Softmax

LOG2_E = 1.4426950408889634


def attend(
    q: Tensor,
    q_far: Tensor,
    near: tuple[Tensor, Tensor],
    start: Tensor,
    window: int,
    scale: float,
    far: Far,
    sinks: int,
) -> Softmax:
    """As `ahn.attention.attend_window`.

    Args:
        q, q_far: [B, N, T, H]. near: keys and values [B, M, L, H], the L tokens up to and including the last query.
        start: [R], the position of the first query. sinks: S; the window's keys at positions below are left out.
    """
    batch, heads, queries, size = q.shape
    kv_heads, count = far.keys.shape[1:3]
    since, until = (t.expand(batch, kv_heads, count) for t in (far.since, far.until))
    came = (since < until).cumsum(-1, dtype=torch.int32)  # so many of the keys up to each are seen at all
    listed = torch.where(since < until, came - 1, count).long()
    key = torch.arange(count, dtype=torch.int32, device=q.device).expand_as(since)
    order = key.new_zeros(batch, kv_heads, count + 1).scatter_(-1, listed, key)
    block, against, warps, stages = _blocks(q)
    q, q_far, *kv = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, q_far, *near, far.keys, far.values))
    out, norm = q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)
    _attend[(triton.cdiv(queries, block), batch * heads)](
        q, q_far, *kv, since.int().contiguous(), until.int().contiguous(), came, order, start, out, norm,
        scale * LOG2_E, queries, near[0].shape[2] - queries, min(window, 1 << 30), sinks, count, far.entering,
        *q.stride()[:3], *q_far.stride()[:3], *(n for t in kv for n in t.stride()[:3]), *out.stride()[:3],
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, WIDTH=max(16, triton.next_power_of_2(size)), BLOCK=block,
        AGAINST=against, BY_ROW=len(start) > 1, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, norm


def _blocks(q: Tensor) -> tuple[int, int, int, int]:
    """Queries of a program, keys at once, warps and loads under way: what fits into the shared memory."""
    if q.shape[2] <= 32 or q.element_size() == 4:
        return 32, 32, 4, 2
    if q.shape[-1] <= 64:
        return 128, 64, 4, 3
    hopper = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] >= 9
    return (128, 64, 8, 2) if q.shape[-1] <= 128 and hopper else (64, 32, 4, 2)


# fmt: off
@triton.jit
def _more(total, norm, highest, query, k, v, seen, scale, PRECISION: tl.constexpr):
    """A running softmax with some more keys: the weighted sum of values, the sum of weights, the highest score."""
    score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
    score = tl.where(seen, score, float("-inf"))
    now = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - now[:, None])
    fades = tl.exp2(highest - now)
    total = tl.dot(weight.to(v.dtype), v, total * fades[:, None], input_precision=PRECISION)
    return total, norm * fades + tl.sum(weight, 1), now


@triton.jit
def _attend(q, q_far, k, v, far_k, far_v, since, until, came, order, start, out, norm,
            scale, queries, before, window, sinks, count, entering,
            q_b, q_n, q_t, f_b, f_n, f_t, k_b, k_m, k_t, v_b, v_m, v_t, fk_b, fk_m, fk_t, fv_b, fv_m, fv_t,
            o_b, o_n, o_t,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
            BLOCK: tl.constexpr, AGAINST: tl.constexpr, BY_ROW: tl.constexpr, PRECISION: tl.constexpr):
    low = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK  # the last, which see the most, first
    high = tl.minimum(low + BLOCK, queries)
    row, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    i, channel = low + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real = (i < queries)[:, None] & (channel < SIZE)[None, :]
    wide = (channel < SIZE)[None, :]
    begins = tl.load(start + (row if BY_ROW else 0)).to(tl.int32)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    highest = tl.full([BLOCK], -1.0e30, tl.float32)

    query = tl.load(q + row * q_b + head * q_n + i[:, None] * q_t + channel[None, :], mask=real, other=0.0)
    k += row * k_b + kv_head * k_m
    v += row * v_b + kv_head * v_m
    first = tl.maximum(0, before + low - window + 1)
    first = tl.maximum(first, before + sinks - begins)  # what is before are sinks, or nothing
    for at in range(first, before + high, AGAINST):
        key = at + tl.arange(0, AGAINST)
        there = (key < before + high)[:, None] & wide
        keys = tl.load(k + key[:, None].to(tl.int64) * k_t + channel[None, :], mask=there, other=0.0)
        values = tl.load(v + key[:, None].to(tl.int64) * v_t + channel[None, :], mask=there, other=0.0)
        ago = i[:, None] + before - key[None, :]
        seen = (ago >= 0) & (ago < window)
        total, weights, highest = _more(total, weights, highest, query, keys, values, seen, scale, PRECISION)

    query = tl.load(q_far + row * f_b + head * f_n + i[:, None] * f_t + channel[None, :], mask=real, other=0.0)
    far_k += row * fk_b + kv_head * fk_m
    far_v += row * fv_b + kv_head * fv_m
    of_head = row * KV_HEADS + kv_head
    since += of_head * count
    until += of_head * count
    order += of_head * (count + 1)
    last = count - tl.minimum(entering, queries - high)
    there_are = tl.load(came + of_head * count + last - 1, mask=last > 0, other=0)
    for at in range(0, there_are, AGAINST):
        listed = at + tl.arange(0, AGAINST)
        is_key = listed < there_are
        key = tl.load(order + listed, mask=is_key, other=0)
        comes = tl.load(since + key, mask=is_key, other=1 << 30)
        goes = tl.load(until + key, mask=is_key, other=0)
        there = is_key[:, None] & wide
        keys = tl.load(far_k + key[:, None].to(tl.int64) * fk_t + channel[None, :], mask=there, other=0.0)
        values = tl.load(far_v + key[:, None].to(tl.int64) * fv_t + channel[None, :], mask=there, other=0.0)
        seen = (comes[None, :] <= i[:, None]) & (i[:, None] < goes[None, :])
        total, weights, highest = _more(total, weights, highest, query, keys, values, seen, scale, PRECISION)

    none = weights == 0.0
    total = total / tl.where(none, 1.0, weights)[:, None]
    place = out + row * o_b + head * o_n + i[:, None] * o_t + channel[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=real)
    log = (highest + tl.log2(tl.where(none, 1.0, weights))) * 0.6931471805599453
    tl.store(norm + (row * HEADS + head) * queries + i, log, mask=i < queries)
# fmt: on
