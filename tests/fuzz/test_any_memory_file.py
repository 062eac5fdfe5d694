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
from ahn.compat import PAST
from ahn.errors import MemoryFileError
from ahn.memory import file_contents, file_format, segments
from ahn.memory.head_keys import RetrievalHeads
from conftest import storing, tiny, token_ids, with_memory
from damage import damaged, edits, header_of, values, with_header
from effort import bounded, fuzz

pytestmark = pytest.mark.slow

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
        file_contents.retained(path, memory.model.config)
    return not refused


def sealed(header, tensors):
    """The file of someone who makes the checksum right again."""
    with suppress(Exception):  # a header so strange that it has no checksum
        header = header | {"sha256": file_format.checksum(header, tensors)}
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


# With an archive: several files in one, of which the last memory counts.

ARCHIVES = {"text": 6000, "keys": 1000}  # tokens, so many that a memory is appended to them


@dataclasses.dataclass
class Archived(Memory):
    """And what the memory before the last one held."""

    before: Any
    segments: list[bytes]


@pytest.fixture(scope="module", params=ARCHIVES)
def archived(request, tmp_path_factory):
    model = KINDS["cell"]()
    scales = torch.stack([torch.zeros(2, 8), torch.full((2, 8), 0.05)])
    model.ahn_retrieval = RetrievalHeads(((0, 1), (1, 0), (1, 3)), 2, {0: scales[:, :1], 1: scales})
    path, cache = tmp_path_factory.mktemp("archive") / "memory.ahn", ahn.AHNCache(model, request.param)
    held = []
    for name, count in (("one.txt", ARCHIVES[request.param]), ("two.txt", 9)):
        cache.archive.begin(name)
        ahn.read(model, token_ids(count), cache).save(path)
        held.append(contents(model, ahn.AHNCache.load(path, model)))
    data = path.read_bytes()
    chain = segments.walk(path)
    assert len(chain) == 4
    return Archived(model, data, held[1], held[0], [data[one.start : one.end] for one in chain])


def contents(model, cache):
    archive = cache.archive
    keys = [] if archive.keys is None else [archive.keys.of(layer).tolist() for layer in (0, 1)]
    places = [archive.place(token, str) for token in (0, len(archive) - 9)]
    return following(model, cache.fork()).tolist(), archive.ids.tolist(), archive.documents, keys, places


def check_archived(archived, data, folder, equal=True):
    """Loading `data` is refused, or gives the memory of before; where the end of the file is not that of a memory, it
    may be the one before that. Without `equal`, one that can be used."""
    path, model = folder / "memory.ahn", archived.model
    path.write_bytes(data)
    with bounded(folder, MemoryFileError) as refused:
        cache = ahn.AHNCache.load(path, model)
    if refused:
        return
    with bounded(folder, ()):
        found = contents(model, cache)
    unfinished = not data.endswith(archived.segments[-1]) or segments.walk(path)[-1].end < len(data)
    assert not equal or found == archived.expected or (unfinished and found == archived.before)
    ahn.read(model, token_ids(9), cache).save(path)  # appended, or written anew
    with bounded(folder, ()):
        assert ahn.AHNCache.load(path, model).archive.ids.tolist() == [*found[1], *token_ids(9)[0].tolist()]


@fuzz(40)
@given(st.data())
def test_bytes_with_an_archive(archived, tmp_path, data):
    check_archived(archived, data.draw(damaged(archived.data)), tmp_path)


@fuzz(40)
@given(st.data())
def test_any_part_of_an_archive(archived, tmp_path, data):
    """Bytes of one part are changed, or those of its header, which is where most can go wrong."""
    parts = list(archived.segments)
    index = data.draw(st.integers(0, len(parts) - 1))
    if data.draw(st.booleans()):
        parts[index] = data.draw(damaged(parts[index]))
    else:
        header, rest = header_of(parts[index])
        parts[index] = with_header(data.draw(edits(header)), rest)
    check_archived(archived, b"".join(parts), tmp_path)


@fuzz(20)
@given(st.data())
def test_an_archive_that_ends_anywhere(archived, tmp_path, data):
    """After the first memory there is always one."""
    end = data.draw(st.integers(0, len(archived.data) - 1))
    (tmp_path / "memory.ahn").write_bytes(archived.data[:end])
    if end < len(archived.data) - sum(map(len, archived.segments[2:])):
        with pytest.raises(MemoryFileError):
            ahn.AHNCache.load(tmp_path / "memory.ahn", archived.model)
    else:
        found = ahn.AHNCache.load(tmp_path / "memory.ahn", archived.model)
        assert contents(archived.model, found) == archived.before


@fuzz(40)
@given(st.data())
def test_parts_of_an_archive_with_a_new_checksum(archived, tmp_path, data):
    """Its description, places, ids and keys by someone who makes the checksums right again."""
    first, memory = archived.segments[:2]
    part = load(first)
    header, tensors = json.loads(header_of(memory)[0]["__metadata__"]["memory"]), load(memory)
    if data.draw(st.booleans()):
        header["archive"] = data.draw(edits(header["archive"]))
    else:
        name = data.draw(st.sampled_from(sorted(part)))
        match data.draw(st.sampled_from(["gone", "type", "shape", "value"])):
            case "gone":
                del part[name]
            case "type":
                part[name] = part[name].to(data.draw(st.sampled_from([torch.float32, torch.int16, torch.bool])))
            case "shape":
                part[name] = part[name][: data.draw(st.integers(0, len(part[name])))].clone()
            case "value":
                value = data.draw(st.sampled_from([-1, 127, 2**31 - 1]))
                part[name].view(-1)[: data.draw(st.integers(0, 3))] = min(value, torch.iinfo(part[name].dtype).max)
        first = save(part, {"archive": "0"})
        digest = file_format.checksum({"ahn": file_format.WITH_ARCHIVE, "archive": 0}, part)
        header["archive"]["parts"] = [[0, len(first), digest]]
    check_archived(archived, first + sealed(header, tensors), tmp_path, equal=False)
