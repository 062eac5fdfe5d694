"""Eviction from the store: which tokens stay, and which are written into the state.

Letters: B batch, M key/value heads, C tokens that leave the window, P slots of the store.

Once the window is full, each step brings one newcomer, and each key/value head evicts the token of lowest priority
among those in the store and the newcomer; of equals the older one. Priorities never change, so many steps are resolved
at once: a token is out at the first step at which P better ones have come.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ahn.ops import dispatch
from ahn.ops.ranks import NOBODY, Outcome

AT_ONCE = 64, 512  # steps resolved together, at least and at most: the work grows with their square, the launches fall
ENOUGH = 1 << 22  # comparisons that a GPU makes while a kernel is launched


def rank(priority: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """Ranks [B, M, C] of tokens with `priority` [B, M, C] float32 at `positions` [R, C]; where not `real` [R, C]:
    nobody's.

    Priorities are rounded to 13 bits: equal tokens then tie, whatever the shapes of the products that scored them.
    """
    if dispatch.pick_eviction(priority.device.type).name == "triton":
        from ahn.ops.kernels import eviction as triton_eviction

        return triton_eviction.rank(priority, positions, real)
    bits = (priority.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: one zero
    bits = (bits + 0x400) & ~0x7FF
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    nobody = NOBODY + torch.arange(priority.shape[-1], device=priority.device)
    return torch.where(real[:, None], (ordered << 32) | positions[:, None], nobody)


def evict(ranks: Tensor, new: Tensor) -> Outcome:
    """Resolve one step after the other for newcomers of rank `new` [B, M, C] against slots of `ranks` [B, M, P]."""
    slots, steps = ranks.shape[-1], new.shape[-1]
    resolve, at_once = _resolve, _at_once(ranks)
    if dispatch.pick_eviction(ranks.device.type).name == "triton":
        from ahn.ops.kernels import eviction as triton_eviction

        resolve, at_once = triton_eviction.evict, triton_eviction.at_once(ranks)
    if steps <= at_once:
        return resolve(ranks, new)
    who = torch.arange(slots, device=ranks.device).expand_as(ranks)
    evicted, evicted_ranks = [], []
    for low in range(0, steps, at_once):
        part = new[..., low : low + at_once]
        names = torch.arange(slots + low, slots + low + part.shape[-1], device=ranks.device)
        who = torch.cat([who, names.expand_as(part)], -1)
        outcome = resolve(ranks, part)
        evicted.append(who.gather(-1, outcome.evicted))
        evicted_ranks.append(outcome.evicted_ranks)
        who, ranks = who.gather(-1, outcome.kept), outcome.ranks
    return Outcome(torch.cat(evicted, -1), torch.cat(evicted_ranks, -1), who, ranks)


def _at_once(ranks: Tensor) -> int:
    """Steps resolved together: on a GPU so many that their comparisons take about as long as launching them."""
    least, most = AT_ONCE
    if ranks.device.type == "cpu":
        return least
    rows = ranks.shape[0] * ranks.shape[1]
    return next((n for n in (most, most // 2, most // 4) if 2 * n * n * rows <= ENOUGH), least)


def _resolve(ranks: Tensor, new: Tensor) -> Outcome:
    """`evict` for few steps."""
    slots, steps = ranks.shape[-1], new.shape[-1]
    who = torch.arange(slots + steps, device=ranks.device).expand(*ranks.shape[:2], -1)
    risk, slot = ranks.topk(min(steps, slots), largest=False)  # only so many of the lowest can be evicted
    rivals, names = torch.cat([risk, new], -1), torch.cat([slot, who[..., slots:]], -1)
    first = _out_at(risk, rivals, new)
    stay = first.argsort(dim=-1, descending=True, stable=True)[..., : risk.shape[-1]]
    out = torch.empty_like(first[..., : steps + 1]).scatter_(
        -1, first, torch.arange(rivals.shape[-1], device=ranks.device).expand_as(first)
    )[..., :-1]
    kept = who[..., :slots].scatter(-1, slot, names.gather(-1, stay))
    ranks = ranks.scatter(-1, slot, rivals.gather(-1, stay))
    return Outcome(names.gather(-1, out), rivals.gather(-1, out), kept, ranks)


def _out_at(risk: Tensor, rivals: Tensor, new: Tensor) -> Tensor:
    """The step at which each of the rivals (the lowest slots `risk`, then the newcomers) is out, C for those that
    stay: the first at which as many better ones have come as there are slots."""
    slots, steps = risk.shape[-1], new.shape[-1]
    already = slots - torch.searchsorted(risk.contiguous(), rivals.contiguous(), right=True)
    come = (new[..., None, :] > rivals[..., :, None]).cumsum(-1, dtype=torch.int32)
    out = come + already[..., None] >= slots
    step = torch.arange(steps, device=new.device)
    out[..., slots:, :] &= step >= step[:, None]  # nobody is out before coming
    return steps - out.sum(-1)


def until(outcome: Outcome) -> Tensor:
    """[B, M, P + C]: the step at which each candidate is out, C for those that stay."""
    steps = outcome.evicted.shape[-1]
    slots = outcome.kept.shape[-1]
    found = torch.full((*outcome.evicted.shape[:2], slots + steps), steps, device=outcome.evicted.device)
    return found.scatter_(-1, outcome.evicted, torch.arange(steps, device=found.device).expand_as(outcome.evicted))


def pool(take: Callable[[Tensor], Tensor], back: Tensor, span: int) -> Tensor:
    """The highest score of each span, [B, M, C].

    Args:
        take: scores [B, M, C] at indices [R, C], where the i-th token that leaves is at i + span - 1.
        back: [R, C], how many tokens of its span came before each token. span: tokens of one.
    """
    first = torch.arange(back.shape[-1], device=back.device) + span - 1 - back
    best = take(first)
    for i in range(1, span):
        best = torch.maximum(best, take(first + i))
    return best


def by_head(x: Tensor, at: Tensor) -> Tensor:
    """Tokens `at` [B, M, C] of x [B, M, L, ...]: others in each head."""
    return x.gather(2, _like(at, x))


def put_by_head(x: Tensor, at: Tensor, new: Tensor) -> None:
    """The opposite: x[b, m, at] = new, in place."""
    x.scatter_(2, _like(at, new), new)


def _like(at: Tensor, x: Tensor) -> Tensor:
    return at.view(*at.shape, *[1] * (x.dim() - 3)).expand(*at.shape, *x.shape[3:])
