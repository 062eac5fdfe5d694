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
from ahn import files
from ahn.errors import AHNError
from ahn.memory import segments
from ahn.memory.head_keys import RetrievalHeads
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


@pytest.mark.slow
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


MORE, APPENDED = 300, 18_000  # tokens that are read then, and fewer bytes than they add
LONG = 2000  # tokens of an archive: a memory is appended to a file that is larger


@pytest.fixture
def archived():
    """A model with retrieval heads, and a memory of many tokens with their keys."""
    model = with_memory(tiny())
    scales = torch.stack([torch.zeros(2, 8), torch.full((2, 8), 0.05)])
    model.ahn_retrieval = RetrievalHeads(((0, 1), (1, 0), (1, 3)), 2, {0: scales[:, :1], 1: scales})
    return model, ahn.read(model, token_ids(LONG), archive="keys")


class Slow:
    """A file on a slow disk."""

    def __init__(self, file):
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def write(self, data):
        time.sleep(0.001)
        return self.file.write(data[:1024])


def appending(model, cache, path):
    """The id of a process that reads on and appends what it has read to the file, for ever: it has begun to append."""
    begun, begins = os.pipe()
    process = os.fork()
    if process:
        os.close(begins)
        assert os.read(begun, 1)
        os.close(begun)
        return process
    try:
        os.close(begun)
        append = segments.append

        def slowly_appended(file, tensors, metadata):
            if not appended:
                os.write(begins, b".")
                appended.append(True)
            return append(Slow(file), tensors, metadata)

        appended = []
        segments.append = slowly_appended
        while True:
            ahn.read(model, token_ids(MORE), cache)
            cache.save(path)
    finally:
        os._exit(1)


@pytest.mark.slow
def test_killed_while_appending(tmp_path, archived):
    """The memory is the old one or the new one, and all that it has read is in its archive."""
    path, (model, cache), draw = tmp_path / "memory.ahn", archived, random.Random(0)
    cache.save(path)
    unfinished, whole = 0, path.read_bytes()
    for _ in range(KILLS):
        path.write_bytes(whole)  # a file with less archive than memories would be replaced
        loaded = ahn.AHNCache.load(path, model)
        process = appending(model, loaded, path)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        found, before = ahn.AHNCache.load(path, model), loaded.tokens_seen
        unfinished += path.stat().st_size > segments.walk(path)[-1].end
        times, rest = divmod(found.tokens_seen - before, MORE)
        assert not rest and times >= 0
        for _ in range(times):
            ahn.read(model, token_ids(MORE), loaded)
        assert_same_archive(found, loaded)
    assert unfinished
    found.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert segments.walk(path)[-1].end == path.stat().st_size


def assert_same_archive(a, b):
    assert the_same(a, b)
    assert a.archive.ids.tolist() == b.archive.ids.tolist()
    assert all(torch.equal(a.archive.keys.of(layer), b.archive.keys.of(layer)) for layer in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_disk_that_is_full_while_appending(tmp_path, archived, share):
    path, (model, cache) = tmp_path / "memory.ahn", archived
    cache.save(path)
    before, old = path.read_bytes(), ahn.AHNCache.load(path, model)
    again = ahn.AHNCache.load(path, model)
    ahn.read(model, token_ids(MORE), again)
    with files_up_to(len(before) + int(share * APPENDED)), pytest.raises(AHNError, match="cannot be written"):
        again.save(path)
    assert path.read_bytes() == before
    assert_same_archive(ahn.AHNCache.load(path, model), old)
    again.save(path)
    assert path.read_bytes().startswith(before)
    assert_same_archive(ahn.AHNCache.load(path, model), again)
    assert path.stat().st_size - len(before) > APPENDED


def test_two_processes_do_not_append_at_once(tmp_path, archived):
    """The second one writes a file of its own in its place."""
    path, (model, cache) = tmp_path / "memory.ahn", archived
    cache.save(path)
    one, other = (ahn.AHNCache.load(path, model) for _ in range(2))
    ahn.read(model, token_ids(MORE), one)
    ahn.read(model, token_ids(MORE, seed=9), other)
    with files.appending(path, one.archive.home.end, one.archive.home.inode) as file:
        file.write(b"half")
        process = os.fork()
        if not process:
            try:
                other.save(path)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(process, 0)[1] == 0
    assert_same_archive(ahn.AHNCache.load(path, model), other)
    one.save(path)
    assert_same_archive(ahn.AHNCache.load(path, model), one)
