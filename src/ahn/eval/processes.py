"""Several processes, on one machine or many: `torchrun --nproc-per-node 8 -m ahn eval ...`.

Texts do not depend on each other, so a process only needs a number, a device, and a barrier. torchrun starts the
processes on any number of machines and takes the rest down if one fails. Ray would add a scheduler, a service and a
large dependency, for tasks that are dealt out once. The results are files either way.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from typing import Any
from uuid import uuid4

WAIT = timedelta(days=7)  # the fastest process waits for the last example of the slowest one


class Team:
    """The processes that share the work: this one alone unless several were started. Several may share a GPU.

    Attributes:
        rank: number of this process, 0 to size - 1.
        size: number of processes.
        device: of this process; None: the default.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.device = 0, 1, None
        if several():
            import torch
            from torch import distributed

            if not distributed.is_initialized():  # once for all runs of a suite
                distributed.init_process_group("gloo", timeout=WAIT)  # NCCL refuses two processes on one GPU
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
            if torch.cuda.is_available():
                self.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
                torch.cuda.set_device(self.device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()

    def mine(self, items: list[Any]) -> list[Any]:
        """This process's share: every size-th item, so that similar neighbours go to different processes."""
        return items[self.rank :: self.size]


def several() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def first_process() -> bool:
    """Whether this process prints for all."""
    return int(os.environ.get("RANK", 0)) == 0


def start(count: int, arguments: list[str]) -> int:
    """Run Python with these arguments in `count` processes of this machine, as torchrun does.

    Returns:
        0, or the exit code of the process that failed first. It has said why; torchrun's own report is left out.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the processes share the cores
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    return 0
