"""The store `random`: keeps any tokens; the control that a rule has to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ahn.stores.base import Store

BITS = 31


class Random(Store):
    """A uniform sample of all tokens so far, another one in each head and layer."""

    name = "random"

    def score(self, x_BTD: Tensor, positions_RT: Tensor, error: Callable[[], Tensor]) -> Tensor:
        heads = torch.arange(self.kv_heads, device=positions_RT.device) + 1 + self.layer * self.kv_heads
        return _hash(positions_RT[:, None] * 0x9E3779B + heads[:, None] * 0x85EBCA6B).float() / (1 << BITS)


def _hash(x: Tensor) -> Tensor:
    """Integers to 0 .. 2^31 - 1, each bit of the input reaching all of the output."""
    mask = (1 << BITS) - 1
    x = x & mask
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * multiplier) & mask
    return x ^ (x >> 16)
