"""One new token a row, in Triton: attention over the ring where it lies, and the cell's step. No gradients.

Letters: B batch, N query heads, M key/value heads, G = N / M, H head size, K features of a key, C slots, S sinks,
P parts; R rows of positions: 1 where all of the batch are at the same position, else B.

Each function does what plain torch does elsewhere and is tested against it: `attend` is
`ahn.ops.banded.attend_one`, `recur` is `Cell.step` after `Cell.ready`, `add_read` is `Cell.combine` without a window
gate. How the token gets into the ring and the store is in `moves`. The work of a step is small and is cut until it
fills the device: attention into parts of the slots, the state into columns (values do not mix), the projection into
columns of its output.

Under TRITON_INTERPRET=1 they run on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.kernels.launch import options, release, wait
from ahn.ops.specs import Form, Parts, Queries, Write

PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100
BLOCK, WARPS, STAGES = 64, 4, 3  # of attention: slots at a time, their loads under way
PARTS = 256  # combined at once, at most
COLUMNS = 16  # of state, projection and combined parts by one program, because there are few heads
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
def _attend(
    q, q_sinks, k, v, partial, lses, last, scale, slots, sinks, sink_parts, parts,
    q_batch, q_head, s_batch, s_head, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr, BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One part of the slots for the query heads of one key/value head: its softmax and its lse."""
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
    lse = tl.where(seen, (highest + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    place = (batch * KV_HEADS * GROUPS + head * GROUPS + rows) * parts + part
    tl.store(partial + place[:, None] * SIZE + channels[None, :], out, mask=real)
    tl.store(lses + place, lse, mask=rows < GROUPS)


@triton.jit
def _merge(
    partial, lses, out, lse, parts,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of the parts of one query head, by their lses; a part that has seen nothing has a weight of
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
        log = tl.load(lses + place, mask=part < parts, other=float("-inf"))
        above = tl.maximum(highest, tl.max(log, 0))
        safe = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp(log - safe)
        fade = tl.exp(highest - safe)
        sums = sums * fade + tl.sum(weight[:, None] * tile, 0)
        total = total * fade + tl.sum(weight, 0)
        highest = above
    tl.store(out + head * SIZE + column, (sums / total).to(out.dtype.element_ty), mask=column < SIZE)
    tl.store(lse + head, highest + tl.log(total))  # the same by each


@triton.jit
def _recur_and_merge(
    q, k, v, inputs, writes, rates, biases, state, read, scale, gate_width, partial, lses, out, lse, parts,
    HEADS: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr, FEATURES: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr, WRITES: tl.constexpr,
    BY_ROW: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_recur` and `_merge` side by side: neither needs the other, and both are cut into the same columns."""
    if tl.program_id(2) == 0:
        _recur(
            q, k, v, inputs, writes, rates, biases, state, read, scale, gate_width,
            HEADS, K_GROUPS, V_GROUPS, FEATURES, SIZE, BLOCK, COLUMNS, DELTA, DECAY, WRITES, BY_ROW, UNIT, EPSILON,
            PDL,
        )  # fmt: skip
    elif PARTS > 0:
        _merge(partial, lses, out, lse, parts, SIZE, COLUMNS, PARTS, PDL)


@triton.jit
def _recur(
    q, k, v, inputs, writes, rates, biases, state, read, scale, gate_width,
    HEADS: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr, FEATURES: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr, WRITES: tl.constexpr,
    BY_ROW: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of the state of one head. The read after the write follows from products with the state before it,
    so one pass over the state finds both, and a second pass writes."""
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
