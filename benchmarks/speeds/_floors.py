"""The least time that reading and decoding can take on a device (speeds/gpu.py says how it is counted)."""

from __future__ import annotations

from typing import Any, NamedTuple

from common import SHARE


class Ceilings(NamedTuple):
    """The best rates of a device, a second: FLOPs of a large product, bytes of a large copy."""

    matmul: float
    copy: float


def config_of(cell: str, window: int, sinks: int) -> Any:
    """The memory that a cell of the table has; for "full" one without a recurrent cell."""
    from ahn.config import AHNConfig

    name, _, store = cell.partition("+")
    size = round(SHARE * window) if store else 0
    return AHNConfig(None if name == "full" else name, window - size, sinks, store=store or None, store_size=size)


class Floors:
    """Seconds that the method takes at least on a device of these rates."""

    def __init__(self, shape: Any, itemsize: int, window: int, sinks: int, ceilings: Ceilings) -> None:
        self.shape, self.itemsize, self.window, self.sinks = shape, itemsize, window, sinks
        self.ceilings = ceilings

    def cost(self, cell: str, length: int) -> Any:
        from ahn.cost import cost

        return cost(self.shape, length, config_of(cell, self.window, self.sinks), self.itemsize)

    def read_flops(self, cell: str, batch: int, length: int) -> int:
        table = self.cost(cell, length)
        flops = table.mixing.full if cell == "full" else table.mixing.memory
        mlp = next(term.full for term in table.rest.terms if term.name == "MLP")
        return batch * (flops + mlp + 2 * self.shape.V * self.shape.D)

    def read(self, cell: str, batch: int, length: int) -> float:
        return self.read_flops(cell, batch, length) / self.ceilings.matmul

    def decode_bytes(self, cell: str, batch: int, length: int) -> int:
        table, shape = self.cost(cell, length), self.shape
        parameters = table.parameters.full if cell == "full" else table.parameters.memory
        weights = parameters - (0 if shape.tied else shape.V * shape.D)  # a step reads one row of the embedding
        state = 0 if cell in ("full", None) else 2 * 4 * shape.layers * shape.N * shape.H**2
        kept = 2 * shape.layers * shape.M * shape.H * (length if cell == "full" else min(length, self.lossless))
        return self.itemsize * (weights + batch * kept) + batch * state

    @property
    def lossless(self) -> int:
        return self.window + self.sinks

    def decode(self, cell: str, batch: int, length: int) -> float:
        """Seconds of one step of `batch` rows that `length` tokens precede."""
        step = self.read_flops(cell, batch, length + 1) - self.read_flops(cell, batch, length)
        step += batch * 2 * self.shape.V * self.shape.D
        return max(self.decode_bytes(cell, batch, length) / self.ceilings.copy, step / self.ceilings.matmul)
