"""Softmax attention of many queries over the window and over what is kept behind it, in Triton. No gradients.

Letters: B batch, N query heads, M key/value heads, T queries, K kept keys, H head size, S sinks, W window;
R rows of positions: 1 where all of the batch are at the same position, else B.

One program has a block of queries of one head. It goes through the part of the window that any of them sees, then
through the kept keys, which the queries meet as they meet the sinks. One running softmax covers both. Many kept keys
are sorted first (`_in_order`). A program then reads only the keys that one of its queries sees, and all that have come
of those that both come and go; it needs a mask only for the few that come or go meanwhile. If many keys are seen by all
queries, cuDNN attends to most of them, because it is faster where there is no mask.

Under TRITON_INTERPRET=1 it runs on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops import dispatch
from ahn.ops.softmax import attend as attend_dense
from ahn.ops.softmax import merge

if TYPE_CHECKING:
    from ahn.ops.softmax import AttentionOutput
    from ahn.ops.specs import KeptKeys, Queries, Window

LOG2_E = 1.4426950408889634
FEW = 1024  # kept keys that are attended faster than they are sorted


def attend(
    queries: Queries, window_kv: tuple[Tensor, Tensor], start: Tensor, window: Window, kept: KeptKeys
) -> AttentionOutput:
    """`ahn.ops.banded.attend_window` with `kept`; the arguments are the same."""
    q, q_kept, scale = queries
    batch, heads, tokens, size = q.shape
    kv_heads, count = kept.keys.shape[1:3]
    since, until = (t.expand(batch, kv_heads, count) for t in (kept.since, kept.until))
    keys, values, below, dense = kept.keys, kept.values, None, None
    on_host: Callable[[], int] = int
    if count > FEW:
        order, below = _in_order(since, until, tokens)
        since, until = since.gather(2, order), until.gather(2, order)
        keys, values = (t.gather(2, order[..., None].expand(-1, -1, -1, size)) for t in (keys, values))
        at_once = dispatch.dense_at_once(q, count)
        dense = below[..., 0].amin() // at_once * at_once if at_once else below.new_zeros(())
        on_host = _soon(dense) if at_once else int
    times = torch.stack([since, until], 2).int()
    block, against, warps, stages = _blocks(q)
    q, q_kept, *kv = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, q_kept, *window_kv, keys, values))
    out, lse = q.new_empty(q.shape), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    _attend[(triton.cdiv(tokens, block), batch * heads)](
        q, q_kept, *kv, times, below, dense, start, out, lse,
        scale * LOG2_E, tokens, window_kv[0].shape[2] - tokens, min(window.size, 1 << 30), window.sinks, count,
        *q.stride()[:3], *q_kept.stride()[:3], *(n for t in kv for n in t.stride()[:3]), *out.stride()[:3],
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, WIDTH=max(16, triton.next_power_of_2(size)), BLOCK=block,
        AGAINST=against, SORTED=below is not None, BY_ROW=len(start) > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not (length := on_host()):
        return out, lse
    return merge(attend_dense(q_kept, keys[:, :, :length], values[:, :, :length], None, scale), (out, lse))


def _in_order(since: Tensor, until: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Kept keys [B, M, K] by a number: 0 where all T queries see them, T - until where they are there at first, where
    they come later T + since if they stay, else 2 T + since; those that nobody sees are the last.

    Returns: their order; how many have each of the numbers 0 to 3 T - 1 or a lower one, int32 [B, M, 3 T].
    """
    comes = torch.where(until >= queries, queries, 2 * queries) + since
    number = torch.where(since > 0, comes, (queries - until).clamp(min=0))
    seen = (since < until) & (until > 0) & (since < queries)
    number, order = torch.where(seen, number, 3 * queries).int().sort(-1)
    numbers = torch.arange(3 * queries, dtype=torch.int32, device=since.device).repeat(*since.shape[:2], 1)
    return order, torch.searchsorted(number, numbers, right=True, out_int32=True)


