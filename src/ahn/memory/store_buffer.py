"""The buffer of a layer with a store. Letters and slots: as in `ahn.memory.store_tier`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ahn.memory.batch import ForwardBatch, gather
from ahn.memory.buffer import LayerMemory
from ahn.ops.eviction import by_head, put_by_head
from ahn.ops.ranks import TOKEN, Outcome, empty_ranks, position_of


class StoringMemory(LayerMemory):
    """Sinks, store and window; also `ranks` int64 [B, M, P] of what is stored, `scores` [B, M, L] of the last tokens,
    at their position mod L, and `snapshot`, the state at the last multiple of the grid.

    Args:
        window, sinks, gate_width: as of `LayerMemory`. size: P. scores_kept: L.
        reads_state: whether the store scores by the state of the cell, of which a snapshot is then kept.
    """

    def __init__(
        self, window: int, sinks: int, gate_width: int, size: int, scores_kept: int, reads_state: bool
    ) -> None:
        super().__init__(window, sinks, gate_width)
        self.size, self.scores_kept, self.reads_state = size, scores_kept, reads_state
        self.ranks: Tensor | None = None
        self.scores: Tensor | None = None
        self.snapshot: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"ranks": self.ranks, "scores": self.scores, "snapshot": self.snapshot}
        return super().tensors | {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def stored(self) -> Tensor | None:
        if self.ranks is None:
            return None
        ranks = self.ranks.flatten(1)
        return torch.where(ranks >= TOKEN, position_of(ranks), -1)

    @property
    def shift(self) -> int:  # type: ignore[override]
        return 0 if self.ranks is None else self.size

    @property
    def store(self) -> slice:
        return slice(self.sinks, self.sinks + self.shift)

    @property
    def capacity(self) -> int:
        return super().capacity - self.shift

    def reserve(self, tokens: int, k: Tensor, state: tuple[int, int, int] | None) -> None:
        assert self.window is not None
        exact = self.sinks + self.window
        if self.ranks is None:
            super().reserve(tokens, k, state)
        if self.scores is None:
            self.scores = torch.zeros(*k.shape[:2], self.scores_kept, device=k.device)
            if self.reads_state and state is not None:
                self.snapshot = torch.zeros(k.shape[0], *state, device=k.device)
        if self.ranks is None and tokens > exact:
            for name, dim in (("keys", 2), ("values", 2), ("inputs", 1)):
                if (old := getattr(self, name)) is not None:
                    shape = list(old.shape)
                    shape[dim] = self.size
                    parts = (
                        old.narrow(dim, 0, self.sinks),
                        old.new_zeros(shape),
                        old.narrow(dim, self.sinks, self.window),
                    )
                    setattr(self, name, torch.cat(parts, dim))
            self.ranks = empty_ranks(k.shape[0], k.shape[1], self.size, k.device)

    def commit(self, rivals: list[Tensor], outcome: Outcome, heads: Any) -> None:
        """Put kept tokens into their slots; `rivals`: keys, values and gate inputs of slots and newcomers."""
        keys, values = self.kept
        buffers = [keys[:, :, self.store], values[:, :, self.store]]
        if self.inputs is not None:
            buffers.append(heads(self.inputs[:, self.store]))
        for buffer, tokens in zip(buffers, rivals, strict=True):
            buffer.copy_(by_head(tokens, outcome.kept))
        assert self.ranks is not None
        self.ranks.copy_(outcome.ranks)  # in place: a graph may have been captured with it

    def swap(self, tokens: list[Tensor], new: Tensor, heads: Any) -> tuple[list[Tensor], Tensor]:
        """`evict` and `commit` for one newcomer in each row: keys, values, gate inputs, and its ranks [B, M, 1].
        Returns those of the evicted tokens."""
        assert self.ranks is not None
        slot = self.ranks.argmin(-1, keepdim=True)  # min would give both, but is 25 times slower on a CPU
        lowest = self.ranks.gather(-1, slot)
        wins = new > lowest
        keys, values = self.kept
        buffers = [keys[:, :, self.store], values[:, :, self.store]]
        if self.inputs is not None:
            buffers.append(heads(self.inputs[:, self.store]))
        evicted = []
        for buffer, token in zip(buffers, tokens, strict=True):
            old = by_head(buffer, slot)
            won = wins.view(*wins.shape, *[1] * (token.dim() - 3))
            put_by_head(buffer, slot, torch.where(won, token, old))
            evicted.append(torch.where(won, old, token))
        self.ranks.scatter_(-1, slot, torch.where(wins, new, lowest))
        return evicted, torch.where(wins, lowest, new)

    def filled(self, batch: ForwardBatch, slots: int) -> Tensor:
        """bool [B, M, slots]: which hold something after the one token of `batch`."""
        device = self.kept[0].device
        index = (torch.arange(slots - self.shift, device=device) <= batch.start_on(device)[:, None])[:, None]
        if self.ranks is None:
            return index
        stored = self.ranks >= TOKEN
        index = index.expand(*stored.shape[:2], -1)
        return torch.cat([index[..., : self.sinks], stored, index[..., self.sinks :]], -1)

    # The scores of the last L tokens.
    def trail(self, batch: ForwardBatch) -> Tensor:
        """Scores of the L tokens before `batch`, in order, [B, M, L]."""
        assert self.scores is not None
        device = self.scores.device
        return gather(self.scores, batch.memo(("trail", device), lambda: self._score_slots(batch.start_on(device))), 2)

    def keep_trail(self, batch: ForwardBatch, trail: Tensor) -> None:
        assert self.scores is not None
        device = trail.device
        at = batch.memo(("trail after", device), lambda: self._score_slots(batch.ends.to(device)))
        self.scores.scatter_(2, at[:, None].expand_as(trail), trail)

    def trail_of_one(self, batch: ForwardBatch, length: int) -> Tensor:
        """Of the tokens around the one that is pushed out, `length` - 1 to each side, [B, M, 2 * length - 1]."""
        assert self.scores is not None
        return gather(self.scores, self._score_slots(batch.start)[:, : 2 * length - 1], 2)

    def put_score(self, batch: ForwardBatch, score: Tensor) -> None:
        assert self.scores is not None
        at = (batch.start % self.scores_kept).to(score.device)[:, None, None]
        self.scores.scatter_(2, at.expand_as(score), score)

    def add_scores(self, batch: ForwardBatch, given: Tensor, every: int) -> None:
        """Add what the ring's slots are given [B, M, W or fewer] by the one query of `batch`, in rows where it is at a
        multiple of `every`."""
        assert self.scores is not None and self.window is not None
        last = batch.start_on(given.device)[:, None]
        at = last - (last - torch.arange(self.scores_kept, device=given.device)) % self.scores_kept  # by score
        seen = (last % every == 0) & (at >= self.sinks) & (at > last - self.window)
        slots = ((at - self.sinks) % self.window).clamp(max=given.shape[2] - 1)
        self.scores += gather(given, slots, 2) * seen[:, None]

    def _score_slots(self, position: Tensor) -> Tensor:
        """Slots [R, L] of the scores before `position` [R], oldest first."""
        return (position[:, None] + torch.arange(self.scores_kept, device=position.device)) % self.scores_kept

    def keep_state(self, batch: ForwardBatch, grid: int) -> None:
        """Copy the state of rows that are at a multiple of the grid after `batch`."""
        if self.snapshot is None:
            return
        rows = batch.ends % grid == 0
        if batch.on_device or bool(rows.any()):
            rows = rows.to(self.compressed.device)[:, None, None, None]
            torch.where(rows, self.compressed, self.snapshot, out=self.snapshot)
