"""The store `recency`: keeps the youngest tokens; a longer window, seen at one distance."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ahn.stores.base import Store


class Recency(Store):
    """The last tokens that left the window."""

    name = "recency"

    def score(self, x_BTD: Tensor, positions_RT: Tensor, error: Callable[[], Tensor]) -> Tensor:
        return positions_RT[:, None].float()
