"""The words of the tokens that a store keeps, for people: `ahn inspect`.

A model needs only keys and values. People need words: a transcript has ids and positions of the tokens that some head
of some layer still keeps, and of a few neighbours. Ids of other tokens are dropped from time to time, so its size is
bounded by the number of slots, for texts of any length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TEXT = "text"  # name of the ids in a memory file
BESIDE = 6  # neighbours to each side
PENDING = 65_536  # tokens after which what nobody keeps is dropped: all layers are asked what they keep
LEAST = 16  # tokens that a piece counts for at least: each is a tensor


@dataclass
class Run:
    """Tokens that were read: row b has the first `counts[b]` of `ids` from position `starts[b]` on."""

    starts: list[int]  # of these two one entry serves all rows
    counts: list[int]
    ids: list[Tensor]  # [B, T], one behind the other

    @property
    def batch(self) -> int:
        return len(self.ids[0])

    def part(self, row: int, ids: Tensor, device: torch.device) -> Tensor:
        """Positions and ids of a row, int64 [2, n], `ids` being all of the run."""
        start, count = _of(self.starts, row), _of(self.counts, row)
        places = torch.arange(start, start + count, device=device)
        return torch.stack([places, ids[row % len(ids), :count].to(device, torch.int64)])


class Transcript:
    """Positions and ids by row, on the device of the ids."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # int64 [2, n]: positions, ascending, and ids
        self.pending: list[Run] = []
        self.waiting = 0  # tokens that are pending, of each piece at least LEAST
        self.full = True  # whether all rows of the last run end where its ids do: what comes may go on from there

    def copy(self) -> Transcript:
        twin = Transcript()
        twin.rows, twin.waiting, twin.full = list(self.rows), self.waiting, self.full
        twin.pending = [replace(run, ids=list(run.ids)) for run in self.pending]
        return twin

    def to(self, device: torch.device | str) -> None:
        """Move to another device; later ids must be on the same."""
        self.rows = [row.to(device) for row in self.rows]
        self.pending = [replace(run, ids=[ids.to(device) for ids in run.ids]) for run in self.pending]

    def add(self, starts: list[int], counts: list[int], ids: Tensor) -> None:
        """Tokens that are read: row b has ids[b, :counts[b]] from position starts[b] on; one entry serves all rows."""
        last, length = self.pending[-1] if self.pending else None, ids.shape[1]
        ids = ids.clone()  # its owner may write into it
        ends = [at + last.counts[0] for at in last.starts] if last is not None and self.full else None
        if last is not None and starts == ends and last.batch == len(ids):
            last.ids.append(ids)
            last.counts = [last.counts[0] + count for count in counts]
        else:
            self.pending.append(Run(starts, counts, [ids]))
        self.full, self.waiting = set(counts) == {length}, self.waiting + max(length, LEAST)

    @property
    def is_due(self) -> bool:
        return self.waiting >= PENDING

    def trim(self, kept: list[Tensor], sinks: int, last: int) -> None:
        """Drop the ids of tokens that are kept nowhere.

        Args:
            kept: positions that are kept, by layer [B, n], below 0 where there is none. sinks, last: so many first and
                last tokens are kept as well.
        """
        if not self.rows and not self.pending:
            return
        batch = max([len(self.rows), *(run.batch for run in self.pending)])
        device = self.pending[0].ids[0].device if self.pending else self.rows[0].device
        rows = self.rows * batch if len(self.rows) == 1 else self.rows
        pieces = [[row.to(device)] for row in rows] or [[] for _ in range(batch)]
        for run in self.pending:
            ids = torch.cat(run.ids, 1)
            for row, of_row in enumerate(pieces):
                of_row.append(run.part(row, ids, device))
        self.pending, self.waiting, self.full = [], 0, True
        stored = torch.cat([positions.to(device) for positions in kept], 1) if kept else None
        self.rows = []
        for row, of_row in enumerate(pieces):
            known = torch.cat(of_row, 1)
            at = known[0]
            needed = (at < sinks) | (at > at[-1:] - last)
            if stored is not None:
                needed |= _beside(at, stored[row % len(stored)])
            self.rows.append(known[:, needed])

    def select(self, indices: list[int]) -> None:
        """Rows become copies of rows `indices`."""
        self.rows = [self.rows[i if len(self.rows) > 1 else 0] for i in indices] if self.rows else []
        self.pending = [
            Run(
                [_of(run.starts, i) for i in indices],
                [_of(run.counts, i) for i in indices],
                [torch.cat(run.ids, 1)[[i % run.batch for i in indices]]],
            )
            for run in self.pending
        ]


def _of(entries: list[int], row: int) -> int:
    """The entry of a row; one serves all."""
    return entries[row % len(entries)]


def _beside(at: Tensor, positions: Tensor) -> Tensor:
    """Which of the ascending places `at` are at one of the `positions` (none where below 0) or near it: bool."""
    positions = torch.where(positions < 0, -2 * BESIDE, positions)
    change = torch.zeros(len(at) + 1, dtype=torch.int64, device=at.device)
    one = torch.ones_like(positions)
    change.index_add_(0, torch.searchsorted(at, positions - BESIDE), one)
    change.index_add_(0, torch.searchsorted(at, positions + BESIDE, right=True), -one)
    return change.cumsum(0)[:-1] > 0
