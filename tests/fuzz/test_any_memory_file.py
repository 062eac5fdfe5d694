"""Memory files that were damaged or edited: refused, or the same memory."""

import dataclasses
import json
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load, save

import ahn
from ahn import memory_file
from ahn.cache import PAST
from ahn.errors import MemoryFileError
from conftest import storing, tiny, token_ids, with_memory
from damage import damaged, edits, header_of, values, with_header
from effort import bounded, fuzz

KINDS = {
    "cell": lambda: with_memory(tiny(), window=6, sinks=2),
    "store": lambda: storing("surprise", base=tiny(), window=6, sinks=2, store_size=3, store_span=2),
    "some layers": lambda: with_memory(tiny(), None, window=6, sinks=2, layers=(1,)),
}


@dataclasses.dataclass
class Memory:
    """A model, the bytes of a memory of it, and the logits that follow."""

    model: Any
    data: bytes
    expected: torch.Tensor

    def __repr__(self):
        return "it"


@pytest.fixture(scope="module", params=KINDS)
def memory(request, tmp_path_factory):
    model = KINDS[request.param]()
    ids = token_ids(15, batch=2 if request.param == "cell" else 1)
    path = tmp_path_factory.mktemp("memory") / "memory.ahn"
    ahn.read(model, ids).save(path)
    return Memory(model, path.read_bytes(), following(model, ahn.AHNCache.load(path, model)))


@torch.no_grad()
def following(model, cache):
    logits = [] if cache.last_logits is None else [cache.last_logits[:, None]]
    logits += [model(token_ids(n, cache.batch_size), **{PAST: cache}).logits for n in (1, 9, 1)]
    return torch.cat(logits, 1)


def check(memory, data, folder, equal=True):
    """Loading `data` is refused, or gives the memory of before; without `equal`, one that can be used."""
    path = folder / "memory.ahn"
    path.write_bytes(data)
    with bounded(folder, MemoryFileError) as refused:
        cache = ahn.AHNCache.load(path, memory.model)
    if not refused:
        with bounded(folder, ()):
            found = following(memory.model, cache)
        assert not equal or torch.equal(found, memory.expected)
    with bounded(folder, MemoryFileError):
        memory_file.retained(path, memory.model.config)
    return not refused


def sealed(header, tensors):
    """The file of someone who makes the checksum right again."""
    with suppress(Exception):  # a header so strange that it has no checksum
        header = header | {"sha256": memory_file._digest(header, tensors)}
    return save(tensors, {"memory": json.dumps(header)})


def parts(data):
    return json.loads(header_of(data)[0]["__metadata__"]["memory"]), load(data)


@fuzz(40)
@given(st.data())
def test_bytes(memory, tmp_path, data):
    check(memory, data.draw(damaged(memory.data)), tmp_path)


@fuzz(40)
@given(st.data())
def test_headers(memory, tmp_path, data):
    """Of the file format, and the memory's own in it, whose checksum is that of before."""
    header, rest = header_of(memory.data)
    if data.draw(st.booleans()):
        header = data.draw(edits(header))
    else:
        mine = data.draw(edits(json.loads(header["__metadata__"]["memory"])))
        header["__metadata__"]["memory"] = json.dumps(mine)
    check(memory, with_header(header, rest), tmp_path)


@fuzz(40)
@given(st.data())
def test_headers_with_a_new_checksum(memory, tmp_path, data):
    """Nobody can tell that a number is not the one that was written; but what is accepted can be used."""
    header, tensors = parts(memory.data)
    check(memory, sealed(data.draw(edits(header) | values), tensors), tmp_path, equal=False)


@fuzz(40)
@given(st.data())
def test_tensors_with_a_new_checksum(memory, tmp_path, data):
    """A tensor of another shape, type or name, one too many, or one too few."""
    header, tensors = parts(memory.data)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    match data.draw(st.sampled_from(["gone", "name", "type", "shape", "row", "extra"])):
        case "name":
            tensors[data.draw(names(name))] = tensor
        case "type":
            kind = data.draw(st.sampled_from([torch.float64, torch.float16, torch.int64, torch.int32, torch.bool]))
            assume(kind != tensor.dtype)
            tensors[name] = tensor.to(kind)
        case "shape":
            shape = list(tensor.shape)
            shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(st.integers(0, 40))
            assume(shape != list(tensor.shape))
            tensors[name] = torch.zeros(shape, dtype=tensor.dtype)
        case "row":
            tensors[name] = tensor[None] if data.draw(st.booleans()) else tensor[0]
        case "extra":
            tensors |= {name: tensor, data.draw(names(name)): tensor.clone()}
    loaded = check(memory, sealed(header, tensors), tmp_path, equal=False)
    assert not loaded or name in ("last_logits", "text.0")  # a memory need not have them, nor so many words


def names(name):
    index, _, kind = name.partition(".")
    some = ["", ".", "0", "-1.keys", "7.keys", "0.", "0.window", "0.sinks", "0.size", "x.keys", "text.1", "text.x"]
    some += [f"{index}.keys.x", f"{index}.{kind}x", f"00{name}", f"{name}\n"]
    return st.sampled_from(some) | st.text(max_size=8)
