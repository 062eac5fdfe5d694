"""Memory files: what is loaded is what was saved, or a clear error."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ahn
from ahn.compat import PAST
from ahn.errors import AHNError, MemoryFileError
from ahn.memory import file as memory_file
from ahn.memory import file_format
from conftest import tiny, token_ids, with_memory

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}


@pytest.fixture
def model():
    return with_memory(tiny())


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "book.ahn"
    ahn.read(model, token_ids(60)).save(path)
    return path


@pytest.mark.parametrize("tokens", [3, 20, 60])
def test_loaded_equals_never_saved_bitwise(cell, tmp_path, tokens):
    model = with_memory(tiny(), cell)
    question = token_ids(9, seed=4)
    cache = ahn.read(model, token_ids(tokens))
    cache.save(tmp_path / "book.ahn")
    loaded = ahn.AHNCache.load(tmp_path / "book.ahn", model)
    assert (loaded.tokens_seen, loaded.nbytes, loaded.config) == (tokens, cache.nbytes, cache.config)
    assert torch.equal(loaded.last_logits, cache.last_logits)
    with torch.no_grad():
        assert torch.equal(model(question, **{PAST: loaded}).logits, model(question, **{PAST: cache}).logits)
    assert torch.equal(ahn.generate(model, question, loaded, **GREEDY), ahn.generate(model, question, cache, **GREEDY))


def test_padded_batches_are_saved_too(model, tmp_path):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :11] = 0
    cache = ahn.read(model, token_ids(40, batch=2), attention_mask=mask)
    cache.save(tmp_path / "two.ahn")
    loaded = ahn.AHNCache.load(tmp_path / "two.ahn", model)
    assert loaded.tokens_per_row == [29, 40]
    new = token_ids(5, batch=2)
    with torch.no_grad():
        assert torch.equal(model(new, **{PAST: loaded}).logits, model(new, **{PAST: cache}).logits)


def test_half_precision(tmp_path):
    model = with_memory(tiny().to(torch.bfloat16))
    cache = ahn.read(model, token_ids(60))
    cache.save(tmp_path / "book.ahn")
    assert ahn.AHNCache.load(tmp_path / "book.ahn", model).layers[0].keys.dtype == torch.bfloat16
    with pytest.raises(MemoryFileError, match="float32"):
        ahn.AHNCache.load(tmp_path / "book.ahn", with_memory(tiny()))


def test_header(saved):
    header = file_format.peek(saved)
    assert header["tokens_seen"] == 60
    assert header["config"]["window"] == 16


@pytest.mark.parametrize(
    "other",
    [
        lambda: with_memory(tiny(seed=5)),
        lambda: with_memory(tiny(), seed=7),
        lambda: with_memory(tiny(num_hidden_layers=3)),
        lambda: with_memory(tiny("Qwen2")),
    ],
    ids=["weights", "adapter", "layers", "family"],
)
def test_another_model(saved, other):
    with pytest.raises(MemoryFileError, match="another model"):
        ahn.AHNCache.load(saved, other())


def test_the_sizes_are_those_of_the_file(saved, model):
    """Loading sets window and sinks, so nobody needs to know them; the cache goes on as the one that was saved."""
    other, more = with_memory(tiny(), window=17, sinks=2), token_ids(20)
    loaded = ahn.AHNCache.load(saved, other)
    assert other.ahn_config == loaded.config == model.ahn_config
    expected = ahn.read(model, more, ahn.AHNCache.load(saved, model)).last_logits
    assert torch.equal(ahn.read(other, more, loaded).last_logits, expected)


def test_sizes_stay_where_loading_fails(saved, model):
    other = with_memory(tiny(), seed=7, window=17)
    with pytest.raises(MemoryFileError, match="fingerprint"):
        ahn.AHNCache.load(saved, other)
    assert other.ahn_config.window == 17
    ahn.read(other, token_ids(40))


def test_another_setting(saved):
    with pytest.raises(MemoryFileError, match=r"another model \(.*; sink_positions='clipped', not 'absolute'\)$"):
        ahn.AHNCache.load(saved, with_memory(tiny(), sink_positions="absolute"))


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, 0.99])
def test_truncated(saved, model, kept):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(MemoryFileError, match=str(saved)):
        ahn.AHNCache.load(saved, model)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_tampered_tensors(saved, model, place):
    content = bytearray(saved.read_bytes())
    content[int(place * len(content))] ^= 1
    saved.write_bytes(content)
    with pytest.raises(MemoryFileError, match="damaged|not a memory file"):
        ahn.AHNCache.load(saved, model)


def rewrite_header(path, **changes):
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["memory"])
    save_file(load_file(path), path, metadata={"memory": json.dumps(header | changes)})


def test_tampered_header(saved, model):
    rewrite_header(saved, tokens_seen=61)
    with pytest.raises(MemoryFileError, match="checksum"):
        ahn.AHNCache.load(saved, model)


def test_another_version(saved, model):
    rewrite_header(saved, ahn=4)
    with pytest.raises(MemoryFileError, match="version 4: this ahn reads 1 to 3"):
        ahn.AHNCache.load(saved, model)


@pytest.mark.parametrize("version", [1, 2])
def test_every_version_is_read_and_checked(model, tmp_path, monkeypatch, version):
    """With pieces so small that a tensor has several, the last one shorter."""
    monkeypatch.setattr(file_format, "PIECE", 1000)
    path, cache = tmp_path / "book.ahn", ahn.read(model, token_ids(60))
    with monkeypatch.context() as then:
        then.setattr(memory_file, "VERSION", version)
        cache.save(path)
    assert file_format.peek(path)["ahn"] == version
    loaded = ahn.AHNCache.load(path, model)
    for ours, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MemoryFileError, match="checksum"):
        ahn.AHNCache.load(path, model)


def test_not_a_memory_file(tmp_path, model):
    with pytest.raises(MemoryFileError, match="no such memory file"):
        ahn.AHNCache.load(tmp_path / "nothing.ahn", model)
    save_file({"a": torch.zeros(1)}, tmp_path / "else.ahn")
    with pytest.raises(MemoryFileError, match="not a memory file"):
        ahn.AHNCache.load(tmp_path / "else.ahn", model)
    (tmp_path / "text.ahn").write_text("once upon a time " * 50)
    with pytest.raises(MemoryFileError, match="not a memory file"):
        ahn.AHNCache.load(tmp_path / "text.ahn", model)


def test_a_full_disk_keeps_the_earlier_file(saved, model, monkeypatch):
    before = saved.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(MemoryFileError, match="No space left"):
        ahn.read(model, token_ids(30)).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_no_such_folder(model, tmp_path):
    with pytest.raises(MemoryFileError, match="cannot be written"):
        ahn.read(model, token_ids(30)).save(tmp_path / "missing" / "book.ahn")


def test_an_empty_memory(model, tmp_path):
    with pytest.raises(MemoryFileError, match="empty"):
        ahn.AHNCache(model).save(tmp_path / "book.ahn")


def test_a_half_written_memory(model, tmp_path, monkeypatch):
    cache = ahn.read(model, token_ids(30))
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(token_ids(3), **{PAST: cache})
    with pytest.raises(AHNError, match="half-written"):
        cache.save(tmp_path / "book.ahn")


@pytest.mark.parametrize("texts", [5, None, [5], [{}], [{"tokens": "9", "sha256": "", "complete": True}]])
def test_a_damaged_note_of_what_was_read(saved, model, texts):
    rewrite_header(saved, texts=texts)
    with pytest.raises(MemoryFileError, match="damaged"):
        ahn.AHNCache.load(saved, model)
