"""One new token a row, in Triton, on its way into the memory: rotated, put into the ring, and the token that it evicts
there against those of the store. No gradients.

Letters: B batch, N query heads, M key/value heads, H head size, D hidden size, S sinks;
R rows of positions: 1 where all of the batch are at the same position, else B.

Each function does what plain torch does elsewhere and is tested against it: `rotate` is the base's rotation and
`Rotary.rotate` after it, `exchange` is `LayerMemory.exchange`, `displace` is `ahn.ops.eviction.rank` and
`StoringMemory.swap` between the rotations of keys into the store and out of it, `put_score` is `ahn.stores.learned` and
`StoringMemory.put_score`.

Under TRITON_INTERPRET=1 they run on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.kernels.launch import options, release, wait
from ahn.ops.ranks import NOBODY
from ahn.ops.specs import Gate, StoredRotation

GATE_ROWS = 1  # of a store's gate by one program: each waits for its weights once
SLOTS = 8192  # of a store, looked at at once by the one program of a head


def rotate(
    q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], further: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, N, 1, H] and k [B, M, 1, H], the halves of H rotated into each other by `angles`, cos and sin
    [1 or B, 1, H]; and these queries rotated once more by `further`, [1 or B, 1, H] float32, or the same tensor."""
    batch, heads, _, size = q.shape
    kv_heads = k.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    cos, sin, *more = (t.contiguous() for t in (*angles, *(further or ())))
    more_cos, more_sin = more or (None, None)
    rotated_q, rotated_k = q.new_empty(q.shape), k.new_empty(k.shape)
    twice = rotated_q if further is None else q.new_empty(q.shape)
    _rotate[(batch, heads + kv_heads)](
        q, k, cos, sin, more_cos, more_sin, rotated_q, rotated_k, twice,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, WIDTH=triton.next_power_of_2(size), BY_ROW=len(cos) > 1,
        MORE_BY_ROW=bool(more) and len(more[0]) > 1, num_warps=1, **options(q.device.type),
    )  # fmt: skip
    return rotated_q, rotated_k, twice


