"""A memory file is the old one or the new one, whole, whenever its writer is killed and whatever the disk refuses."""

import os
import random
import resource
import signal
import time
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch

import ahn
from ahn.errors import AHNError
from conftest import tiny, token_ids, with_memory

KILLS = 20
LENGTHS = 40, 60  # tokens of the two memories that are written in turns


def memories():
    model = with_memory(tiny())
    return model, {length: ahn.read(model, token_ids(length)) for length in LENGTHS}


def the_same(a, b):
    return all(
        torch.equal(tensor, other.tensors[name])
        for layer, other in zip(a.layers, b.layers, strict=True)
        for name, tensor in layer.tensors.items()
    )


def saving(caches, path):
    """The id of a process that saves one memory after the other, for ever."""
    process = os.fork()
    if process:
        return process
    try:
        safetensors.torch.save_file = slowly
        while True:
            for cache in caches.values():
                cache.save(path)
    finally:
        os._exit(1)


def slowly(tensors, path, metadata):
    """As to a slow disk, so that most of the time is spent on it."""
    data = safetensors.torch.save(tensors, metadata)
    with open(path, "wb", buffering=0) as file:
        for low in range(0, len(data), 4096):
            file.write(data[low : low + 4096])
            time.sleep(0.001)


def test_killed_while_saving(tmp_path):
    path, (model, caches), draw = tmp_path / "memory.ahn", memories(), random.Random(0)
    caches[40].save(path)
    for _ in range(KILLS):
        process = saving(caches, path)
        time.sleep(draw.uniform(0.01, 0.1))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = ahn.AHNCache.load(path, model)
        assert the_same(found, caches[found.tokens_seen])
    caches[40].save(path)
    assert list(tmp_path.iterdir()) == [path]  # what the killed ones left is gone


@contextmanager
def files_up_to(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("what", ["memory", "adapter"])
def test_a_disk_that_is_full_after_some_bytes(tmp_path, what, share):
    model, caches = memories()

    def save(length):
        if what == "memory":
            caches[length].save(tmp_path / "memory.ahn")
        else:
            ahn.save_adapter(model, tmp_path)

    save(40)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with files_up_to(int(share * max(map(len, before.values())))), pytest.raises(AHNError, match="cannot be written"):
        save(60)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    save(60)
