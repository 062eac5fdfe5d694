"""Which words the tokens were that a store keeps, for people: `ahn inspect`.

A model needs only keys and values. So that a store can be read, the ids of the tokens that some head of some layer
still keeps, and of a few beside them, are kept along with their positions; what nobody keeps any more is dropped from
time to time. That bounds it by the number of places, whatever the length of the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

BESIDE = 6  # neighbours to each side
PENDING = 4096  # tokens after which what nobody keeps is dropped


class Transcript:
    """Positions and ids by row, on the device of the ids."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # int64 [2, n]: positions, ascending, and ids
        self.pending: list[tuple[list[int], list[int], Tensor]] = []  # starts, counts, ids [B, T] in order

    def copy(self) -> Transcript:
        twin = Transcript()
        twin.rows, twin.pending = list(self.rows), list(self.pending)
        return twin

    def add(self, starts: list[int], counts: list[int], ids: Tensor) -> None:
        """Tokens that are read: row b has ids[b, :counts[b]] from position starts[b] on; one entry serves all rows."""
        self.pending.append((starts, counts, ids))

    @property
    def is_due(self) -> bool:
        return sum(ids.shape[1] for *_, ids in self.pending) >= PENDING

    def settle(self, kept: list[Tensor], sinks: int, last: int) -> None:
        """Drop what is kept nowhere.

        Args:
            kept: positions that are kept, by layer [B, n], below 0 where there is none. sinks, last: so many first and
                last tokens are kept as well.
        """
        if not self.rows and not self.pending:
            return
        batch = max([len(self.rows), *(len(ids) for *_, ids in self.pending)])
        device = self.pending[0][-1].device if self.pending else self.rows[0].device
        rows = self.rows * batch if len(self.rows) == 1 else self.rows
        pieces = [[row.to(device)] for row in rows] or [[] for _ in range(batch)]
        for starts, counts, ids in self.pending:
            for row in range(batch):
                start, count = starts[row % len(starts)], counts[row % len(counts)]
                places = torch.arange(start, start + count, device=device)
                pieces[row].append(torch.stack([places, ids[row % len(ids), :count].to(device, torch.int64)]))
        rows = [torch.cat(of_row, 1) for of_row in pieces]
        self.rows, self.pending = rows, []
        stored = torch.cat([positions.to(device) for positions in kept], 1) if kept else None
        for row, known in enumerate(rows):
            at = known[0]
            end = int(at[-1]) + 1 if len(at) else 0
            marks = torch.zeros(end + 2 * BESIDE + 1, dtype=torch.int64, device=device)  # BESIDE + 1 before position 0
            if stored is not None:
                positions = stored[row % len(stored)]
                there = (positions >= 0) & (positions < end)  # embeddings have no ids
                marks.index_fill_(0, torch.where(there, positions + BESIDE + 1, 0), 1)
                marks[0] = 0
            before = marks.cumsum(0)  # of the positions below, BESIDE + 1 further on
            near = before[at + 2 * BESIDE + 1] > before[at]
            rows[row] = known[:, (at < sinks) | (at >= end - last) | near]

    def select(self, indices: list[int]) -> None:
        """Rows become copies of rows `indices`."""
        self.rows = [self.rows[i if len(self.rows) > 1 else 0] for i in indices] if self.rows else []
        self.pending = [
            ([s[i % len(s)] for i in indices], [c[i % len(c)] for i in indices], ids[[i % len(ids) for i in indices]])
            for s, c, ids in self.pending
        ]
