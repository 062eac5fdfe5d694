"""Dense attention on pieces of the ring: the same logits as a whole sequence, however it is cut."""

import contextlib
import functools

import pytest
import torch

import ahn
from ahn.engine import compile as compiling
from ahn.engine import prefill
from ahn.memory import dense
from ahn.memory.batch import ForwardBatch
from ahn.memory.layer import AHNLayer
from ahn.ops import dispatch
from ahn.ops.softmax import merge, merge_all
from conftest import in_pieces, tiny, token_ids, with_memory

SPLITS = ([90], [7, 13, 1, 30, 8, 31], [20, 16, 16, 16, 16, 6], [3, 2, 40, 45], [50, 15, 2, 23])


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [1, 16, 200])
@pytest.mark.parametrize("form", [{}, {"memory_positions": "none"}, {"layers": [1]}], ids=str)
def test_any_split(monkeypatch, form, window, sinks):
    """Pieces that end at, before and behind the sinks and the ring's end; windows of one token, and never full."""
    calls = []
    read = AHNLayer._attend_ring
    monkeypatch.setattr(AHNLayer, "_attend_ring", lambda *args: calls.append(1) or read(*args))
    model = with_memory(tiny(), window=window, sinks=sinks, **form)
    ids = token_ids(90, batch=2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in SPLITS:
        assert (in_pieces(model, ids, sizes) - whole).abs().max() < 1e-4, sizes
    assert calls


def test_where_batches_are_cut():
    def cut(start, length, sinks=4, window=10):
        batch = ForwardBatch(torch.tensor([start]), length, [length])
        return [(piece.first, piece.length) for _, piece in dense.cuts(batch, sinks, window)]

    assert cut(0, 40) == [(0, 4), (4, 10), (14, 10), (24, 10), (34, 6)]
    assert cut(3, 5) == [(3, 1), (4, 4)]
    assert cut(20, 9) == [(20, 9)]
    assert cut(0, 40, window=None) == [(0, 40)]


def test_chunks_of_a_gpu(monkeypatch):
    """A window is a whole number of them, and they begin where it does; few numbers a token make them longer."""
    model = with_memory(tiny(max_position_embeddings=40000), window=32640, sinks=128)
    hidden = model.config.hidden_size
    assert prefill.chunks(model, 1, 0) == (512, None, 0)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(prefill, "GPU_NUMBERS", 2048 * hidden)
    assert prefill.chunks(model, 1, 0) == (8160, 8160 + 128, 0)
    assert prefill.chunks(model, 1, 8288) == (8160, 8160, 0)
    chunk, first, _ = prefill.chunks(model, 1, 50000)
    assert (50000 + first - 128) % chunk == 0 and chunk <= first < 2 * chunk
    assert prefill.chunks(model, 32, 0).size == 510
    monkeypatch.setattr(prefill, "GPU_NUMBERS", 16384 * hidden)
    assert prefill.chunks(model, 1, 0) == (16320, 16320 + 128, 0)
    assert prefill.chunks(model, 2, 0).size == 8160


def test_where_chunks_end():
    """A short rest is part of the last chunk, whatever the first was."""
    assert prefill.Chunks(16, 20).ends(90) == [20, 36, 52, 68, 84, 90]
    assert prefill.Chunks(16, 20).ends(85) == [20, 36, 52, 68, 85]
    assert prefill.Chunks(16, 20).ends(84) == [20, 36, 52, 68, 84]
    assert prefill.Chunks(16, 20).ends(21) == [21]
    assert prefill.Chunks(16, 20).ends(20) == prefill.Chunks(16, 40).ends(20) == [20]
    assert prefill.Chunks(1, 1).ends(3) == [1, 2, 3]


def test_short_chunks_of_a_wide_window_are_attended_by_one_kernel(monkeypatch):
    """Where cuDNN would make a plan for their length; elsewhere the kernel is for narrow windows."""

    def one(tokens, window, fused="cudnn", own="triton"):
        monkeypatch.setattr(dispatch, "pick_attention", lambda like: dispatch.Kernel(fused, ""))
        monkeypatch.setattr(dispatch, "pick_band", lambda like: dispatch.Kernel(own, ""))
        return dispatch.window_in_one(torch.empty(1, 1, tokens, 8), window)

    assert one(20, 32640) and one(dispatch.PLANNED - 1, 32640) and not one(dispatch.PLANNED, 32640)
    assert one(dispatch.PLANNED, dispatch.NARROW) and not one(20, dispatch.NARROW, own="torch")
    assert not one(20, 32640, fused="flash")


def test_a_first_chunk_of_another_size(monkeypatch):
    model = with_memory(tiny(), window=16, sinks=4)
    ids = token_ids(90)
    done = []
    monkeypatch.setattr("ahn.engine.prefill.chunks", lambda *args: prefill.Chunks(16, first=20))
    cache = ahn.read(model, ids, progress=lambda low, total: done.append((low, total)))
    assert done == [(20, 90), (36, 90), (52, 90), (68, 90), (84, 90), (90, 90)]
    with torch.no_grad():
        assert (cache.last_logits - model(ids, use_cache=False).logits[:, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("early", [False, True])
def test_merging_several_parts_is_merging_them_one_by_one(early):
    torch.manual_seed(0)
    parts = [(torch.randn(2, 3, 7, 4), 5 * torch.randn(2, 3, 7)) for _ in range(3)]
    last = (torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6)) if early else None
    found = merge_all(parts, last)
    expected = merge(merge(parts[0], parts[1]), parts[2])
    if last is not None:
        one = merge((last[0].flip(2), last[1].flip(2)), tuple(t[:, :, :-1] for t in expected))
        expected = tuple(torch.cat([a, b[:, :, -1:]], 2) for a, b in zip(one, expected, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cell_name", "form"),
    [
        ("Qwen2", "gated_deltanet", {}),
        ("Qwen3", "mamba2", {"memory_positions": "none"}),
        ("Phi3", "deltanet", {"layers": [1]}),
        ("Llama", "gated_deltanet", {"store": "recency", "store_size": 8}),
    ],
    ids=str,
)
def test_what_is_compiled_is_compiled_once_for_all_lengths(monkeypatch, family, cell_name, form):
    """Texts of several lengths, pieces that are plain because they are short; all is undone."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="eager", fullgraph=True, **options))
    monkeypatch.setattr(compiling, "MANY", 5)
    monkeypatch.setattr(compiling, "of_any_length", functools.cache(compiling.of_any_length.__wrapped__))
    model = with_memory(tiny(family, num_hidden_layers=2), cell_name, window=16, sinks=4, **form)
    texts = {23: token_ids(150), 38: token_ids(133), 11: token_ids(98)}  # by chunk; no piece is as long as a head
    plain = [ahn.read(model, text, chunk=chunk) for chunk, text in texts.items()]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = [dict(vars(module)) for module in model.modules()]
    monkeypatch.setattr(dispatch, "pick_between_many", lambda device, tokens: dispatch.Kernel("inductor", "as on CUDA"))
    graphs = []
    for (chunk, text), expected in zip(texts.items(), plain, strict=True):
        cache = ahn.read(model, text, chunk=chunk)
        assert (cache.last_logits - expected.last_logits).abs().max() < 1e-4
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            assert all((ours.tensors[name] - t).abs().max() < 1e-4 for name, t in theirs.tensors.items())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 5 <= graphs[0] <= graphs[-1] <= 12, graphs
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_short_rest_is_not_compiled_for(monkeypatch):
    """It is attended otherwise, so that all would be compiled once more for it."""
    compiled, seen = [], []

    @contextlib.contextmanager
    def noted(decoder):
        compiled.append(seen[-1] if seen else 0)
        yield

    monkeypatch.setattr(dispatch, "pick_between_many", lambda device, tokens: dispatch.Kernel("inductor", "as on CUDA"))
    monkeypatch.setattr("ahn.engine.prefill.compiled_for_reading", noted)
    model = with_memory(tiny(), window=16, sinks=4)
    for planned, expected in ((4096, [0, 40]), (30, [0, 40, 80]), (0, [0, 40, 80])):
        monkeypatch.setattr(dispatch, "PLANNED", planned)
        seen.clear(), compiled.clear()
        ahn.read(model, token_ids(115), chunk=40, progress=lambda done, total: seen.append(done))
        assert compiled == expected
