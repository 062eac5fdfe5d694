"""The archive: what was read, in memory and in memory files."""

import numpy as np
import pytest
import torch

import ahn
from ahn.errors import ConfigError, MemoryFileError, UnsupportedOperationError
from ahn.memory import segments
from ahn.memory.archive import EVERY, Archive, Place
from ahn.memory.head_keys import UNKNOWN, RetrievalHeads
from conftest import HEADS, retrieval, tiny, token_ids, with_memory

IDS = token_ids(150)


@pytest.fixture
def model():
    model = with_memory(tiny())
    model.ahn_retrieval = retrieval()
    return model


def letters(ids):
    """As a tokenizer decodes them, one character a token."""
    return "x" * len(ids)


def keys_of(cache):
    return [cache.archive.keys.of(layer) for layer in (0, 1)]


def test_ids_are_those_that_were_read(model):
    cache = ahn.read(model, IDS, archive="text")
    assert len(cache.archive) == 150
    assert cache.archive.ids.tolist() == IDS[0].tolist()
    ahn.read(model, IDS[:, :7], cache)
    ahn.generate(model, IDS[:, :3], cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert cache.archive.ids.tolist()[150:160] == [*IDS[0, :7].tolist(), *IDS[0, :3].tolist()]


def test_the_constant_part_does_not_grow(model):
    plain, archived = ahn.read(model, IDS), ahn.read(model, IDS, archive="keys")
    assert plain.nbytes == archived.nbytes
    for ours, theirs in zip(plain.layers, archived.layers, strict=True):
        for name, tensor in ours.tensors.items():
            assert torch.equal(tensor, theirs.tensors[name])


@pytest.mark.parametrize("pool", [1, 4])
def test_keys_do_not_depend_on_pieces(model, pool):
    model.ahn_retrieval = retrieval(pool)
    whole = keys_of(ahn.read(model, IDS, archive="keys"))
    for chunk in (1, 7, 64):
        pieces = keys_of(ahn.read(model, IDS, archive="keys", chunk=chunk))
        for a, b in zip(whole, pieces, strict=True):
            assert a.shape == b.shape == (150 // pool, a.shape[1], 8)
            assert (a.int() - b.int()).abs().max() <= 1  # rounding


def test_keys_have_no_positions(model):
    """The same token has the same key wherever it stands, in the first layer."""
    keys = keys_of(ahn.read(model, torch.tensor([[5] * 40]), archive="keys"))[0]
    assert (keys.int() - keys[0].int()).abs().max() <= 1


def test_keys_that_were_not_seen_are_unknown(model):
    cache = ahn.read(model, IDS, archive="keys")
    held = cache.archive.keys._layers[0]
    held.add(torch.ones(1, 5, 8), 160)
    joined = held.joined()
    assert len(joined) == 165
    assert (joined[150:160, 0, 0] == UNKNOWN).all() and (joined[160:, 0, 0] != UNKNOWN).all()


def test_a_fork_has_its_own(model):
    cache = ahn.read(model, IDS[:, :50], archive="keys")
    fork = cache.fork()
    ahn.read(model, IDS[:, 50:], fork)
    assert (len(cache.archive), len(fork.archive)) == (50, 150)
    assert len(cache.archive.keys.of(0)) == 50 and len(fork.archive.keys.of(0)) == 150


def test_refused(model):
    with pytest.raises(ConfigError, match="archive='words': expected one of none, text, keys"):
        ahn.AHNCache(model, "words")
    with pytest.raises(UnsupportedOperationError, match="2 rows"):
        ahn.read(model, token_ids(20, batch=2), archive="text")
    with pytest.raises(ConfigError, match="with a cache"):
        ahn.read(model, IDS, ahn.AHNCache(model), archive="text")
    model.ahn_retrieval = None
    with pytest.raises(ConfigError, match="names no retrieval heads"):
        ahn.AHNCache(model, "keys")


@pytest.mark.parametrize("changes", [{"heads": ()}, {"groups": 0}, {"pool": 0}, {"scales": {}}, {"distance": -1}])
def test_heads_that_make_no_sense(changes):
    values = {"heads": HEADS, "groups": 2, "scales": retrieval().scales, "pool": 1, "distance": 64} | changes
    with pytest.raises(ConfigError):
        RetrievalHeads(**values)


def test_places():
    archive = Archive()
    archive.begin("one.txt")
    archive.locate(0, np.arange(200), 3)
    archive.add(torch.arange(200))
    archive.begin("two.txt")
    archive.add(torch.arange(100))
    assert archive.place(0, letters) == Place("one.txt", 3, 0)
    assert archive.place(EVERY + 5, letters) == Place("one.txt", 3, EVERY + 5)
    assert archive.place(210, letters) == Place("two.txt", None, 10)
    assert Archive().place(0, letters) is None


@pytest.mark.parametrize("kind", ["text", "keys"])
def test_saved_and_loaded(model, kind, tmp_path):
    cache = ahn.AHNCache(model, kind)
    cache.archive.begin("book.txt")
    ahn.read(model, IDS, cache)
    cache.save(tmp_path / "m.ahn")
    found = ahn.AHNCache.load(tmp_path / "m.ahn", model)
    assert found.archive.ids.tolist() == IDS[0].tolist()
    assert found.archive.documents == ["book.txt"] and found.archive.kind == kind
    if kind == "keys":
        assert all(torch.equal(a, b) for a, b in zip(keys_of(cache), keys_of(found), strict=True))
    more = ahn.read(model, IDS[:, :30], found.fork())
    again = ahn.read(model, IDS[:, :30], cache.fork())
    assert torch.equal(more.last_logits, again.last_logits)
    if kind == "keys":
        assert all(torch.equal(a, b) for a, b in zip(keys_of(more), keys_of(again), strict=True))


def test_a_memory_without_an_archive_is_a_plain_file(model, tmp_path):
    from safetensors import safe_open

    ahn.read(model, IDS).save(tmp_path / "m.ahn")
    with safe_open(tmp_path / "m.ahn", "pt") as file:
        assert "memory" in file.metadata()
    assert ahn.AHNCache.load(tmp_path / "m.ahn", model).archive is None


def long(model, count=4000):
    return ahn.read(model, token_ids(count), archive="keys")


def test_more_is_appended_without_rewriting(model, tmp_path):
    path = tmp_path / "m.ahn"
    cache = long(model)
    cache.save(path)
    before, inode = path.read_bytes(), path.stat().st_ino
    ahn.read(model, IDS, cache)
    cache.save(path)
    after = path.read_bytes()
    assert path.stat().st_ino == inode and after.startswith(before)
    found = ahn.AHNCache.load(path, model)
    assert found.archive.ids.tolist() == [*token_ids(4000)[0].tolist(), *IDS[0].tolist()]
    assert found.tokens_seen == 4150
    for _ in range(60):  # memories that no longer count never fill most of the file
        ahn.read(model, IDS[:, :5], found)
        found.save(path)
    chain = segments.walk(path)
    memories = sum(s.end - s.start for s in chain if "memory" in s.metadata)
    assert memories <= path.stat().st_size / 2 + len(before)
    assert len(ahn.AHNCache.load(path, model).archive) == 4150 + 300


def test_an_unfinished_append_leaves_the_memory_before(model, tmp_path, caplog):
    path = tmp_path / "m.ahn"
    cache = long(model)
    cache.save(path)
    size = path.stat().st_size
    ahn.read(model, IDS, cache)
    cache.save(path)
    whole = path.read_bytes()
    assert ahn.AHNCache.load(path, model).tokens_seen == 4150 and not caplog.messages
    for end in range(size, len(whole), 997):
        path.write_bytes(whole[:end])
        caplog.clear()
        assert ahn.AHNCache.load(path, model).tokens_seen == 4000
        assert len(caplog.messages) == (end > size)
    path.write_bytes(whole[: size // 3])
    with pytest.raises(MemoryFileError):
        ahn.AHNCache.load(path, model)


@pytest.mark.parametrize("pool", [1, 4])
def test_keys_stay_with_their_tokens_when_more_is_appended(model, pool):
    """Also behind tokens whose keys were not seen, as a CUDA graph leaves them."""
    heads = retrieval(pool)
    archive, parts = Archive(heads), []
    for first, read, seen in ((0, 101, 78), (101, 60, 60), (161, 30, 0)):
        archive.add(torch.zeros(read, dtype=torch.int64))
        for layer, keys in archive.keys._layers.items():
            if seen:
                keys.add(torch.randn(len(heads.kept(layer)), seen, 8), first)
        parts.append(archive.tensors(first))
    found = Archive.restored(archive.describe(), parts, heads)
    for more in (found, archive):
        for layer, keys in more.keys._layers.items():
            keys.add(torch.ones(len(heads.kept(layer)), 9, 8), 191)
    for layer in heads.layers:
        assert torch.equal(found.keys.of(layer), archive.keys.of(layer))


def test_places_of_a_text_whose_reading_was_stopped():
    """They were noted ahead of the model."""
    archive = Archive()
    archive.begin("one.txt")
    archive.locate(0, np.arange(400))
    archive.add(torch.arange(100))
    restored = Archive.restored(archive.describe(), [archive.tensors()], None)
    for text in (archive, restored):
        text.begin("two.txt")
        text.locate(100, np.arange(300))
        text.add(torch.arange(300))
        assert text.place(99, letters) == Place("one.txt", None, 99)
        for token in (100, 130, 399):
            assert text.place(token, letters) == Place("two.txt", None, token - 100)


def test_a_fork_does_not_append_to_what_another_wrote(model, tmp_path):
    path = tmp_path / "m.ahn"
    cache = long(model)
    cache.save(path)
    one, other = cache.fork(), cache.fork()
    ahn.read(model, IDS[:, :10], one).save(path)
    ahn.read(model, IDS[:, 20:40], other).save(path)
    found = ahn.AHNCache.load(path, model)
    assert found.archive.ids.tolist()[4000:] == IDS[0, 20:40].tolist()


def test_damage_is_found(model, tmp_path):
    path = tmp_path / "m.ahn"
    ahn.read(model, IDS, archive="keys").save(path)
    data = bytearray(path.read_bytes())
    at = data.find(np.array(IDS[0, :8].tolist(), dtype=np.int32).tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(MemoryFileError, match="checksum"):
        ahn.AHNCache.load(path, model)


def test_keys_of_other_heads_are_refused(model, tmp_path):
    ahn.read(model, IDS, archive="keys").save(tmp_path / "m.ahn")
    model.ahn_retrieval = retrieval(4)
    with pytest.raises(MemoryFileError, match="other retrieval heads"):
        ahn.AHNCache.load(tmp_path / "m.ahn", model)


def test_heads_are_part_of_an_adapter(model, tmp_path):
    ahn.save_adapter(model, tmp_path / "a")
    other = with_memory(tiny(), seed=7)
    ahn.load_adapter(other, tmp_path / "a")
    assert other.ahn_retrieval.to_dict() == model.ahn_retrieval.to_dict()
