"""`model.generate` as users know it, over a memory."""

import pytest
import torch

import ahn
from ahn.compat import OTHER_PAST, PAST
from ahn.engine import generate as generation
from ahn.engine import prefill
from ahn.errors import ConfigError, UnsupportedOperationError
from conftest import in_pieces, tiny, token_ids, with_memory

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    return with_memory(tiny())


def greedy(model, ids, tokens):
    """The oracle: one whole forward a token, no cache."""
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("prompt", [3, 19, 20, 21, 50])
def test_greedy(model, prompt):
    ids = token_ids(prompt)
    assert torch.equal(model.generate(ids, max_new_tokens=12, **GREEDY), greedy(model, ids, 12))


def test_without_cache(model):
    ids = token_ids(30)
    assert torch.equal(model.generate(ids, max_new_tokens=4, use_cache=False, **GREEDY), greedy(model, ids, 4))


def test_left_padded_batch(model):
    short, long = token_ids(18, seed=1), token_ids(40, seed=2)
    ids = torch.cat([torch.cat([torch.zeros(1, 22, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :22] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=10, **GREEDY)
    assert torch.equal(out[:1, 40:], greedy(model, short, 10)[:, 18:])
    assert torch.equal(out[1:, 40:], greedy(model, long, 10)[:, 40:])


def test_cache_carried_over_turns_with_all_ids_or_only_the_new(model):
    first, second = token_ids(30, seed=1), token_ids(7, seed=2)
    expected = greedy(model, first, 5)
    expected = greedy(model, torch.cat([expected, second], 1), 5)

    cache = ahn.AHNCache(model)
    turn = model.generate(first, **{PAST: cache}, max_new_tokens=5, **GREEDY)
    assert torch.equal(
        model.generate(torch.cat([turn, second], 1), **{PAST: cache}, max_new_tokens=5, **GREEDY), expected
    )

    cache = ahn.AHNCache(model)
    answer = ahn.generate(model, first, cache, max_new_tokens=5, **GREEDY)
    new = torch.cat([answer[:, -1:], second], 1)  # the last token was returned, not read
    assert torch.equal(ahn.generate(model, new, cache, max_new_tokens=5, **GREEDY), expected[:, -5:])


def test_after_reading(model):
    ids = token_ids(60)
    cache = ahn.read(model, ids[:, :40], chunk=7)
    assert torch.equal(
        ahn.generate(model, ids[:, 40:], cache, max_new_tokens=6, **GREEDY), greedy(model, ids, 6)[:, 60:]
    )


def test_stop_tokens(model):
    ids = token_ids(30)
    fourth = greedy(model, ids, 4)[0, -1].item()
    out = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=fourth, pad_token_id=0)
    assert out.shape[1] <= 34
    assert out[0, -1] == fourth


def test_streamer(model):
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer, ids = Streamer(), token_ids(30)
    out = model.generate(ids, streamer=streamer, max_new_tokens=6, **GREEDY)
    assert streamer.tokens == [*out[0].tolist(), "end"]


def test_sampling_and_return_sequences(model):
    ids = token_ids(30)
    torch.manual_seed(0)
    out = model.generate(
        ids, do_sample=True, num_return_sequences=3, max_new_tokens=20, eos_token_id=None, pad_token_id=0
    )
    assert out.shape == (3, 50)
    assert len({tuple(row.tolist()) for row in out}) == 3


def test_return_sequences_from_one_memory(model):
    ids = token_ids(60)
    cache = ahn.read(model, ids[:, :40])
    out = ahn.generate(
        model, ids[:, 40:], cache.fork(), max_new_tokens=5, num_return_sequences=2, num_beams=2, **GREEDY
    )
    beams = model.generate(ids, max_new_tokens=5, num_return_sequences=2, num_beams=2, **GREEDY)
    assert torch.equal(out, beams[:, 60:])


def test_beam_search_reorders_the_memory(model):
    """Against beam search that recomputes everything, which has no memory to reorder."""
    ids = token_ids(40, batch=2)
    beams = {"num_beams": 4, "max_new_tokens": 12, "num_return_sequences": 2, **GREEDY}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


def test_long_prompts_are_read_in_chunks(model, monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK", 16)
    lengths = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    ids = token_ids(50, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
    assert max(lengths) == 16
    assert torch.equal(out[1:], greedy(model, ids[1:], 4))
    assert torch.equal(out[:1, 50:], greedy(model, ids[:1, 9:], 4)[:, 41:])


def test_default_cache_comes_back_from_a_forward(model):
    ids = token_ids(40)
    with torch.no_grad():
        out = model(ids[:, :30], use_cache=True)
        assert isinstance(out[PAST], ahn.AHNCache)
        rest = model(ids[:, 30:], **{PAST: out[PAST]}).logits
    torch.testing.assert_close(rest, in_pieces(model, ids, [40])[:, 30:], atol=1e-4, rtol=0)


def test_read_gives_the_last_logits_and_progress(model):
    ids, seen = token_ids(50), []
    cache = ahn.read(model, ids[0].tolist(), chunk=20, progress=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(cache.last_logits, in_pieces(model, ids, [50])[:, -1], atol=1e-4, rtol=0)
    assert seen == [(20, 50), (40, 50), (50, 50)]
    assert cache.tokens_seen == 50


@pytest.mark.parametrize("ids", [[], torch.zeros(1, 0, dtype=torch.long), torch.zeros(3), torch.zeros(1, 2, 3).long()])
def test_nothing_to_read(model, ids):
    with pytest.raises(ConfigError, match="expected at least one token id"):
        ahn.read(model, ids)
    with pytest.raises(ConfigError, match="expected at least one token id"):
        ahn.generate(model, ids, ahn.read(model, token_ids(3)))


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True])
def test_bad_chunk(model, chunk):
    with pytest.raises(ConfigError, match="chunk="):
        ahn.read(model, [5, 6], chunk=chunk)


@pytest.mark.parametrize("name", [PAST, OTHER_PAST])
def test_a_cache_by_either_name(name):
    """transformers 5.24 renamed the argument; models with a memory take both, before and after."""
    model = with_memory(tiny())
    ids, cache = token_ids(50), ahn.AHNCache(model)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        model(ids[:, :30], **{name: cache})
        assert (model(ids[:, 30:], **{name: cache}).logits - whole[:, 30:]).abs().max() < 1e-4


def test_what_cannot_work_says_so(model):
    ids = token_ids(30)
    with pytest.raises(UnsupportedOperationError, match="StaticCache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3, **GREEDY)
    no_way_back = (UnsupportedOperationError, ValueError)  # from 5.24 on transformers asks, and says so itself
    with pytest.raises(no_way_back, match=r"unread|take|can be cropped"):
        model.generate(ids, assistant_model=tiny(seed=5), max_new_tokens=8, **GREEDY)
    with pytest.raises(no_way_back, match=r"unread|take|can be cropped"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=8, **GREEDY)
    with pytest.raises(UnsupportedOperationError, match="fork"):
        ahn.read(model, ids).crop(5)
    with pytest.raises(UnsupportedOperationError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 1, 30, 30))
    with pytest.raises(UnsupportedOperationError, match="packed"):
        model(ids, position_ids=torch.cat([torch.arange(15), torch.arange(15)])[None], use_cache=False)
    with pytest.raises(UnsupportedOperationError, match="output_attentions"):
        model(ids, output_attentions=True)


def test_a_grown_dynamic_cache_is_refused(model):
    from transformers import DynamicCache

    cache = DynamicCache()
    tiny()(token_ids(5), **{PAST: cache})
    with pytest.raises(UnsupportedOperationError, match="DynamicCache"):
        model(token_ids(5), **{PAST: cache})


def test_a_dynamic_cache_is_no_memory(model):
    """It is replaced by one that can forget, so what holds only it would begin anew with every call."""
    from transformers import DynamicCache

    cache = DynamicCache()
    assert model(token_ids(5), **{PAST: cache})[PAST].tokens_seen == 5
    with pytest.raises(UnsupportedOperationError, match=r"DynamicCache: expected an ahn\.AHNCache"):
        model(token_ids(5), **{PAST: cache})


def test_a_refused_call_leaves_the_cache_as_it_was():
    model = with_memory(tiny(), store="recency", store_size=8)
    cache, ids = ahn.AHNCache(model), token_ids(60, batch=2)
    with torch.no_grad():
        with pytest.raises(UnsupportedOperationError, match="output_attentions"):
            model(ids, output_attentions=True, **{PAST: cache})
        model(ids[:1, :10], **{PAST: cache})
        with pytest.raises(UnsupportedOperationError, match="output_attentions"):
            model(ids[:1, 10:20], output_attentions=True, **{PAST: cache})
        model(ids[:1, 10:20], **{PAST: cache})
    cache.trim_transcript()
    assert cache.transcript.rows[0][0].tolist() == list(range(20))


def test_batch_must_fit_the_cache(model):
    cache = ahn.read(model, token_ids(30, batch=2))
    with pytest.raises(ConfigError, match="batch of 3 on a cache of 2"):
        model(token_ids(1, batch=3), **{PAST: cache})


def test_a_forward_that_failed_leaves_the_cache_marked(model, monkeypatch):
    cache = ahn.read(model, token_ids(30))
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            model(token_ids(3), **{PAST: cache})
    with pytest.raises(ahn.errors.AHNError, match="half-written"), torch.no_grad():
        model(token_ids(3), **{PAST: cache})


def test_interrupt_finishes_the_chunk(model):
    import signal

    cache, ids = ahn.AHNCache(model), token_ids(60)
    with pytest.raises(KeyboardInterrupt):
        ahn.read(
            model,
            ids,
            cache,
            chunk=10,
            progress=lambda done, total: signal.raise_signal(signal.SIGINT) if done == 30 else None,
        )
    assert cache.tokens_seen == 30
    with torch.no_grad():
        rest = model(ids[:, 30:], **{PAST: cache}).logits
    torch.testing.assert_close(rest, in_pieces(model, ids, [60])[:, 30:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_reading_then_asking(model, side):
    """After a padded read the last logits are those of real tokens, and generation knows where each row is."""
    short, question = token_ids(25, seed=1), token_ids(4, seed=5)
    padding = torch.zeros(1, 15, dtype=torch.long)
    parts = (padding, short) if side == "left" else (short, padding)
    ids = torch.cat([torch.cat(parts, 1), token_ids(40, seed=2)])
    mask = torch.cat([torch.cat([torch.ones_like(p) * (p is short) for p in parts], 1), torch.ones(1, 40).long()])
    cache = ahn.read(model, ids, chunk=10, attention_mask=mask)
    alone = ahn.read(model, short)
    torch.testing.assert_close(cache.last_logits[:1], alone.last_logits, atol=1e-4, rtol=0)
    out = ahn.generate(model, question.repeat(2, 1), cache, max_new_tokens=8, **GREEDY)
    assert torch.equal(out[:1], ahn.generate(model, question, alone, max_new_tokens=8, **GREEDY))


def test_unknown_token_ids_leave_the_cache_usable(model):
    cache = ahn.read(model, token_ids(30))
    with pytest.raises(ConfigError, match="token id 1000: expected 0 to 127"):
        ahn.read(model, [1000], cache)
    with pytest.raises(ConfigError, match="token id 1000"), torch.no_grad():
        model(torch.tensor([[1000]]), **{PAST: cache})
    assert ahn.read(model, [5], cache).tokens_seen == 31


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "eos_token_id": None},
        {"do_sample": True, "eos_token_id": None, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.3, "eos_token_id": None},
        {"do_sample": True, "eos_token_id": list(range(0, 64, 7))},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_the_own_loop_is_that_of_transformers(model, monkeypatch, options, padded):
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard.append(value.tolist())

        def end(self):
            self.heard.append("end")

    ids = token_ids(47)
    before = ahn.read(model, ids[:, :40])
    if padded:  # rows that have seen texts of other lengths
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[0, :11] = 0
        before = ahn.read(model, token_ids(30, batch=2), attention_mask=mask)
        ids = token_ids(7, batch=2)
    options = options | {"max_new_tokens": 9, "pad_token_id": 0}
    found = []
    for plain in (generation.PLAIN, set()):
        monkeypatch.setattr(generation, "PLAIN", plain)
        calls = []
        loop = generation._NextTokens.__call__
        monkeypatch.setattr(
            generation._NextTokens,
            "__call__",
            lambda *a, calls=calls, loop=loop, **k: calls.append(1) or loop(*a, **k),
        )
        streamer = Streamer() if len(ids) == 1 else None
        torch.manual_seed(0)
        more = {} if streamer is None else {"streamer": streamer}
        cache = before.fork()
        out = ahn.generate(model, ids[:, -7:], cache, **options, **more)
        found.append((out, cache.tokens_seen, streamer and streamer.heard))
        assert bool(calls) == bool(plain)
    (mine, seen, heard), (theirs, also, said) = found
    assert torch.equal(mine, theirs) and seen == also and heard == said


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1] * 60, [60], [7, 30, 23], [0, 60, 0], [59, 1]])
@pytest.mark.parametrize("chunk", [None, 1, 7, 20, 100])
def test_an_iterator_of_pieces_is_read_like_the_whole(model, monkeypatch, sizes, chunk):
    monkeypatch.setattr(prefill, "CHUNK", 16)
    ids, lengths, seen = token_ids(60)[0], [], []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    whole = ahn.read(model, ids, chunk=chunk)
    expected, lengths[:] = list(lengths), []
    pieces = (piece.tolist() for piece in ids.split(sizes) if len(piece))
    cache = ahn.read(model, pieces, chunk=chunk, progress=lambda done, total: seen.append((done, total)))
    assert lengths == expected
    assert torch.equal(cache.last_logits, whole.last_logits) and cache.tokens_seen == 60
    assert [done for done, _ in seen] == torch.tensor(lengths).cumsum(0).tolist() and {total for _, total in seen} == {
        None
    }


def test_reading_begins_with_the_first_piece(model):
    cache, ids = ahn.AHNCache(model), token_ids(60)[0]

    def pieces():
        yield ids[:40]
        assert cache.tokens_seen == 30
        yield ids[40:]

    ahn.read(model, pieces(), cache, chunk=10)


def test_bad_pieces(model):
    for pieces in ([], [[]], [[5], [1000]], [["word"]]):
        with pytest.raises((ConfigError, ValueError)):
            ahn.read(model, iter(pieces))
    with pytest.raises(ConfigError, match="attention_mask"):
        ahn.read(model, iter([[5]]), attention_mask=torch.ones(1, 1))


def test_an_interrupt_between_pieces(model):
    import signal

    cache, ids = ahn.AHNCache(model), token_ids(60)[0]

    def pieces():
        yield ids[:20]
        signal.raise_signal(signal.SIGINT)
        yield ids[20:]

    with pytest.raises(KeyboardInterrupt):
        ahn.read(model, pieces(), cache, chunk=10)
    assert cache.tokens_seen in (10, 20)
    rest = ahn.read(model, ids[cache.tokens_seen :], cache)
    torch.testing.assert_close(rest.last_logits, ahn.read(model, ids).last_logits, atol=1e-4, rtol=0)
