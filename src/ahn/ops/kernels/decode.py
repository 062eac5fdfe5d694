"""One new token a row, in Triton: attention over the ring where it lies, and the cell's step. No gradients.

Letters: B batch, N query heads, M key/value heads, G = N / M, H head size, K features of a key, C slots, S sinks,
P parts; R rows of positions: 1 where all of the batch are at the same position, else B.

Each function does what plain torch does elsewhere and is tested against it: `rotate` is the base's rotation and
`Rotary.rotate` after it, `attend` is `ahn.ops.banded.attend_one`, `exchange` is `LayerMemory.exchange`, `displace` is
`ahn.ops.eviction.rank` and `StoringMemory.swap` between the rotations of keys into the store and out of it,
`put_score` is `ahn.stores.learned` and `StoringMemory.put_score`, `recur` is `Cell.step` after `Cell.ready`,
`add_read` is `Cell.combine` without room. The work of a step is small and is cut until it fills the device: attention
into parts of the slots, the state into columns (values do not mix), the projection into columns of its output.

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
from ahn.ops.specs import Form, Gate, Parts, Queries, StoredRotation, Write

PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100
BLOCK, WARPS, STAGES = 64, 4, 3  # of attention: slots at a time, their loads under way
PARTS = 256  # combined at once, at most
GATE_ROWS = 1  # of a store's gate by one program: each waits for its weights once
PLACES = 8192  # of a store, looked at at once by the one program of a head
COLUMNS = 16  # of state, projection and combined parts by one program, for there are few heads
EPSILON = 1e-6  # on the squared length of queries and keys (`ahn.cells.modules.unit`)
NORM_EPSILON = 1e-5


def attend(queries: Queries, k: Tensor, v: Tensor, sinks: int, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over sinks and ring; arguments and result as `ahn.ops.banded.attend_one`."""
    parts = attend_parts(queries, k, v, sinks, last)
    batch, heads, _, size = queries.q.shape
    columns = min(COLUMNS, triton.next_power_of_2(size))
    _merge[(batch * heads, triton.cdiv(size, columns))](
        *parts, parts.lses.shape[2], SIZE=size, COLUMNS=columns, PARTS=_at_once(parts), **options(k.device.type)
    )
    return parts.out, parts.lse


def attend_parts(queries: Queries, k: Tensor, v: Tensor, sinks: int, last: Tensor | None) -> Parts:
    """`attend` for `recur` to merge."""
    q, q_kept, scale = queries
    batch, heads, _, size = q.shape
    kv_heads, slots = k.shape[1:3]
    groups = heads // kv_heads
    split = min(1024, max(64, triton.next_power_of_2(triton.cdiv(batch * kv_heads * slots, PROGRAMS))))
    sink_parts = triton.cdiv(min(sinks, slots), split)
    parts = sink_parts + triton.cdiv(max(0, slots - sinks), split)
    partial = q.new_empty(batch, heads, parts, size, dtype=torch.float32)
    lses = q.new_empty(batch, heads, parts, dtype=torch.float32)
    width = max(16, triton.next_power_of_2(size))
    _attend[(batch * kv_heads, parts)](
        q, q_kept, k, v, partial, lses, last, scale, slots, sinks, sink_parts, parts,
        q.stride(0), q.stride(1), q_kept.stride(0), q_kept.stride(1), *k.stride()[:3], *v.stride()[:3],
        KV_HEADS=kv_heads, GROUPS=groups, ROWS=max(16, triton.next_power_of_2(groups)), SIZE=size, WIDTH=width,
        SPLIT=split, BLOCK=BLOCK, LAST=last is not None, BY_ROW=last is not None and len(last) > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=WARPS, num_stages=STAGES,
        **options(q.device.type),
    )  # fmt: skip
    out, lse = q.new_empty(batch, heads, 1, size), q.new_empty(batch, heads, 1, dtype=torch.float32)
    return Parts(partial, lses, out, lse)


