"""The interfaces of the tiers behind the window.

Sinks and window, the store and the cell are tiers in a row: each takes the tokens that the tier above evicts and
returns those that it evicts itself. A `KeptTier` keeps some of them exactly and lets queries attend to them; at most
one stands between the window and the last tier. A `LastTier` takes tokens for good and adds to the attention's output.
`AHNLayer` puts both in a row, attends, and combines. A new tier is a class in a file of its own.

Letters: B batch, T tokens, N query heads, M key/value heads, H head size, G gate inputs, S sinks, E evicted tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ahn.memory.batch import ForwardBatch, LayerBatch
from ahn.memory.buffer import LayerMemory
from ahn.memory.evicted import Evicted, Evictions
from ahn.memory.positions import Sizes
from ahn.ops.ranks import Outcome
from ahn.ops.softmax import AttentionOutput
from ahn.ops.specs import KeptKeys


class Put(NamedTuple):
    """Tokens that were offered to a `KeptTier`, before the queries have attended to them."""

    kept: KeptKeys  # sinks, kept tokens and newcomers, each for the queries that see it
    rivals: list[Tensor]  # keys, values and gate inputs of the slots and of the newcomers
    outcome: Outcome


class LastTier:
    """Takes the tokens that all other tiers evict, and adds its memory of them to the attention's output."""

    gate_width = 0  # numbers kept of each token in the window for its gates: G * N
    state_shape: Any = None  # N, K, H of a state in `LayerMemory.state`
    steps_on_device = True  # whether it takes one token a row without the host

    def memory(self, sizes: Sizes) -> LayerMemory:
        """An empty buffer of a layer with this tier and without a store; its `reserve` makes room for tokens."""
        return LayerMemory(sizes.window, sizes.sinks, self.gate_width)

    def gate_inputs(self, x: Tensor) -> Tensor | None:
        """Numbers kept of tokens x [B, T, D] while they are in the window: [B, T, G * N]."""
        return None

    def absorb(
        self, attended: AttentionOutput, new: LayerBatch, evicted: Evicted, evictions: Evictions, memory: LayerMemory
    ) -> Tensor:
        """Take the tokens that are evicted with the queries of `new`, one with each: token i before query i reads.

        Returns:
            attention and memory, [B, T, N, H].
        """
        raise NotImplementedError

    def pick_step_form(self, device: torch.device) -> Any:
        """The form in which kernels know `absorb_one`, or None."""
        return None

    def absorb_one(
        self, attended: Any, new: LayerBatch, evicted: Evicted, evictions: Evictions, memory: LayerMemory, form: Any
    ) -> Tensor:
        """`absorb` for one token a row. With a `form` of `pick_step_form`, `attended` are `ahn.ops.specs.Parts`."""
        return self.absorb(attended, new, evicted, evictions, memory)

    def recur(self, q: Tensor, evicted: Evicted, evictions: Evictions, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take the tokens evicted with queries q [B, N, E, H], behind a store. Returns reads and the next state."""
        raise NotImplementedError

    def compile_for_training(self) -> None:
        """Compile the steps around the kernels, if there are any."""

    def read_sequence(self, new: LayerBatch, evictions: Evictions) -> Tensor:
        """Reads of all queries of a whole sequence, [B, N, T, H], without a memory and with gradients."""
        raise NotImplementedError

    def combine_sequence(
        self, attended: AttentionOutput, read: Tensor, new: LayerBatch, evictions: Evictions
    ) -> Tensor:
        """Attention and what was read, [B, T, N, H]."""
        raise NotImplementedError


class KeptTier:
    """Keeps some of the tokens that the window evicts exactly; queries meet them as they meet the sinks."""

    grid = 0  # batches are cut at multiples of this position; 0: they are not

    def memory(self, gate_width: int) -> LayerMemory:
        """An empty buffer of a layer with this tier; its `reserve` makes room for tokens."""
        raise NotImplementedError

    def is_full(self, batch: ForwardBatch) -> bool:
        """Whether it keeps as many tokens as it can in each row of `batch`."""
        raise NotImplementedError

    def is_periodic(self, batch: ForwardBatch) -> bool:
        """Whether the one token a row of `batch` is followed by work that few positions ask for (`after_one`)."""
        return False

    def put(self, new: LayerBatch, window: tuple[Tensor, ...], memory: Any) -> Put | None:
        """Offer the tokens that those of `new` evict from the window; None if there are none.

        Args:
            window: keys, values and gate inputs of the window before the batch and of the batch, in order.
        """
        raise NotImplementedError

    def commit(self, put: Put, evicted: int, memory: Any) -> Evicted | None:
        """Store what `put` found, after the queries have attended. Returns the tokens evicted with the last `evicted`
        queries; None if that is none of them."""
        raise NotImplementedError

    def after(self, new: LayerBatch, memory: Any) -> None:
        """Called after the last tier has taken the tokens evicted by a batch."""

    def put_one(self, new: LayerBatch, evicted: tuple[Tensor, ...], memory: Any) -> tuple[Tensor, ...]:
        """`put` and `commit` for one token a row. `evicted`: of the window, or nothing if it evicts nothing."""
        raise NotImplementedError

    def attend_one(self, new: LayerBatch, memory: Any, in_parts: bool) -> Any:
        """Attention of one token a row; arguments and result as of `ahn.ops.banded.attend_one`."""
        raise NotImplementedError

    def after_one(self, new: LayerBatch, memory: Any) -> None:
        """Called after the last tier has taken the token evicted by one token a row."""

    def sequence(
        self, new: LayerBatch, last: LastTier | None, evictions: Evictions | None
    ) -> tuple[AttentionOutput, Tensor | None]:
        """Attention of a whole sequence without a memory, with gradients, and what its queries read from `last`; None
        if there is no such tier or nothing is evicted."""
        raise NotImplementedError
