"""Eviction from the store, in Triton: `ahn.ops.eviction.evict` for many steps at once.

Letters: B batch, M key/value heads, C steps, one newcomer each, P slots, R the slots at risk, at most C.

A candidate is out at the first step at which R better ones have come, so each can be counted alone, against the slots
at risk and against the newcomers in order: (R + C)^2 comparisons in one kernel. Only if there are more slots than steps
are the slots sorted. A second kernel gives the slots of evicted tokens to the newcomers that stay.

Under TRITON_INTERPRET=1 they run on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.ranks import Outcome

AT_ONCE = 2048, 8192  # steps resolved together, at least and at most: the work grows with their square
ENOUGH = 1 << 30  # comparisons, for all rows and heads
CANDIDATES, AGAINST, WARPS = 16, 512, 4  # counted by one program, and compared at once
SCANNED = 1024  # given slots at once


def at_once(ranks: Tensor) -> int:
    """Steps resolved together: so many that it takes about as long as their attention."""
    least, steps = AT_ONCE
    rows, slots = ranks.shape[0] * ranks.shape[1], ranks.shape[2]
    while steps > least and rows * steps * (steps + min(steps, slots)) > ENOUGH:
        steps //= 2
    return steps


def rank(priority: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """`ahn.ops.eviction.rank`."""
    priority = priority.float().contiguous()
    found = torch.empty(priority.shape, dtype=torch.int64, device=priority.device)
    steps, heads = priority.shape[-1], priority.shape[1]
    _rank[(triton.cdiv(steps, SCANNED), priority.shape[0] * heads)](
        priority, positions.contiguous(), real.contiguous(), found, steps, heads, BY_ROW=len(positions) > 1,
        BLOCK=SCANNED,
    )  # fmt: skip
    return found


def evict(ranks: Tensor, new: Tensor) -> Outcome:
    """`ahn.ops.eviction.evict` of up to `at_once` steps; a token that stays keeps its slot."""
    slots, steps = ranks.shape[-1], new.shape[-1]
    new = new.contiguous()
    risk, numbers = ranks.topk(steps, largest=False, sorted=False) if steps < slots else (ranks.contiguous(), None)
    at_risk, rows = risk.shape[-1], ranks.shape[0] * ranks.shape[1]
    out = torch.empty(rows, at_risk + steps, dtype=torch.int32, device=ranks.device)
    evicted, evicted_ranks = torch.empty_like(new), torch.empty_like(new)
    _out[(rows, triton.cdiv(at_risk + steps, CANDIDATES))](
        risk, new, numbers, out, evicted, evicted_ranks, at_risk, steps, slots,
        CANDIDATES=CANDIDATES, AGAINST=AGAINST, SOME=numbers is not None, num_warps=WARPS,
    )  # fmt: skip
    kept = torch.arange(slots, device=ranks.device).repeat(*ranks.shape[:2], 1)
    ranks = ranks.clone(memory_format=torch.contiguous_format)
    free = torch.empty(rows, at_risk, dtype=torch.int32, device=ranks.device)
    _commit[(rows,)](
        out, new, numbers, free, kept, ranks, at_risk, steps, slots, BLOCK=SCANNED, SOME=numbers is not None
    )
    return Outcome(evicted, evicted_ranks, kept, ranks)


# fmt: off
@triton.jit
def _rank(priority, positions, real, found, steps, heads, BY_ROW: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < steps
    of_row = (row // heads if BY_ROW else 0) * steps + at
    bits = (tl.load(priority + row * steps + at, mask=there, other=0.0) + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    bits = (bits + 0x400) & ~0x7FF
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    token = (ordered << 32) | tl.load(positions + of_row, mask=there, other=0)
    is_one = tl.load(real + of_row, mask=there, other=0) != 0
    tl.store(found + row * steps + at, tl.where(is_one, token, -(1 << 63) + at.to(tl.int64)), mask=there)


@triton.jit
def _out(risk, new, numbers, out, evicted, evicted_ranks, at_risk, steps, slots,
         CANDIDATES: tl.constexpr, AGAINST: tl.constexpr, SOME: tl.constexpr):
    """The step at which each candidate is out, `steps` for those that stay, and who that is at each step."""
    row = tl.program_id(0).to(tl.int64)
    who = tl.program_id(1) * CANDIDATES + tl.arange(0, CANDIDATES)
    in_slot, real = who < at_risk, who < at_risk + steps
    comes = who - at_risk  # at this step, if it is a newcomer
    mine = tl.load(risk + row * at_risk + who, mask=in_slot, other=0)
    mine += tl.load(new + row * steps + comes, mask=real & (comes >= 0), other=0)
    better = tl.zeros([CANDIDATES], tl.int32)
    for low in range(0, at_risk, AGAINST):
        at = low + tl.arange(0, AGAINST)
        rival = tl.load(risk + row * at_risk + at, mask=at < at_risk, other=-(1 << 63))
        better += tl.sum((rival[None, :] > mine[:, None]).to(tl.int32), 1)
    gone = tl.full([CANDIDATES], 1 << 30, tl.int32)
    low = 0
    while (low < steps) & (tl.max(tl.where(real, gone, 0), 0) > steps):  # until all are out
        at = low + tl.arange(0, AGAINST)
        rival = tl.load(new + row * steps + at, mask=at < steps, other=-(1 << 63))
        beats = (rival[None, :] > mine[:, None]).to(tl.int32)
        after = better + tl.sum(beats, 1)
        if tl.max(((after >= at_risk) & (gone > steps) & (comes < low + AGAINST)).to(tl.int32), 0) > 0:
            is_out = (better[:, None] + tl.cumsum(beats, 1) >= at_risk) & (at[None, :] >= comes[:, None])
            first = tl.min(tl.where(is_out, at[None, :], 1 << 30), 1)
            gone = tl.minimum(gone, first)
        better = after
        low += AGAINST
    gone = tl.minimum(gone, steps)
    tl.store(out + row * (at_risk + steps) + who, gone, mask=real)
    name = who + slots - at_risk
    if SOME:
        name = tl.where(in_slot, tl.load(numbers + row * at_risk + who, mask=in_slot, other=0), name)
    else:
        name = tl.where(in_slot, who, name)
    leaves = real & (gone < steps)
    tl.store(evicted + row * steps + gone, name.to(tl.int64), mask=leaves)
    tl.store(evicted_ranks + row * steps + gone, mine, mask=leaves)


@triton.jit
def _commit(out, new, numbers, free, kept, ranks, at_risk, steps, slots, BLOCK: tl.constexpr, SOME: tl.constexpr):
    """The i-th newcomer that stays gets the i-th slot whose token is evicted."""
    row = tl.program_id(0).to(tl.int64)
    out += row * (at_risk + steps)
    count = 0
    for low in range(0, at_risk, BLOCK):
        at = low + tl.arange(0, BLOCK)
        is_free = (at < at_risk) & (tl.load(out + at, mask=at < at_risk, other=steps) < steps)
        order = count + tl.cumsum(is_free.to(tl.int32), 0) - 1
        slot = at
        if SOME:
            slot = tl.load(numbers + row * at_risk + at, mask=is_free, other=0).to(tl.int32)
        tl.store(free + row * at_risk + order, slot, mask=is_free)
        count += tl.sum(is_free.to(tl.int32), 0)
    tl.debug_barrier()  # what is free was written by other threads of this program
    count = 0
    for low in range(0, steps, BLOCK):
        at = low + tl.arange(0, BLOCK)
        stays = (at < steps) & (tl.load(out + at_risk + at, mask=at < steps, other=0) >= steps)
        order = count + tl.cumsum(stays.to(tl.int32), 0) - 1
        slot = tl.load(free + row * at_risk + order, mask=stays, other=0)
        tl.store(kept + row * slots + slot, (slots + at).to(tl.int64), mask=stays)
        tl.store(ranks + row * slots + slot, tl.load(new + row * steps + at, mask=stays, other=0), mask=stays)
        count += tl.sum(stays.to(tl.int32), 0)
# fmt: on
