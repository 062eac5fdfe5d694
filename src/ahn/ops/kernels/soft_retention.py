"""Causal attention in which tokens far back count less, with the gradients of all its inputs, in Triton.

Letters: B batch, N query heads, M key/value heads, T tokens, H head size, Q blocks of queries, W window.

It trains the gates of a store (`ahn.train.gates`). A key that is W or more back, and no sink, has a weight for each
block of queries; the log of the weight is added to its score. In the forward kernel a program has some queries of one
head. The backward pass is two kernels: one is cut in the same way, and in the other a program has some keys of one
key/value head and all queries that see them. Scores exist for one tile at a time.

Under TRITON_INTERPRET=1 it runs on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.specs import Window

Numbers = tuple[tuple[Any, ...], dict[str, Any]]  # given by value; fixed when a kernel is compiled
LOG2_E = 1.4426950408889634
HALVINGS = 30  # of the interval that `least` is sought in
AT_ONCE = 1024  # scores


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, window: Window, scale: float) -> Tensor:
    """[B, N, T, H], in the order of memory of [B, T, N, H].

    Args:
        q: [B, N, T, H]. k, v: [B, M, T, H]. kept: [B, M, Q, T] float32, log of the weight of each token for each block
            of queries; block i has those from i * ceil(T / Q) on.
    """
    out: Tensor = _Attend.apply(q, k, v, kept, _numbers(q, k, kept, window, scale))
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, numbers: Numbers) -> Tensor:
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        kept = kept.contiguous()
        batch, heads, tokens, size = q.shape
        out = q.new_empty(batch, tokens, heads, size).transpose(1, 2)
        lses = q.new_empty(batch, heads, tokens, dtype=torch.float32)
        block = 128 if q.element_size() == 2 and size <= 64 else 32 if q.element_size() == 4 else 64
        grid = (kept.shape[2] * triton.cdiv(numbers[0][2], block), batch * heads)
        _forward[grid](q, k, v, kept, out, lses, *numbers[0], *_steps(q, k, v, out), **numbers[1] | {"BLOCK": block})
        ctx.save_for_backward(q, k, v, kept, out, lses)
        ctx.numbers = numbers
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kept, out, lses = ctx.saved_tensors
        d_out = gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
        delta = (d_out.float() * out.float()).sum(-1)
        d_q, d_k, d_v, d_kept = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.zeros_like(kept)
        numbers, sizes = ctx.numbers
        inputs = q, k, v, kept, d_out, lses, delta
        by_query = (kept.shape[2] * triton.cdiv(numbers[2], sizes["BLOCK"]), q.shape[0] * q.shape[1])
        _backward_q[by_query](*inputs, d_q, *numbers, *_steps(q, k, v, d_out, d_q), **sizes)
        by_key = (triton.cdiv(k.shape[2], sizes["AGAINST"]), k.shape[0] * k.shape[1])
        _backward_kv[by_key](*inputs, d_k, d_v, d_kept, *numbers, *_steps(q, k, v, d_out, d_k, d_v), **sizes)
        return d_q, d_k, d_v, d_kept, None


def _numbers(q: Tensor, k: Tensor, kept: Tensor, window: Window, scale: float) -> Numbers:
    """The numbers that all kernels are given."""
    tokens, size, tile = q.shape[2], q.shape[3], 32 if q.element_size() == 4 else 64
    fixed = {
        "HEADS": q.shape[1], "KV_HEADS": k.shape[1], "BLOCKS": kept.shape[2], "SIZE": size,
        "WIDTH": max(16, triton.next_power_of_2(size)), "BLOCK": tile, "AGAINST": tile,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    return (scale * LOG2_E, tokens, triton.cdiv(tokens, kept.shape[2]), window.sinks, window.size), fixed


def _steps(*tensors: Tensor) -> list[int]:
    return [step for t in tensors for step in t.stride()[:3]]


def least(scores: Tensor, blocks: int, slots: int, window: Window, warmth: float, always: float) -> Tensor:
    """[B, M, Q]: for each block, take the tokens behind the window when its first query comes. Subtracted from their
    scores, this number makes the sum of sigmoid(score / warmth) equal `slots`; `always` where the slots hold them all.

    Args:
        scores: [B, M, T].
    """
    scores = scores.contiguous()
    found = scores.new_empty(*scores.shape[:2], blocks)
    tokens = scores.shape[2]
    _least[(blocks, scores.shape[0] * scores.shape[1])](
        scores, found, tokens, triton.cdiv(tokens, blocks), slots, window.sinks, window.size, warmth, always,
        HALVINGS=HALVINGS, AT_ONCE=AT_ONCE,
    )  # fmt: skip
    return found


# fmt: off
@triton.jit
def _least(scores, found, tokens, size, slots, sinks, window, warmth, always,
           HALVINGS: tl.constexpr, AT_ONCE: tl.constexpr):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    scores += head * tokens
    end = tl.minimum(block * size - window + 1, tokens)  # of what is behind the window
    low, high = float("inf"), float("-inf")
    for at in range(0, tokens, AT_ONCE):
        token = at + tl.arange(0, AT_ONCE)
        low = tl.minimum(low, tl.min(tl.load(scores + token, mask=token < tokens, other=float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.load(scores + token, mask=token < tokens, other=float("-inf")), 0))
    low, high = low - 20 * warmth, high + 20 * warmth
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        total = 0.0
        for at in range(sinks, end, AT_ONCE):
            token = at + tl.arange(0, AT_ONCE)
            score = tl.load(scores + token, mask=token < end, other=float("-inf"))
            total += tl.sum(1 / (1 + tl.exp((middle - score) / warmth)), 0)
        fits = total <= slots
        low, high = tl.where(fits, low, middle), tl.where(fits, middle, high)
    tl.store(found + head * tl.num_programs(0) + block, tl.where(end - sinks > slots, high, always))


@triton.jit
def _tile(x, token, step, channel, there, SIZE: tl.constexpr):
    """Tokens of x [.., H], zeros where there are none."""
    place = x + token[:, None].to(tl.int64) * step + channel[None, :]
    return tl.load(place, mask=there[:, None] & (channel < SIZE)[None, :], other=0.0)


@triton.jit
def _put(x, value, token, step, channel, there, SIZE: tl.constexpr):
    place = x + token[:, None].to(tl.int64) * step + channel[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=there[:, None] & (channel < SIZE)[None, :])


@triton.jit
def _scores(query, keys, log_weight, i, j, end, tokens, scale, sinks, window, PRECISION: tl.constexpr):
    """The scores of one tile, times log2(e), -inf for keys that are not seen; and which keys are behind the window."""
    ago = i[:, None] - j[None, :]
    behind = (ago >= window) & (j >= sinks)[None, :]
    score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    score += tl.where(behind, log_weight[None, :] * 1.4426950408889634, 0.0)
    return tl.where((ago >= 0) & (i < end)[:, None] & (j < tokens)[None, :], score, float("-inf")), behind


@triton.jit
def _queries(tokens, size, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """The queries of a program: their block, the first of them, their end. Those that see the most come first."""
    tiles = tl.cdiv(size, BLOCK)
    tile = BLOCKS * tiles - 1 - tl.program_id(0)
    block = tile // tiles
    low = block * size + tile % tiles * BLOCK
    return block, low, tl.minimum(tl.minimum(low + BLOCK, (block + 1) * size), tokens)


@triton.jit
def _forward(q, k, v, kept, out, lses, scale, tokens, size, sinks, window,
             q_b, q_n, q_t, k_b, k_m, k_t, v_b, v_m, v_t, o_b, o_n, o_t,
             HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
             WIDTH: tl.constexpr, BLOCK: tl.constexpr, AGAINST: tl.constexpr, PRECISION: tl.constexpr):
    block, low, end = _queries(tokens, size, BLOCKS, BLOCK)
    row, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    i, channel = low + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    query = _tile(q + row * q_b + head * q_n, i, q_t, channel, i < end, SIZE)
    k += row * k_b + kv_head * k_m
    v += row * v_b + kv_head * v_m
    kept += ((row * KV_HEADS + kv_head) * BLOCKS + block) * tokens
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    highest = tl.full([BLOCK], -1.0e30, tl.float32)  # of queries that have seen no key
    for at in range(0, end, AGAINST):
        j = at + tl.arange(0, AGAINST)
        keys = _tile(k, j, k_t, channel, j < tokens, SIZE)
        values = _tile(v, j, v_t, channel, j < tokens, SIZE)
        log_weight = tl.load(kept + j, mask=j < tokens, other=0.0)
        score, _ = _scores(query, keys, log_weight, i, j, end, tokens, scale, sinks, window, PRECISION)
        now = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - now[:, None])
        fades = tl.exp2(highest - now)
        total = tl.dot(weight.to(values.dtype), values, total * fades[:, None], input_precision=PRECISION)
        weights, highest = weights * fades + tl.sum(weight, 1), now
    weights = tl.where(i < end, weights, 1.0)
    _put(out + row * o_b + head * o_n, total / weights[:, None], i, o_t, channel, i < end, SIZE)
    tl.store(lses + (row * HEADS + head) * tokens + i, highest + tl.log2(weights), mask=i < end)


@triton.jit
def _backward_q(q, k, v, kept, d_out, lses, delta, d_q, scale, tokens, size, sinks, window,
                q_b, q_n, q_t, k_b, k_m, k_t, v_b, v_m, v_t, o_b, o_n, o_t, dq_b, dq_n, dq_t,
                HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
                WIDTH: tl.constexpr, BLOCK: tl.constexpr, AGAINST: tl.constexpr, PRECISION: tl.constexpr):
    block, low, end = _queries(tokens, size, BLOCKS, BLOCK)
    row, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    i, channel = low + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    query = _tile(q + row * q_b + head * q_n, i, q_t, channel, i < end, SIZE)
    given = _tile(d_out + row * o_b + head * o_n, i, o_t, channel, i < end, SIZE)
    of_head = (row * HEADS + head) * tokens
    lse = tl.load(lses + of_head + i, mask=i < end, other=0.0)
    less = tl.load(delta + of_head + i, mask=i < end, other=0.0)
    k += row * k_b + kv_head * k_m
    v += row * v_b + kv_head * v_m
    kept += ((row * KV_HEADS + kv_head) * BLOCKS + block) * tokens
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for at in range(0, end, AGAINST):
        j = at + tl.arange(0, AGAINST)
        keys = _tile(k, j, k_t, channel, j < tokens, SIZE)
        values = _tile(v, j, v_t, channel, j < tokens, SIZE)
        log_weight = tl.load(kept + j, mask=j < tokens, other=0.0)
        score, _ = _scores(query, keys, log_weight, i, j, end, tokens, scale, sinks, window, PRECISION)
        weight = tl.exp2(score - lse[:, None])
        wanted = tl.dot(given, tl.trans(values), input_precision=PRECISION)
        d_score = weight * (wanted - less[:, None])
        total = tl.dot(d_score.to(keys.dtype), keys, total, input_precision=PRECISION)
    _put(d_q + row * dq_b + head * dq_n, total * (scale / 1.4426950408889634), i, dq_t, channel, i < end, SIZE)


@triton.jit
def _backward_kv(q, k, v, kept, d_out, lses, delta, d_k, d_v, d_kept, scale, tokens, size, sinks, window,
                 q_b, q_n, q_t, k_b, k_m, k_t, v_b, v_m, v_t, o_b, o_n, o_t, dk_b, dk_m, dk_t, dv_b, dv_m, dv_t,
                 HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
                 WIDTH: tl.constexpr, BLOCK: tl.constexpr, AGAINST: tl.constexpr, PRECISION: tl.constexpr):
    low = tl.program_id(0) * AGAINST
    row, kv_head = (tl.program_id(1) // KV_HEADS).to(tl.int64), tl.program_id(1) % KV_HEADS
    j, channel = low + tl.arange(0, AGAINST), tl.arange(0, WIDTH)
    keys = _tile(k + row * k_b + kv_head * k_m, j, k_t, channel, j < tokens, SIZE)
    values = _tile(v + row * v_b + kv_head * v_m, j, v_t, channel, j < tokens, SIZE)
    of_head = (row * KV_HEADS + kv_head) * BLOCKS * tokens
    by_key = tl.zeros([AGAINST, WIDTH], tl.float32)
    by_value = tl.zeros([AGAINST, WIDTH], tl.float32)
    for block in range(low // size, BLOCKS):
        log_weight = tl.load(kept + of_head + block * tokens + j, mask=j < tokens, other=0.0)
        by_weight = tl.zeros([AGAINST], tl.float32)
        first, end = tl.maximum(block * size, low), tl.minimum((block + 1) * size, tokens)
        for group in range(HEADS // KV_HEADS):
            head = kv_head * (HEADS // KV_HEADS) + group
            queries, outs = q + row * q_b + head * q_n, d_out + row * o_b + head * o_n
            numbers = (row * HEADS + head) * tokens
            for at in range(first, end, BLOCK):
                i = at + tl.arange(0, BLOCK)
                query = _tile(queries, i, q_t, channel, i < end, SIZE)
                given = _tile(outs, i, o_t, channel, i < end, SIZE)
                lse = tl.load(lses + numbers + i, mask=i < end, other=0.0)
                less = tl.load(delta + numbers + i, mask=i < end, other=0.0)
                score, behind = _scores(query, keys, log_weight, i, j, end, tokens, scale, sinks, window, PRECISION)
                weight = tl.exp2(score - lse[:, None])
                by_value = tl.dot(tl.trans(weight.to(given.dtype)), given, by_value, input_precision=PRECISION)
                wanted = tl.dot(given, tl.trans(values), input_precision=PRECISION)
                d_score = weight * (wanted - less[:, None])
                by_key = tl.dot(tl.trans(d_score.to(query.dtype)), query, by_key, input_precision=PRECISION)
                by_weight += tl.sum(tl.where(behind, d_score, 0.0), 0)
        tl.store(d_kept + of_head + block * tokens + j, by_weight, mask=j < tokens)
    _put(d_k + row * dk_b + kv_head * dk_m, by_key * (scale / 1.4426950408889634), j, dk_t, channel, j < tokens, SIZE)
    _put(d_v + row * dv_b + kv_head * dv_m, by_value, j, dv_t, channel, j < tokens, SIZE)
# fmt: on
