"""The store `learned`: keeps tokens that a small gate predicts to be needed (idea: TRIM-KV, arXiv 2512.03324).

The gate is trained by `ahn.train.gates`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahn.stores.base import Store

WIDTH = 64
UNIT = 1024  # positions in which the decay is counted


class Learned(Store):
    """The tokens that a trained gate expects to be attended to from far away.

    Two layers lead from the layer's input to one score per key/value head. Each head has one decay: scores fade with
    age at the same rate for all its tokens, so their order stays.
    """

    name = "learned"
    trained = True

    def __init__(
        self, hidden_size: int, kv_heads: int, layer: int, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> None:
        super().__init__(hidden_size, kv_heads, layer, dtype, device)
        # float32 whatever the base is: scores are compared, and rounded ones tie
        self.inner = nn.Linear(hidden_size, WIDTH, device=device)
        self.outer = nn.Linear(WIDTH, kv_heads, device=device)
        self.decay = nn.Parameter(torch.full((kv_heads,), -4.0, device=device))  # softplus: 0.018 at first

    def gate(self, x_BTD: Tensor) -> Tensor:
        """[B, M, T] float32: the score without its age."""
        x = F.rms_norm(x_BTD.float(), x_BTD.shape[-1:])
        inner = F.silu(F.linear(x, self.inner.weight.float(), self.inner.bias.float()))
        return F.linear(inner, self.outer.weight.float(), self.outer.bias.float()).transpose(1, 2)

    def score(self, x_BTD: Tensor, positions_RT: Tensor, error: Callable[[], Tensor]) -> Tensor:
        return self.gate(x_BTD) + F.softplus(self.decay.float())[:, None] * (positions_RT[:, None] / UNIT)

    def gate_form(self) -> Any:
        from ahn.ops.specs import Gate

        return Gate(self.inner, self.outer, self.decay, UNIT, torch.finfo(torch.float32).eps)
