"""Several processes, on one machine or many: `torchrun --nproc-per-node 8 -m ahn eval ...`.

Examples do not depend on each other, so all that is needed of an engine is a number for each process, a device, and a
barrier. torchrun starts the processes on any number of machines and takes the rest down if one fails; accelerate, a
dependency already, reads what it set up. Ray would add a scheduler, a service to run and a large dependency, for tasks
that are dealt out once; and the results are files either way.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

WAIT = timedelta(days=7)  # the first process to finish waits for the slowest one's last example


class Team:
    """The processes that share the work; alone where none were started.

    Attributes:
        rank: of this process, 0 to size - 1. device: this process's, None for the default.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.device = 0, 1, None
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            import torch
            from accelerate import PartialState

            self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
            self.rank, self.size = self._state.process_index, self._state.num_processes
            self.device = str(self._state.device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def mine(self, items: list[Any]) -> list[Any]:
        """This process's share: every size-th, so that examples of a kind that come together are spread."""
        return items[self.rank :: self.size]

    def close(self) -> None:
        if self._state is not None:
            self._state.destroy_process_group()


def first_process() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0