def exchange(memory: Any, start: Tensor, k: Tensor, v: Tensor, inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Put one token a row, at positions `start` [R] on the device, into its slot of a `LayerMemory`; returns keys,
    values [B, M, 1, H] and gate inputs [B, 1, gates * N] of what was there."""
    batch, kv_heads, _, size = k.shape
    old_k, old_v = (torch.empty_like(k, memory_format=torch.contiguous_format) for _ in range(2))
    gated = inputs is not None and memory.inputs is not None
    new = inputs.contiguous() if inputs is not None else None
    old_inputs = torch.empty_like(new) if new is not None else None
    gates = new.shape[-1] if new is not None else 1
    forever = 1 << 60
    _exchange[(batch, kv_heads + (1 if gated else 0))](
        memory.keys, memory.values, memory.inputs, k, v, new, old_k, old_v, old_inputs, start,
        memory.sinks, memory.shift, forever if memory.window is None else memory.window, memory.keys.shape[2],
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        HEADS=kv_heads, SIZE=size, WIDTH=triton.next_power_of_2(size), GATES=gates,
        GATE_WIDTH=triton.next_power_of_2(gates), GATED=gated, BY_ROW=len(start) > 1, **options(k.device.type),
    )  # fmt: skip
    return (old_k, old_v, old_inputs) if old_inputs is not None else (old_k, old_v)


def displace(
    memory: Any, start: Tensor, span: int, rotation: StoredRotation | None, tokens: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The tokens that those at positions `start` [R] on the device evict from the window, against the slots of a
    `StoringMemory`: returns the tokens that each head evicts, and their ranks [B, M, 1].

    Args:
        span: tokens that are judged together. rotation: of the keys.
        tokens: evicted from the window: keys and values [B, M, 1, H] and, if there is a cell, gate inputs
            [B, 1, gates * N].
    """
    k, v, *inputs = (t.contiguous() for t in tokens)
    new = inputs[0] if inputs else None
    batch, kv_heads, _, size = k.shape
    evicted_k, evicted_v = torch.empty_like(k), torch.empty_like(v)
    evicted = None if new is None else torch.empty_like(new)
    ranks = k.new_empty(batch, kv_heads, 1, dtype=torch.int64)
    group = 1 if new is None else memory.state.shape[1] // kv_heads
    gates = 1 if new is None else new.shape[-1] // (group * kv_heads)
    stored = memory.ranks.shape[2]
    rotation = rotation or StoredRotation(None, False, 0, 0)
    half = 0 if rotation.frequencies is None else len(rotation.frequencies)
    block = min(SLOTS, triton.next_power_of_2(stored))
    _displace[(batch, kv_heads)](
        memory.keys, memory.values, memory.inputs, memory.ranks, memory.scores, k, v, new,
        evicted_k, evicted_v, evicted, ranks, start, rotation.frequencies,
        memory.sinks, memory.window, memory.keys.shape[2], stored, memory.scores.shape[2], span,
        HEADS=kv_heads, SIZE=size, WIDTH=triton.next_power_of_2(size), GATES=gates, GROUP=group,
        GATE_WIDTH=triton.next_power_of_2(gates * group), GATED=new is not None, BY_ROW=len(start) > 1,
        BLOCK=block, num_warps=max(4, block // 256), NOBODY=NOBODY, HIGHEST=-1 - NOBODY, HALF=half,
        ENTERS=rotation.enters, BY_POSITION=rotation.by_position, BY_SINKS=rotation.by_sinks, **options(k.device.type),
    )  # fmt: skip
    return (evicted_k, evicted_v, *(() if evicted is None else (evicted,))), ranks


def put_score(gate: Gate, memory: Any, start: Tensor, x: Tensor) -> None:
    """Scores of one token a row, at positions `start` [R] on the device, into their slots of a `StoringMemory`. Nothing
    else of a step needs them, so this may be launched on another stream.

    Args:
        x: [B, 1, D].
    """
    batch, width = x.shape[0], gate.inner.weight.shape[0]
    x, inner = x.contiguous(), x.new_empty(batch, width, dtype=torch.float32)
    _gate[(batch, triton.cdiv(width, GATE_ROWS))](
        x, gate.inner.weight, gate.inner.bias, inner, width, EPSILON=gate.epsilon, LENGTH=x.shape[-1], ROWS=GATE_ROWS,
        BLOCK=min(2048, triton.next_power_of_2(x.shape[-1])), **options(x.device.type, apart=True),
    )  # fmt: skip
    heads = memory.scores.shape[1]
    _put_score[(batch,)](
        inner, gate.outer.weight, gate.outer.bias, gate.decay, memory.scores, start, gate.unit, memory.scores.shape[2],
        HEADS=heads, HEAD_WIDTH=triton.next_power_of_2(heads), LENGTH=width, WIDTH=triton.next_power_of_2(width),
        BY_ROW=len(start) > 1, **options(x.device.type, apart=True),
    )  # fmt: skip


@triton.jit
def _rotate(
    q, k, cos, sin, more_cos, more_sin, rotated_q, rotated_k, twice, q_batch, q_head, k_batch, k_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BY_ROW: tl.constexpr,
    MORE_BY_ROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row, of queries or of keys. Each number and the one half a head away are rotated together."""
    release(PDL)
    wait(PDL)
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    inside = channel < SIZE
    other = tl.where(channel < SIZE // 2, channel + SIZE // 2, channel - SIZE // 2)
    sign = tl.where(channel < SIZE // 2, -1.0, 1.0)
    if head < HEADS:
        source = q + batch * q_batch + head * q_head
        target = rotated_q + (batch * HEADS + head) * SIZE
    else:
        source = k + batch * k_batch + (head - HEADS) * k_head
        target = rotated_k + (batch * KV_HEADS + head - HEADS) * SIZE
    mine = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
    row = batch * SIZE if BY_ROW else 0
    rotated = mine * tl.load(cos + row + channel, mask=inside, other=0.0).to(tl.float32)
    rotated += sign * theirs * tl.load(sin + row + channel, mask=inside, other=0.0).to(tl.float32)
    rotated = rotated.to(rotated_q.dtype.element_ty)
    tl.store(target + channel, rotated, mask=inside)
    if more_cos is not None:
        across = theirs * tl.load(cos + row + other, mask=inside, other=0.0).to(tl.float32)
        across -= sign * mine * tl.load(sin + row + other, mask=inside, other=0.0).to(tl.float32)
        across = across.to(rotated_q.dtype.element_ty).to(tl.float32)
        more = batch * SIZE if MORE_BY_ROW else 0
        again = rotated.to(tl.float32) * tl.load(more_cos + more + channel, mask=inside, other=0.0)
        again += sign * across * tl.load(more_sin + more + channel, mask=inside, other=0.0)
        place = twice + (batch * HEADS + head) * SIZE + channel
        tl.store(place, again.to(twice.dtype.element_ty), mask=inside & (head < HEADS))


@triton.jit
def _exchange(
    keys, values, inputs, k, v, new, old_k, old_v, old, start, sinks, shift, window, slots,
    k_batch, k_head, v_batch, v_head,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, GATES: tl.constexpr, GATE_WIDTH: tl.constexpr,
    GATED: tl.constexpr, BY_ROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One key/value head of one row, or its gate inputs."""
    release(PDL)
    wait(PDL)
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(start + (batch if BY_ROW else 0))
    slot = tl.where(position < sinks, position, sinks + shift + (position - sinks) % window)
    channel = tl.arange(0, WIDTH)
    if head < HEADS:
        inside = channel < SIZE
        place = ((batch * HEADS + head) * slots + slot) * SIZE + channel
        out = (batch * HEADS + head) * SIZE + channel
        tl.store(old_k + out, tl.load(keys + place, mask=inside), mask=inside)
        tl.store(old_v + out, tl.load(values + place, mask=inside), mask=inside)
        tl.store(keys + place, tl.load(k + batch * k_batch + head * k_head + channel, mask=inside), mask=inside)
        tl.store(values + place, tl.load(v + batch * v_batch + head * v_head + channel, mask=inside), mask=inside)
    elif GATED:
        gate = tl.arange(0, GATE_WIDTH)
        there = (batch * slots + slot) * GATES + gate
        tl.store(old + batch * GATES + gate, tl.load(inputs + there, mask=gate < GATES), mask=gate < GATES)
        tl.store(inputs + there, tl.load(new + batch * GATES + gate, mask=gate < GATES), mask=gate < GATES)


@triton.jit
def _displace(
    keys, values, inputs, ranks, scores, k, v, new, evicted_k, evicted_v, evicted, evicted_ranks, start, frequencies,
    sinks, window, slots, stored, kept, span,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, GATES: tl.constexpr, GROUP: tl.constexpr,
    GATE_WIDTH: tl.constexpr, GATED: tl.constexpr, BY_ROW: tl.constexpr, BLOCK: tl.constexpr, NOBODY: tl.constexpr,
    HIGHEST: tl.constexpr, HALF: tl.constexpr, ENTERS: tl.constexpr, BY_POSITION: tl.constexpr,
    BY_SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One key/value head of one row."""
    release(PDL)
    wait(PDL)
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = batch * HEADS + head
    now = tl.load(start + (batch if BY_ROW else 0))
    position = now - window
    first = now + span - 1 - (position - sinks) % span  # the oldest score of its span, L positions later
    best = float("-inf")
    for i in range(0, span):
        best = tl.maximum(best, tl.load(scores + row * kept + (first + i) % kept))
    best = tl.where(best == 0.0, 0.0, best)  # one zero
    bits = (best.to(tl.int32, bitcast=True).to(tl.int64) + 0x400) & -0x800
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = tl.where(position >= sinks, (ordered << 32) | position, NOBODY)

    lowest = tl.full([BLOCK], HIGHEST, tl.int64)
    where = tl.zeros([BLOCK], tl.int32)
    for low in range(0, stored, BLOCK):
        at = low + tl.arange(0, BLOCK)
        held = tl.load(ranks + row * stored + at, mask=at < stored, other=HIGHEST)
        where = tl.where(held < lowest, at, where)
        lowest = tl.minimum(lowest, held)
    least = tl.min(lowest, 0)
    slot = tl.min(tl.where(lowest == least, where, stored), 0)
    wins = rank > least
    tl.debug_barrier()  # others of this program may still read the ranks
    tl.store(ranks + row * stored + slot, tl.where(wins, rank, least))
    out_rank = tl.where(wins, least, rank)
    tl.store(evicted_ranks + row, out_rank)

    channel = tl.arange(0, WIDTH)
    inside = channel < SIZE
    source = (row * slots + sinks + slot) * SIZE + channel
    old = tl.load(keys + source, mask=inside)
    mine = tl.load(k + row * SIZE + channel, mask=inside)
    gone = tl.where(wins, old, mine)
    if HALF:  # the other of a pair goes along
        rotated = channel < 2 * HALF
        sign = tl.where(channel < HALF, -1.0, 1.0)
        step = tl.where(rotated, tl.where(channel < HALF, HALF, -HALF), 0)
        angle = tl.load(frequencies + channel % HALF, mask=rotated, other=0.0).to(tl.float32)
        old_other = tl.load(keys + source + step, mask=inside)
        mine_other = tl.load(k + row * SIZE + channel + step, mask=inside)
        if ENTERS:
            by = angle * (sinks - tl.maximum(position, 0)).to(tl.float32)
            cos, sin = tl.cos(by), sign * tl.sin(by)
            x, y = mine.to(tl.float32), mine_other.to(tl.float32)
            mine = tl.where(rotated, x * cos + y * sin, x).to(old.dtype)
            mine_other = tl.where(rotated, y * cos - x * sin, y).to(old.dtype)
        gone, gone_other = tl.where(wins, old, mine), tl.where(wins, old_other, mine_other)
        by = angle * (BY_POSITION * (out_rank & 0xFFFFFFFF) + BY_SINKS * sinks).to(tl.float32)
        x = gone.to(tl.float32)
        x = x * tl.cos(by) + gone_other.to(tl.float32) * (sign * tl.sin(by))
        gone = tl.where(rotated, x, gone.to(tl.float32)).to(old.dtype)
        tl.debug_barrier()  # others of this program read the slots that are written now
    tl.store(evicted_k + row * SIZE + channel, gone, mask=inside)
    tl.store(keys + source, tl.where(wins, mine, old), mask=inside)
    old = tl.load(values + source, mask=inside)
    mine = tl.load(v + row * SIZE + channel, mask=inside)
    tl.store(evicted_v + row * SIZE + channel, tl.where(wins, old, mine), mask=inside)
    tl.store(values + source, tl.where(wins, mine, old), mask=inside)
    if GATED:
        number = tl.arange(0, GATE_WIDTH)
        inside = number < GATES * GROUP
        gate = number // GROUP * (HEADS * GROUP) + head * GROUP + number % GROUP
        source = (batch * slots + sinks + slot) * (GATES * HEADS * GROUP) + gate
        target = batch * (GATES * HEADS * GROUP) + gate
        old = tl.load(inputs + source, mask=inside)
        mine = tl.load(new + target, mask=inside)
        tl.store(evicted + target, tl.where(wins, old, mine), mask=inside)
        tl.store(inputs + source, tl.where(wins, mine, old), mask=inside)


@triton.jit
def _gate(
    x, weight, bias, inner, rows, EPSILON: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some of the inner units of a store's gate for one row."""
    release(PDL)
    wait(PDL)
    batch = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, LENGTH, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        there = (unit < rows)[:, None] & (channel < LENGTH)[None, :]
        part = tl.load(x + batch * LENGTH + channel, mask=channel < LENGTH, other=0.0).to(tl.float32)
        weights = tl.load(weight + unit[:, None] * LENGTH + channel[None, :], mask=there, other=0.0).to(tl.float32)
        total += weights * part[None, :]
        squares += part * part
    found = tl.sum(total, 1) * tl.rsqrt(tl.sum(squares, 0) / LENGTH + EPSILON)
    found += tl.load(bias + unit, mask=unit < rows, other=0.0).to(tl.float32)
    tl.store(inner + batch * rows + unit, found * tl.sigmoid(found), mask=unit < rows)


@triton.jit
def _put_score(
    inner, weight, bias, decay, scores, start, every, kept,
    HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BY_ROW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The scores of all heads of one row."""
    release(PDL)
    wait(PDL)
    batch = tl.program_id(0).to(tl.int64)
    now = tl.load(start + (batch if BY_ROW else 0))
    head, unit = tl.arange(0, HEAD_WIDTH), tl.arange(0, WIDTH)
    there = (head < HEADS)[:, None] & (unit < LENGTH)[None, :]
    weights = tl.load(weight + head[:, None] * LENGTH + unit[None, :], mask=there, other=0.0).to(tl.float32)
    x = tl.load(inner + batch * LENGTH + unit, mask=unit < LENGTH, other=0.0)
    score = tl.sum(weights * x[None, :], 1) + tl.load(bias + head, mask=head < HEADS, other=0.0).to(tl.float32)
    fades = tl.load(decay + head, mask=head < HEADS, other=0.0).to(tl.float32)
    fades = tl.where(fades > 20.0, fades, tl.log(1.0 + tl.exp(fades)))
    score += fades * (now.to(tl.float32) / every)
    tl.store(scores + (batch * HEADS + head) * kept + now % kept, score, mask=head < HEADS)
