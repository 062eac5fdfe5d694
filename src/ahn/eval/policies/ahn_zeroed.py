"""The trained memory with every read set to zero. The difference to `ahn` is the effect of the memory's reads."""

from __future__ import annotations

from torch import nn

from ahn.eval.policies.ahn import Ahn
from ahn.memory.handle import layers_of


class AhnZeroed(Ahn):
    """The trained memory with every read set to zero.

    The memory is written as always and costs the same. In the paper's form this equals the window alone, and must score
    the same. With `window_gate` the window's output is still reduced in favour of the read, although that is zero.
    """

    name = "ahn-zeroed"

    def prepare(self) -> None:
        super().prepare()
        for layer in layers_of(self.model):
            if layer.cell is not None:
                nn.init.zeros_(layer.cell.o_proj.weight)  # every read goes through this layer
