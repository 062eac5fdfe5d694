"""Dense attention on pieces of the ring: the same logits as a whole sequence, however it is cut."""

import pytest
import torch

import ahn
from ahn import augmentation, reading
from ahn.cache import Span
from conftest import in_pieces, tiny, token_ids, with_memory

SPLITS = ([90], [7, 13, 1, 30, 8, 31], [20, 16, 16, 16, 16, 6], [3, 2, 40, 45], [50, 15, 2, 23])


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [1, 16, 200])
@pytest.mark.parametrize("form", [{}, {"memory_positions": "none"}, {"layers": [1]}], ids=str)
def test_any_split(monkeypatch, form, window, sinks):
    """Pieces that end at, before and behind the sinks and the ring's end; windows of one token, and never full."""
    calls = []
    read = reading.read
    monkeypatch.setattr(reading, "read", lambda *args: calls.append(1) or read(*args))
    model = with_memory(tiny(), window=window, sinks=sinks, **form)
    ids = token_ids(90, batch=2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in SPLITS:
        assert (in_pieces(model, ids, sizes) - whole).abs().max() < 1e-4, sizes
    assert calls


def test_where_spans_are_cut():
    def cut(start, length, sinks=4, window=10):
        span = Span(torch.tensor([start]), length, [length])
        return [(piece.first, piece.length) for piece in reading.pieces(span, sinks, window)]

    assert cut(0, 40) == [(0, 4), (4, 10), (14, 10), (24, 10), (34, 6)]
    assert cut(3, 5) == [(3, 1), (4, 4)]
    assert cut(20, 9) == [(20, 9)]
    assert cut(0, 40, window=None) == [(0, 40)]


def test_chunks_of_a_gpu(monkeypatch):
    """A window is a whole number of them, and they begin where it does."""
    model = with_memory(tiny(max_position_embeddings=40000), window=32640, sinks=128)
    assert augmentation.chunks(model, 1, 0) == (512, 512)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    assert augmentation.chunks(model, 1, 0) == (8160 + 128, 8160)
    assert augmentation.chunks(model, 1, 8288) == (8160, 8160)
    first, chunk = augmentation.chunks(model, 1, 50000)
    assert (50000 + first - 128) % chunk == 0 and chunk <= first < 2 * chunk
    assert augmentation.chunks(model, 32, 0)[1] == 510


def test_a_first_chunk_of_another_size(monkeypatch):
    model = with_memory(tiny(), window=16, sinks=4)
    ids = token_ids(90)
    done = []
    monkeypatch.setattr("ahn.generation.chunks", lambda *args: (20, 16))
    cache = ahn.read(model, ids, progress=lambda low, total: done.append((low, total)))
    assert done == [(20, 90), (36, 90), (52, 90), (68, 90), (84, 90), (90, 90)]
    with torch.no_grad():
        assert (cache.last_logits - model(ids, use_cache=False).logits[:, -1]).abs().max() < 1e-4
