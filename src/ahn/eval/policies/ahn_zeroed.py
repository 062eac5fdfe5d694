"""The trained memory with every read set to zero: what differs from `ahn` is what the memory itself adds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ahn.augmentation import layers_of
from ahn.eval.policies.ahn import Ahn


class AhnZeroed(Ahn):
    """The trained memory with every read set to zero.

    It is written as always and costs the same. For a cell whose output is a projection of the read this is the window
    alone, computed the long way round, and must score the same.
    """

    name = "ahn-zeroed"

    def prepare(self) -> None:
        super().prepare()
        for layer in layers_of(self.model):
            if layer.cell is not None:
                _silence(layer.cell)


def _silence(cell: Any) -> None:
    run, step = cell.run, cell.step

    def silent_run(*args: Any) -> tuple[Tensor, Tensor]:
        read, state = run(*args)
        return read.new_zeros(read.shape), state

    def silent_step(*args: Any) -> Tensor:
        read = step(*args)
        return read.new_zeros(read.shape)

    cell.run, cell.step = silent_run, silent_step