def _soon(number: Tensor) -> Callable[[], int]:
    """A function that gives a number on the device to the host. It waits only for what was launched before `_soon`."""
    if number.device.type != "cuda":
        return lambda: int(number)
    copy = torch.empty_like(number, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def known() -> int:
        event.synchronize()
        return int(copy)

    return known


def _blocks(q: Tensor) -> tuple[int, int, int, int]:
    """Queries of a program, keys at once, warps, loads under way: as many as fit into the shared memory."""
    if q.shape[2] <= 32 or q.element_size() == 4:
        return 32, 32, 4, 2
    if q.shape[-1] <= 64:
        return 128, 64, 4, 2
    if q.shape[-1] > 128:
        return 64, 32, 4, 2
    return (128, 64, 8, 3) if _shared(q.device) >= 150_000 else (64, 64, 4, 2)


@functools.cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 0
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


# fmt: off
@triton.jit
def _tile(x, token, step, channel, there, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Tokens of x [.., H], zeros where there are none."""
    x += token[:, None].to(tl.int64) * step + channel[None, :]
    if MASKED:
        return tl.load(x, mask=there[:, None] & (channel < SIZE)[None, :], other=0.0)
    if channel.shape[0] != SIZE:
        return tl.load(x, mask=(channel < SIZE)[None, :], other=0.0)
    return tl.load(x)


@triton.jit
def _more(total, weights, highest, query, k, v, seen, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """A running softmax with some more keys: the weighted sum of values, the sum of weights, the highest score."""
    score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    now = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - now[:, None])
    fades = tl.exp2(highest - now)
    total = tl.dot(weight.to(v.dtype), v, total * fades[:, None], input_precision=PRECISION)
    return total, weights * fades + tl.sum(weight, 1), now


@triton.jit
def _of_window(total, weights, highest, query, k, v, k_t, v_t, low, high, end, i, before, window, channel, scale,
               SIZE: tl.constexpr, AGAINST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """... with the window's keys low .. high of `end`."""
    for at in range(low, high, AGAINST):
        key = at + tl.arange(0, AGAINST)
        keys = _tile(k, key, k_t, channel, key < end, SIZE, MASKED)
        values = _tile(v, key, v_t, channel, key < end, SIZE, MASKED)
        ago = i[:, None] + before - key[None, :]
        seen = (ago >= 0) & (ago < window)
        total, weights, highest = _more(total, weights, highest, query, keys, values, seen, scale, MASKED, PRECISION)
    return total, weights, highest


@triton.jit
def _of_kept(total, weights, highest, query, k, v, k_t, v_t, a, a_end, b, b_end, c, c_end, i, times, count, channel,
            scale, SIZE: tl.constexpr, AGAINST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """... with the kept keys a .. a_end, b .. b_end and c .. c_end."""
    in_a, in_b, in_c = tl.cdiv(a_end - a, AGAINST), tl.cdiv(b_end - b, AGAINST), tl.cdiv(c_end - c, AGAINST)
    for step in range(0, in_a + in_b + in_c):
        is_a, is_c = step < in_a, step >= in_a + in_b
        at = tl.where(is_a, a + step * AGAINST, b + (step - in_a) * AGAINST)
        at = tl.where(is_c, c + (step - in_a - in_b) * AGAINST, at)
        end = tl.where(is_a, a_end, tl.where(is_c, c_end, b_end))
        key = at + tl.arange(0, AGAINST)
        there = key < end
        keys = _tile(k, key, k_t, channel, there, SIZE, MASKED)
        values = _tile(v, key, v_t, channel, there, SIZE, MASKED)
        seen = there[None, :]
        if MASKED:
            comes = tl.load(times + key, mask=there, other=1 << 30)
            goes = tl.load(times + count + key, mask=there, other=0)
            seen = (comes[None, :] <= i[:, None]) & (i[:, None] < goes[None, :])
        total, weights, highest = _more(total, weights, highest, query, keys, values, seen, scale, MASKED, PRECISION)
    return total, weights, highest


@triton.jit
def _attend(q, q_kept, k, v, kept_k, kept_v, times, below, dense, start, out, lse,
            scale, queries, before, window, sinks, count,
            q_b, q_n, q_t, f_b, f_n, f_t, k_b, k_m, k_t, v_b, v_m, v_t, fk_b, fk_m, fk_t, fv_b, fv_m, fv_t,
            o_b, o_n, o_t,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
            BLOCK: tl.constexpr, AGAINST: tl.constexpr, SORTED: tl.constexpr, BY_ROW: tl.constexpr,
            PRECISION: tl.constexpr):
    low = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK  # the last, which see the most, first
    high = tl.minimum(low + BLOCK, queries)
    row, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    i, channel = low + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    begins = tl.load(start + (row if BY_ROW else 0)).to(tl.int32)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    highest = tl.full([BLOCK], -1.0e30, tl.float32)  # of queries that have seen no key

    query = _tile(q + row * q_b + head * q_n, i, q_t, channel, i < queries, SIZE, True)
    k += row * k_b + kv_head * k_m
    v += row * v_b + kv_head * v_m
    end = before + high
    first = tl.maximum(tl.maximum(0, before + low - window + 1), before + sinks - begins)  # what is before are sinks
    all_from = first + tl.cdiv(tl.maximum(0, end - window - first), AGAINST) * AGAINST  # from here all queries see ...
    all_from = tl.minimum(all_from, first + tl.cdiv(tl.maximum(0, end - first), AGAINST) * AGAINST)
    all_to = all_from + tl.maximum(0, before + low + 1 - all_from) // AGAINST * AGAINST  # ... the keys up to here
    total, weights, highest = _of_window(total, weights, highest, query, k, v, k_t, v_t, first, all_from, end, i,
                                         before, window, channel, scale, SIZE, AGAINST, True, PRECISION)
    total, weights, highest = _of_window(total, weights, highest, query, k, v, k_t, v_t, all_from, all_to, end, i,
                                         before, window, channel, scale, SIZE, AGAINST, False, PRECISION)
    total, weights, highest = _of_window(total, weights, highest, query, k, v, k_t, v_t, all_to, end, end, i,
                                         before, window, channel, scale, SIZE, AGAINST, True, PRECISION)

    query = _tile(q_kept + row * f_b + head * f_n, i, f_t, channel, i < queries, SIZE, True)
    kept_k += row * fk_b + kv_head * fk_m
    kept_v += row * fv_b + kv_head * fv_m
    of_head = row * KV_HEADS + kv_head
    times += of_head * 2 * count
    if SORTED:
        below += of_head * 3 * queries
        apart = tl.load(dense)
        whole, some = tl.load(below + queries - high), tl.load(below + queries - low - 1)  # there at first
        whole = apart + (whole - apart) // AGAINST * AGAINST
        stay = tl.load(below + queries)  # the first that comes and stays
        stay_whole, stay_some = tl.load(below + queries + low), tl.load(below + queries + high - 1)
        stay_whole = stay + (stay_whole - stay) // AGAINST * AGAINST
        pass_by, pass_some = tl.load(below + 2 * queries), tl.load(below + 2 * queries + high - 1)
        total, weights, highest = _of_kept(total, weights, highest, query, kept_k, kept_v, fk_t, fv_t, apart, whole,
                                           stay, stay_whole, 0, 0, i, times, count, channel, scale,
                                           SIZE, AGAINST, False, PRECISION)
        total, weights, highest = _of_kept(total, weights, highest, query, kept_k, kept_v, fk_t, fv_t, whole, some,
                                           stay_whole, stay_some, pass_by, pass_some, i, times, count, channel, scale,
                                           SIZE, AGAINST, True, PRECISION)
    else:
        total, weights, highest = _of_kept(total, weights, highest, query, kept_k, kept_v, fk_t, fv_t, 0, count, 0, 0,
                                           0, 0, i, times, count, channel, scale, SIZE, AGAINST, True, PRECISION)

    none = weights == 0.0
    total = total / tl.where(none, 1.0, weights)[:, None]
    place = out + row * o_b + head * o_n + i[:, None].to(tl.int64) * o_t + channel[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(i < queries)[:, None] & (channel < SIZE)[None, :])
    log = (highest + tl.log2(tl.where(none, 1.0, weights))) * 0.6931471805599453
    tl.store(lse + (row * HEADS + head) * queries + i, log, mask=i < queries)
# fmt: on
