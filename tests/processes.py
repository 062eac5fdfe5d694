"""Processes that need not import torch again: forks of one that has imported it, and has done nothing else."""

import multiprocessing
import os
import runpy
import socket
import sys

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "datasets", "ahn.cli", "ahn.eval.runner", "ahn.train.run"])


def start(output, *command, **environment):
    """Begins `ahn COMMAND`, or a script with arguments if the first word ends in ".py". Returns the process; what it
    prints goes to the end of the file `output`."""
    process = FORKS.Process(target=_run, args=(str(output), command, environment), daemon=True)
    process.start()
    return process


def two(output, *command):
    """Runs two processes as torchrun starts them. Returns what they print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = [start(output, *command, RANK=str(rank), LOCAL_RANK=str(rank), **ranks) for rank in range(2)]
    for process in started:
        process.join(120)
    said = output.read_text()
    assert [process.exitcode for process in started] == [0, 0], said
    return said


def _run(output, command, environment):
    import torch

    from ahn import cli

    torch.set_num_threads(1)  # as in the tests: sums of another number of threads are rounded in another order
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    if command[0].endswith(".py"):
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
    else:
        sys.exit(cli.main(command))