def _at_once(parts: Parts) -> int:
    return min(PARTS, max(16, triton.next_power_of_2(parts.lses.shape[2])))


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
    turned_q, turned_k = q.new_empty(q.shape), k.new_empty(k.shape)
    twice = turned_q if further is None else q.new_empty(q.shape)
    _turn[(batch, heads + kv_heads)](
        q, k, cos, sin, more_cos, more_sin, turned_q, turned_k, twice,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, WIDTH=triton.next_power_of_2(size), BY_ROW=len(cos) > 1,
        MORE_BY_ROW=bool(more) and len(more[0]) > 1, num_warps=1, **options(q.device.type),
    )  # fmt: skip
    return turned_q, turned_k, twice


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
    lost_k, lost_v, lost = torch.empty_like(k), torch.empty_like(v), None if new is None else torch.empty_like(new)
    ranks = k.new_empty(batch, kv_heads, 1, dtype=torch.int64)
    group = 1 if new is None else memory.state.shape[1] // kv_heads
    gates = 1 if new is None else new.shape[-1] // (group * kv_heads)
    places = memory.ranks.shape[2]
    rotation = rotation or StoredRotation(None, False, 0, 0)
    half = 0 if rotation.frequencies is None else len(rotation.frequencies)
    block = min(PLACES, triton.next_power_of_2(places))
    _displace[(batch, kv_heads)](
        memory.keys, memory.values, memory.inputs, memory.ranks, memory.scores, k, v, new,
        lost_k, lost_v, lost, ranks, start, rotation.frequencies,
        memory.sinks, memory.window, memory.keys.shape[2], places, memory.scores.shape[2], span,
        HEADS=kv_heads, SIZE=size, WIDTH=triton.next_power_of_2(size), GATES=gates, GROUP=group,
        GATE_WIDTH=triton.next_power_of_2(gates * group), GATED=new is not None, BY_ROW=len(start) > 1,
        BLOCK=block, num_warps=max(4, block // 256), NOBODY=NOBODY, HIGHEST=-1 - NOBODY, HALF=half,
        ENTERS=rotation.enters, BY_POSITION=rotation.by_position, BY_SINKS=rotation.by_sinks, **options(k.device.type),
    )  # fmt: skip
    return (lost_k, lost_v, *(() if lost is None else (lost,))), ranks


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


def recur(form: Form, q: Tensor, write: Write, state: Tensor, unit: bool, parts: Parts | None = None) -> Tensor:
    """One write into `state` [B, N, K, H] float32, in place, then the read [B, N, H] float32.

    Args:
        q: [B, N, 1, K]. write: of the evicted tokens. unit: give q and k unit length first.
        parts: of attention, merged beside it.
    """
    batch, heads, features, size = state.shape
    q, k, v, inputs = (t.contiguous() for t in (q, write.k, write.v, write.inputs))
    writes = write.rows
    rates, biases = form.decay if form.decay is not None else (None, None)
    read = q.new_empty(batch, heads, size, dtype=torch.float32)
    columns = min(COLUMNS, triton.next_power_of_2(size))
    _recur_and_merge[(batch * heads, triton.cdiv(size, columns), 1 if parts is None else 2)](
        q, k, v, inputs, writes, rates, biases, state, read, form.scale, inputs.shape[-1],
        *(parts or (None,) * 4), 0 if parts is None else parts.lses.shape[2],
        HEADS=heads, K_GROUPS=heads // k.shape[1], V_GROUPS=heads // v.shape[1], FEATURES=features, SIZE=size,
        BLOCK=min(128, triton.next_power_of_2(features)), COLUMNS=columns, DELTA=form.delta,
        DECAY=form.decay is not None, WRITES=writes is not None, BY_ROW=writes is not None and len(writes) > 1,
        UNIT=unit, EPSILON=EPSILON, PARTS=0 if parts is None else _at_once(parts), **options(q.device.type),
    )  # fmt: skip
    return read


def add_read(form: Form, out: Tensor, read: Tensor, gate: Tensor, projection: Tensor, writes: Tensor | None) -> Tensor:
    """out [B, 1, N, H] with what was read, [B, N, H], normalised, gated by `gate` [B, 1, N], and projected by
    `projection` [N, H, H]; where nothing leaves, `out` as it is."""
    batch, heads, size = read.shape
    out, gate = out.contiguous(), gate.contiguous()
    both = torch.empty_like(out)
    columns = min(COLUMNS, triton.next_power_of_2(size))
    _add_read[(batch * heads, triton.cdiv(size, columns))](
        out, read, gate, form.norm, projection, writes, both,
        HEADS=heads, SIZE=size, WIDTH=triton.next_power_of_2(size), COLUMNS=columns,
        ACROSS=form.norm.numel() != size, WRITES=writes is not None,
        BY_ROW=writes is not None and len(writes) > 1, EPSILON=NORM_EPSILON, **options(out.device.type),
    )  # fmt: skip
    return both


@triton.jit
def _turn(
    q, k, cos, sin, more_cos, more_sin, turned_q, turned_k, twice, q_batch, q_head, k_batch, k_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BY_ROW: tl.constexpr,
    MORE_BY_ROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row, of queries or of keys. Each number and the one half a head away turn together."""
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
        target = turned_q + (batch * HEADS + head) * SIZE
    else:
        source = k + batch * k_batch + (head - HEADS) * k_head
        target = turned_k + (batch * KV_HEADS + head - HEADS) * SIZE
    mine = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
    row = batch * SIZE if BY_ROW else 0
    turned = mine * tl.load(cos + row + channel, mask=inside, other=0.0).to(tl.float32)
    turned += sign * theirs * tl.load(sin + row + channel, mask=inside, other=0.0).to(tl.float32)
    turned = turned.to(turned_q.dtype.element_ty)
    tl.store(target + channel, turned, mask=inside)
    if more_cos is not None:
        across = theirs * tl.load(cos + row + other, mask=inside, other=0.0).to(tl.float32)
        across -= sign * mine * tl.load(sin + row + other, mask=inside, other=0.0).to(tl.float32)
        across = across.to(turned_q.dtype.element_ty).to(tl.float32)
        more = batch * SIZE if MORE_BY_ROW else 0
        again = turned.to(tl.float32) * tl.load(more_cos + more + channel, mask=inside, other=0.0)
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
    keys, values, inputs, ranks, scores, k, v, new, lost_k, lost_v, lost, lost_ranks, start, frequencies,
    sinks, window, slots, places, kept, span,
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
    for low in range(0, places, BLOCK):
        at = low + tl.arange(0, BLOCK)
        held = tl.load(ranks + row * places + at, mask=at < places, other=HIGHEST)
        where = tl.where(held < lowest, at, where)
        lowest = tl.minimum(lowest, held)
    least = tl.min(lowest, 0)
    place = tl.min(tl.where(lowest == least, where, places), 0)
    wins = rank > least
    tl.debug_barrier()  # others of this program may still read the ranks
    tl.store(ranks + row * places + place, tl.where(wins, rank, least))
    out_rank = tl.where(wins, least, rank)
    tl.store(lost_ranks + row, out_rank)

    channel = tl.arange(0, WIDTH)
    inside = channel < SIZE
    source = (row * slots + sinks + place) * SIZE + channel
    old = tl.load(keys + source, mask=inside)
    mine = tl.load(k + row * SIZE + channel, mask=inside)
    gone = tl.where(wins, old, mine)
    if HALF:  # the other of a pair goes along
        turned = channel < 2 * HALF
        sign = tl.where(channel < HALF, -1.0, 1.0)
        step = tl.where(turned, tl.where(channel < HALF, HALF, -HALF), 0)
        angle = tl.load(frequencies + channel % HALF, mask=turned, other=0.0).to(tl.float32)
        old_other = tl.load(keys + source + step, mask=inside)
        mine_other = tl.load(k + row * SIZE + channel + step, mask=inside)
        if ENTERS:
            by = angle * (sinks - tl.maximum(position, 0)).to(tl.float32)
            cos, sin = tl.cos(by), sign * tl.sin(by)
            x, y = mine.to(tl.float32), mine_other.to(tl.float32)
            mine = tl.where(turned, x * cos + y * sin, x).to(old.dtype)
            mine_other = tl.where(turned, y * cos - x * sin, y).to(old.dtype)
        gone, gone_other = tl.where(wins, old, mine), tl.where(wins, old_other, mine_other)
        by = angle * (BY_POSITION * (out_rank & 0xFFFFFFFF) + BY_SINKS * sinks).to(tl.float32)
        x = gone.to(tl.float32)
        x = x * tl.cos(by) + gone_other.to(tl.float32) * (sign * tl.sin(by))
        gone = tl.where(turned, x, gone.to(tl.float32)).to(old.dtype)
        tl.debug_barrier()  # others of this program read the places that are written now
    tl.store(lost_k + row * SIZE + channel, gone, mask=inside)
    tl.store(keys + source, tl.where(wins, mine, old), mask=inside)
    old = tl.load(values + source, mask=inside)
    mine = tl.load(v + row * SIZE + channel, mask=inside)
    tl.store(lost_v + row * SIZE + channel, tl.where(wins, old, mine), mask=inside)
    tl.store(values + source, tl.where(wins, mine, old), mask=inside)
    if GATED:
        number = tl.arange(0, GATE_WIDTH)
        inside = number < GATES * GROUP
        gate = number // GROUP * (HEADS * GROUP) + head * GROUP + number % GROUP
        source = (batch * slots + sinks + place) * (GATES * HEADS * GROUP) + gate
        target = batch * (GATES * HEADS * GROUP) + gate
        old = tl.load(inputs + source, mask=inside)
        mine = tl.load(new + target, mask=inside)
        tl.store(lost + target, tl.where(wins, old, mine), mask=inside)
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


@triton.jit
def _attend(
    q, q_sinks, k, v, partial, norms, last, scale, slots, sinks, sink_parts, parts,
    q_batch, q_head, s_batch, s_head, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr, BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One part of the slots for the query heads of one key/value head: its softmax and the log of its normaliser."""
    release(PDL)
    wait(PDL)
    batch = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, WIDTH)
    real = (rows < GROUPS)[:, None] & (channels < SIZE)[None, :]
    # sinks and ring meet different queries, so no part has slots of both
    if part < sink_parts:
        low = part * SPLIT
        high = tl.minimum(low + SPLIT, sinks)
        source = q_sinks + batch * s_batch + (head * GROUPS + rows)[:, None] * s_head + channels[None, :]
    else:
        low = sinks + (part - sink_parts) * SPLIT
        high = low + SPLIT
        source = q + batch * q_batch + (head * GROUPS + rows)[:, None] * q_head + channels[None, :]
    high = tl.minimum(high, slots)
    if LAST:
        newest = tl.load(last + (batch if BY_ROW else 0))
        high = tl.minimum(high, newest + 1).to(tl.int32)
    query = tl.load(source, mask=real, other=0.0)
    keys = k + batch * k_batch + head * k_head
    values = v + batch * v_batch + head * v_head
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(low, high, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        filled = slot < high
        at = slot.to(tl.int64)
        key = tl.load(
            keys + at[None, :] * k_slot + channels[:, None],
            mask=filled[None, :] & (channels < SIZE)[:, None],
            other=0.0,
        )
        value = tl.load(
            values + at[:, None] * v_slot + channels[None, :],
            mask=filled[:, None] & (channels < SIZE)[None, :],
            other=0.0,
        )
        scores = tl.dot(query, key, input_precision=PRECISION) * (scale * 1.4426950408889634)
        scores = tl.where(filled[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - above[:, None])
        fade = tl.exp2(highest - above)
        total = total * fade + tl.sum(weights, 1)
        out = out * fade[:, None]
        out += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        highest = above
    seen = total > 0
    out = out / tl.where(seen, total, 1.0)[:, None]
    norm = tl.where(seen, (highest + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    place = (batch * KV_HEADS * GROUPS + head * GROUPS + rows) * parts + part
    tl.store(partial + place[:, None] * SIZE + channels[None, :], out, mask=real)
    tl.store(norms + place, norm, mask=rows < GROUPS)


@triton.jit
def _merge(
    partial, norms, out, norm, parts,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of the parts of one query head, by their normalisers; a part that has seen nothing has a weight of
    zero."""
    release(PDL)
    wait(PDL)
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    highest = float("-inf")
    total = 0.0
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = head * parts + part
        tile = tl.load(
            partial + place[:, None] * SIZE + column[None, :],
            mask=(part < parts)[:, None] & (column < SIZE)[None, :],
            other=0.0,
        )
        log = tl.load(norms + place, mask=part < parts, other=float("-inf"))
        above = tl.maximum(highest, tl.max(log, 0))
        safe = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp(log - safe)
        fade = tl.exp(highest - safe)
        sums = sums * fade + tl.sum(weight[:, None] * tile, 0)
        total = total * fade + tl.sum(weight, 0)
        highest = above
    tl.store(out + head * SIZE + column, (sums / total).to(out.dtype.element_ty), mask=column < SIZE)
    tl.store(norm + head, highest + tl.log(total))  # the same by each


@triton.jit
def _recur_and_merge(
    q, k, v, inputs, writes, rates, biases, state, read, scale, gate_width, partial, norms, out, norm, parts,
    HEADS: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr, FEATURES: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr, WRITES: tl.constexpr,
    BY_ROW: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Neither needs the other, and both are cut alike."""
    if tl.program_id(2) == 0:
        _recur(
            q, k, v, inputs, writes, rates, biases, state, read, scale, gate_width,
            HEADS, K_GROUPS, V_GROUPS, FEATURES, SIZE, BLOCK, COLUMNS, DELTA, DECAY, WRITES, BY_ROW, UNIT, EPSILON,
            PDL,
        )  # fmt: skip
    elif PARTS > 0:
        _merge(partial, norms, out, norm, parts, SIZE, COLUMNS, PARTS, PDL)


@triton.jit
def _recur(
    q, k, v, inputs, writes, rates, biases, state, read, scale, gate_width,
    HEADS: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr, FEATURES: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr, WRITES: tl.constexpr,
    BY_ROW: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of the state of one head. What is read after the write follows from products with the state before
    it, so one pass finds both and a second writes."""
    release(PDL)
    wait(PDL)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SIZE
    query = q + (batch * HEADS + head) * FEATURES
    key = k + (batch * (HEADS // K_GROUPS) + head // K_GROUPS) * FEATURES
    new = tl.load(v + (batch * (HEADS // V_GROUPS) + head // V_GROUPS) * SIZE + column, mask=inside, other=0.0)
    new = new.to(tl.float32)
    fade = 1.0
    strength = tl.sigmoid(tl.load(inputs + batch * gate_width + head).to(tl.float32))
    if DECAY:
        step = tl.load(inputs + batch * gate_width + gate_width - HEADS + head).to(tl.float32)
        step += tl.load(biases + head).to(tl.float32)
        step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
        fade = tl.exp(-tl.exp(tl.load(rates + head).to(tl.float32)) * step)
        if not DELTA:
            strength = step
    if WRITES:
        leaves = tl.load(writes + (batch if BY_ROW else 0)) != 0
        fade = tl.where(leaves, fade, 1.0)
        strength = tl.where(leaves, strength, 0.0)

    tile = state + (batch * HEADS + head) * FEATURES * SIZE
    query_length = 0.0
    key_length = 0.0
    both = 0.0
    at_key = tl.zeros([COLUMNS], tl.float32)
    at_query = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, FEATURES, BLOCK):
        row = start + tl.arange(0, BLOCK)
        some_q = tl.load(query + row, mask=row < FEATURES, other=0.0).to(tl.float32)
        some_k = tl.load(key + row, mask=row < FEATURES, other=0.0).to(tl.float32)
        held = (row < FEATURES)[:, None] & inside[None, :]
        old = tl.load(tile + row[:, None] * SIZE + column[None, :], mask=held, other=0.0)
        query_length += tl.sum(some_q * some_q, 0)
        key_length += tl.sum(some_k * some_k, 0)
        both += tl.sum(some_q * some_k, 0)
        at_key += tl.sum(some_k[:, None] * old, 0)
        at_query += tl.sum(some_q[:, None] * old, 0)
    by_query = 1.0
    by_key = 1.0
    if UNIT:
        by_query = tl.rsqrt(query_length + EPSILON)
        by_key = tl.rsqrt(key_length + EPSILON)
    if DELTA:
        new -= fade * by_key * at_key
    new *= strength
    found = (fade * by_query * at_query + both * by_query * by_key * new) * scale
    tl.store(read + (batch * HEADS + head) * SIZE + column, found, mask=inside)
    for start in range(0, FEATURES, BLOCK):
        row = start + tl.arange(0, BLOCK)
        some_k = tl.load(key + row, mask=row < FEATURES, other=0.0).to(tl.float32) * by_key
        held = (row < FEATURES)[:, None] & inside[None, :]
        place = tile + row[:, None] * SIZE + column[None, :]
        old = tl.load(place, mask=held, other=0.0)
        tl.store(place, fade * old + some_k[:, None] * new[None, :], mask=held)


@triton.jit
def _add_read(
    out, read, gate, norm, projection, writes, both,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr,
    WRITES: tl.constexpr, BY_ROW: tl.constexpr, EPSILON: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of the output of one head. ACROSS: the norm is over all heads, after the gate."""
    release(PDL)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    channel = tl.arange(0, WIDTH)
    inside = channel < SIZE
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    matrix = tl.load(
        projection + (head * SIZE + channel)[:, None] * SIZE + column[None, :],
        mask=inside[:, None] & (column < SIZE)[None, :],
        other=0.0,
    )
    wait(PDL)
    place = (batch * HEADS + head) * SIZE
    found = tl.load(read + place + channel, mask=inside, other=0.0)
    opening = tl.load(gate + batch * HEADS + head).to(tl.float32)
    opening = opening * tl.sigmoid(opening)
    if ACROSS:
        squares = 0.0
        for other in range(0, HEADS):
            theirs = tl.load(gate + batch * HEADS + other).to(tl.float32)
            theirs = theirs * tl.sigmoid(theirs)
            part = tl.load(read + (batch * HEADS + other) * SIZE + channel, mask=inside, other=0.0) * theirs
            squares += tl.sum(part * part, 0)
        weight = tl.load(norm + head * SIZE + channel, mask=inside, other=0.0).to(tl.float32)
        found = found * opening * tl.rsqrt(squares / (HEADS * SIZE) + EPSILON) * weight
    else:
        weight = tl.load(norm + channel, mask=inside, other=0.0).to(tl.float32)
        found = found * tl.rsqrt(tl.sum(found * found, 0) / SIZE + EPSILON) * weight * opening
    found = found.to(out.dtype.element_ty).to(tl.float32)
    added = tl.sum(found[:, None] * matrix.to(tl.float32), 0)
    if WRITES:
        leaves = tl.load(writes + (batch if BY_ROW else 0)) != 0
        added = tl.where(leaves, added, 0.0)
    total = tl.load(out + place + column, mask=column < SIZE, other=0.0).to(tl.float32) + added
    tl.store(both + place + column, total.to(both.dtype.element_ty), mask=column < SIZE)
