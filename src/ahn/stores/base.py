"""The interface of a store: a rule that scores tokens; those with the best scores stay beside the window.

Letters: B batch, T tokens, D hidden size, M key/value heads, H head size;
R rows of positions: 1 where all of the batch are at the same position, else B.

A store sees a token once, when it arrives, and returns one score per key/value head. The score waits with the token
in the window. When the token leaves, the highest of its span (`store_span`) becomes its priority, which never changes
again. Therefore many tokens can be resolved at once (`ahn.ops.eviction`). Scores must not depend on how the text is cut
into pieces. They may depend on the token and its position, on the state at the last multiple of `grid`, and on the
attention of the queries at multiples of `every`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Store(nn.Module):
    """Base of all stores. A new one needs `name` and `score`.

    Args:
        hidden_size: D. kv_heads: M. layer: index of the layer. dtype, device: of weights, if it has any.

    Class attributes:
        name: the file's name.
        grid: sequences are resolved in pieces that end at multiples of this position; 0: in one.
        every: the queries at multiples of this position add the attention that a token gets from them to its score;
            0: none does. Needs a `grid`, which bounds what is held at once.
        trained: it has weights, which are part of an adapter.
        reads_state: the score needs the error of the cell's state (`error` below); then a copy of the state at the
            last multiple of `grid` is kept.
    """

    name: ClassVar[str]
    grid: ClassVar[int] = 0
    every: ClassVar[int] = 0
    trained: ClassVar[bool] = False
    reads_state: ClassVar[bool] = False

    def __init__(
        self, hidden_size: int, kv_heads: int, layer: int, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> None:
        super().__init__()
        self.kv_heads, self.layer = kv_heads, layer

    def is_periodic(self, position: int) -> bool:
        """Whether the token at `position` has an observed query, or a copy of the state is taken after it."""
        observed = self.every > 0 and position % self.every == 0
        return observed or (self.reads_state and (position + 1) % self.grid == 0)

    def score(self, x_BTD: Tensor, positions_RT: Tensor, error: Callable[[], Tensor]) -> Tensor:
        """The scores of tokens that arrive, [B, M, T] or what broadcasts to it; higher is kept longer.

        Args:
            x_BTD: layer input, after the base's own norm. positions_RT: int64.
            error: how much of each value the state would not return, times how strongly it would be written,
                [B, M, T] (`Cell.error`, the mean over the heads of a group). With `reads_state` only.
        """
        raise NotImplementedError

    def gate_form(self) -> Any:
        """`ahn.ops.specs.Gate` where the score is one, or None."""
        return None
