"""The store `surprise`: keeps tokens that the cell cannot return (idea: LoLA, arXiv 2505.23666; HOLA, 2607.02303)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ahn.stores.base import Store


class Surprise(Store):
    """The tokens whose values the cell's state returns worst: beta ||v - S^T k||, with the cell's own key.

    S is the state at the last multiple of 256 positions before the token arrived, kept as a copy: that many numbers
    more (N K H of float32 a layer), and reading in pieces that end there.
    """

    name = "surprise"
    grid = 256
    reads_state = True

    def score(self, x_BTD: Tensor, positions_RT: Tensor, error: Callable[[], Tensor]) -> Tensor:
        return error()
