"""Ranks: one number by which tokens of a store are compared, and the outcome of comparing them.

Letters: B batch, M key/value heads, C tokens that leave the window, P slots of the store.

A rank is one int64 that sorts as (priority, position): the float32 in the upper half, its bits arranged so that they
sort as the number does, and the position in the lower. Slots that are still empty, and steps without a newcomer, have
ranks below those of all tokens, so they are evicted first and need no case of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOBODY = torch.iinfo(torch.int64).min  # the newcomer of a step without one: evicted at once
EMPTY = NOBODY + (1 << 31)  # an empty slot: any token replaces it
TOKEN = NOBODY + (1 << 32)  # ranks from here on are tokens'


class Outcome(NamedTuple):
    """The outcome of C steps; candidates are the P slots and, behind them, the C newcomers."""

    evicted: Tensor  # [B, M, C]: the candidate that is evicted at each step, possibly an empty slot
    evicted_ranks: Tensor  # [B, M, C]: its rank
    kept: Tensor  # [B, M, P]: the candidates in the slots afterwards
    ranks: Tensor  # [B, M, P]: and their ranks


def empty_ranks(batch: int, heads: int, slots: int, device: torch.device) -> Tensor:
    """Ranks of a store with nothing in it."""
    return (EMPTY + torch.arange(slots, device=device)).repeat(batch, heads, 1)


def position_of(ranks: Tensor) -> Tensor:
    return ranks & 0xFFFFFFFF
