"""The trained memory with every read set to zero: what differs from `ahn` is what the memory itself adds."""

from __future__ import annotations

from torch import nn

from ahn.eval.policies.ahn import Ahn
from ahn.memory.handle import layers_of


class AhnZeroed(Ahn):
    """The trained memory with every read set to zero.

    It is written as always and costs the same. In the paper's form this is the window alone, computed the long way
    round, and must score the same; with `window_gate` the window still gives way to a read of nothing, and what that
    changes stays.
    """

    name = "ahn-zeroed"

    def prepare(self) -> None:
        super().prepare()
        for layer in layers_of(self.model):
            if layer.cell is not None:
                nn.init.zeros_(layer.cell.o_proj.weight)  # however a read is computed, it goes through this
