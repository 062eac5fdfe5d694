"""The exact store: one answer however the text is cut, every token in one place, and what is kept is read exactly."""

import contextlib
import heapq
import json
import re
import shutil

import pytest
import torch

import ahn
from ahn import stores
from ahn.adapter_files import read_adapter
from ahn.compat import PAST
from ahn.errors import AdapterError, ConfigError, MemoryFileError
from ahn.memory import transcript
from ahn.memory.file_contents import retained
from ahn.memory.handle import layers_of
from ahn.ops import eviction
from ahn.ops.ranks import TOKEN, empty_ranks, position_of
from ahn.ops.specs import Window
from ahn.stores.base import Store
from conftest import FORMS, STORES, in_pieces, soft_inputs, storing, tiny, token_ids, with_memory

SPLITS = ([60], [7, 13, 1, 1, 30, 8], [1] * 60, [20, 1, 19, 20], [59, 1], [33, 27])

pytestmark = pytest.mark.usefixtures("small_grids")


class Marked(Store):
    """Keeps the tokens at positions that a test names, in every head but the last; that one keeps the oldest."""

    name = "marked"
    positions: tuple[int, ...] = ()

    def score(self, x_BTD, positions_RT, error):
        wanted = torch.isin(positions_RT, torch.tensor(self.positions))[:, None].float()
        wanted = wanted.repeat(1, self.kv_heads, 1)
        wanted[:, -1] = -positions_RT.float()
        return wanted


stores.register("marked", Marked)


def largest(a, b):
    return (a - b).abs().max().item()


def test_the_registry_has_the_stores_that_are_tested():
    shipped = {name for name in stores.names() if stores.get(name).__module__.startswith("ahn.")}
    assert shipped == set(STORES)


# Who loses, against a heap.
def heaps(ranks, new):
    """Losers and what stays, row by row and head by head."""
    lost, stay = torch.empty_like(new), torch.empty_like(ranks)
    for b in range(ranks.shape[0]):
        for m in range(ranks.shape[1]):
            heap = ranks[b, m].tolist()
            heapq.heapify(heap)
            lost[b, m] = torch.tensor([heapq.heappushpop(heap, rank) for rank in new[b, m].tolist()])
            stay[b, m] = torch.tensor(sorted(heap))
    return lost, stay


@pytest.mark.parametrize("slots", [1, 3, 8, 100])
@pytest.mark.parametrize("steps", [1, 5, 64, 65, 200])
def test_eviction_is_a_heap(slots, steps):
    generator = torch.Generator().manual_seed(slots * steps)

    def some(first, count):  # many ties, and steps without a newcomer
        priority = torch.randint(-4, 5, (2, 3, count), generator=generator).float()
        real = torch.rand(2, count, generator=generator) < 0.9
        return eviction.rank(priority, first + torch.arange(count)[None], real)

    before = eviction.evict(empty_ranks(2, 3, slots, torch.device("cpu")), some(0, 50)).ranks
    new = some(50, steps)
    outcome = eviction.evict(before, new)
    lost, stay = heaps(before, new)
    assert torch.equal(outcome.evicted_ranks, lost)
    assert torch.equal(outcome.ranks.sort(-1).values, stay)
    candidates = torch.cat([before, new], -1)
    assert torch.equal(candidates.gather(-1, outcome.evicted), outcome.evicted_ranks)
    assert torch.equal(candidates.gather(-1, outcome.kept), outcome.ranks)


def test_ranks_sort_by_priority_then_age():
    priority = torch.tensor([-torch.inf, -3.0, -3.0, -0.0, 0.0, 1e-30, 2.0, torch.inf])
    ranks = eviction.rank(priority[None, None], torch.arange(8)[None] + 5, torch.ones(1, 8, dtype=torch.bool))
    assert (ranks.diff() > 0).all() and (ranks >= TOKEN).all()
    assert torch.equal(position_of(ranks), torch.arange(8)[None, None] + 5)
    younger = eviction.rank(torch.ones(1, 1, 2), torch.tensor([[7, 6]]), torch.ones(1, 2, dtype=torch.bool))
    assert younger[0, 0, 0] > younger[0, 0, 1]


# One answer.
@pytest.mark.slow
@pytest.mark.parametrize("positions", ["clipped", "absolute"])
@pytest.mark.parametrize(("cell", "sinks", "span"), [("gated_deltanet", 4, 1), ("mamba2", 0, 5), (None, 4, 5)])
def test_any_split_gives_the_same_logits(store, cell, positions, sinks, span):
    if store == "surprise" and cell is None:
        pytest.skip("needs a cell")
    model = storing(store, cell, sink_positions=positions, sinks=sinks, store_span=span)
    ids = token_ids(60, batch=2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in SPLITS[:4]:
        assert largest(in_pieces(model, ids, sizes), whole) < 1e-4, sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "positions"), [("no positions", "absolute"), ("maps", "clipped"), ("wide", "clipped")]
)
def test_any_split_of_every_form(store, form, positions):
    model = storing(store, "deltanet", sink_positions=positions, store_span=2, **FORMS[form])
    ids = token_ids(60, batch=2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in SPLITS[1:3]:
        assert largest(in_pieces(model, ids, sizes), whole) < 1e-4, sizes


def test_padding_and_turns(store):
    """Rows of one batch lose different tokens at different steps."""
    model = storing(store, window=8, sinks=2, store_span=3)
    ids, other = token_ids(50), token_ids(31, seed=5)
    both = torch.cat([ids, torch.cat([torch.zeros(1, 19, dtype=torch.long), other], 1)])
    mask = torch.ones_like(both)
    mask[1, :19] = 0
    with torch.no_grad():
        expected = [model(row, use_cache=False).logits for row in (ids, other)]
        without_cache = model(both, attention_mask=mask, use_cache=False).logits
    for out in (without_cache, *(in_pieces(model, both, s, mask) for s in ([50], [21, 1, 18, 1, 9], [1] * 50))):
        assert largest(out[:1], expected[0]) < 1e-4
        assert largest(out[1:, 19:], expected[1]) < 1e-4


def test_windows_narrower_than_the_distance_of_observed_queries():
    """An observed query that would be behind the end of a piece sees nothing, and gives nothing to any score."""
    model, ids = storing("attention", sinks=0, window=4), token_ids(60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in ([1, 9, 50], [1] * 3 + [9, 48]):  # the last one is 6 tokens behind the end of the piece of 9
        assert largest(in_pieces(model, ids, sizes), whole) < 1e-4, sizes


def test_sinks_and_store_that_come_later(store):
    """`set_window` on a model without sinks: it has the rotation for clipped ones, and every size is taken anew."""
    from ahn.hf.augment import set_window

    model, ids = storing(store, sinks=0, store_size=5), token_ids(60, batch=2)
    set_window(model, 16, 4, 8)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        assert largest(whole, storing(store)(ids, use_cache=False).logits) < 1e-5
    assert largest(in_pieces(model, ids, SPLITS[1]), whole) < 1e-4


@pytest.mark.parametrize("size", [1, 200])
def test_sizes_of_stores(store, size):
    model, ids = storing(store, store_size=size), token_ids(60, batch=2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, SPLITS[1]), whole) < 1e-4


@pytest.mark.parametrize("family", ["Qwen3", "Phi3", "Glm", "Cohere"])
def test_other_families(family):
    base = tiny(family, head_dim=8) if family == "Glm" else tiny(family)
    model, ids = storing("attention", base=base), token_ids(60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [11, 1, 30, 1, 17]), whole) < 1e-4


def test_layers_with_and_without(store):
    model, ids = storing(store, base=tiny(num_hidden_layers=3), layers=(1,)), token_ids(60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [11, 1, 30, 1, 17]), whole) < 1e-4
    assert [layer.store is None for layer in layers_of(model)] == [True, False, True]


def test_long_texts_cross_blocks(store):
    model, ids = storing(store, window=40, store_size=50), token_ids(300)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in ([300], [137, 1, 162], [100, 100, 100]):
        assert largest(in_pieces(model, ids, sizes), whole) < 1e-4


def test_lossless_positions_are_the_base_models(store):
    """Up to sinks + window; the store is seen at one distance, so while it fills up it may differ."""
    base, ids = tiny(), token_ids(60)
    with torch.no_grad():
        expected = base(ids).logits
        out = storing(store, base=base)(ids).logits
    assert largest(out[:, :20], expected[:, :20]) < 1e-5
    assert largest(out[:, 28:], expected[:, 28:]) > 1e-2


def test_absolute_recency_is_a_longer_window():
    ids = token_ids(60)
    longer = with_memory(tiny(), window=24, sinks=4, sink_positions="absolute")
    stored = storing("recency", sink_positions="absolute")
    for sizes in SPLITS[:3]:
        assert largest(in_pieces(stored, ids, sizes), in_pieces(longer, ids, sizes)) < 1e-4


def test_a_large_absolute_store_is_the_base():
    ids = token_ids(60)
    with torch.no_grad():
        expected = tiny()(ids).logits
    for cell in ("deltanet", None):
        model = storing("random", cell, sink_positions="absolute", store_size=60)
        assert largest(in_pieces(model, ids, [31, 1, 28]), expected) < 1e-4


# Every token in exactly one place.
def written(model, ids, sizes, monkeypatch):
    """Of the first layer: positions by head that the cell was given, and those in the store, after reading `ids`."""
    (layer, *_) = layers_of(model)
    seen = {id(layer): []}
    turn_out = layer.positions.from_store

    def spy(k, ranks):
        seen[id(layer)].append(ranks)
        return turn_out(k, ranks)

    monkeypatch.setattr(layer.positions, "from_store", spy)
    cache, low = ahn.AHNCache(model), 0
    with torch.no_grad():
        for size in sizes:
            model(ids[:, low : low + size], **{PAST: cache})
            low += size
    lost = torch.cat(seen[id(layer)], -1)
    return lost, cache.layers[0].ranks


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [25, 1, 34]], ids=str)
def test_every_token_is_in_one_place(store, sizes, monkeypatch):
    model = storing(store, store_span=3)
    lost, kept = written(model, token_ids(60, batch=2), sizes, monkeypatch)
    for row in range(2):
        for head in range(2):
            ranks = lost[row, head]
            gone = position_of(ranks[ranks >= TOKEN]).tolist()
            stored = position_of(kept[row, head]).tolist()
            assert sorted(gone + stored) == list(range(4, 60 - 16))  # the rest are sinks and window
            assert len(stored) == 8


def test_the_cell_is_given_the_tokens_themselves(monkeypatch):
    """Keys of evicted tokens as the attention computed them, values and gate inputs of the same tokens."""
    for form, positions in (("rope", "clipped"), ("none", "clipped"), ("rope", "absolute"), ("none", "absolute")):
        model = storing(
            "random", "deltanet", tiny(num_hidden_layers=1), memory_positions=form, sink_positions=positions
        )
        (layer,) = layers_of(model)
        given = {}
        prepare = layer.last.forms.prepare

        def spy(q, k, v, inputs, leaving, fla, given=given, prepare=prepare):
            given.setdefault("all", []).append((k, v, inputs))
            return prepare(q, k, v, inputs, leaving, fla)

        monkeypatch.setattr(layer.last.forms, "prepare", spy)
        ids = token_ids(60)
        lost, _ = written(model, ids, [37, 1, 22], monkeypatch)
        k, v, inputs = (torch.cat(parts, 1 if parts[0].dim() == 3 else 2) for parts in zip(*given["all"], strict=True))
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
            keys, values = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
            if form == "rope":
                cos, sin = model.model.rotary_emb(x, torch.arange(60)[None])
                from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

                keys = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
        own = layer.cell.gate_inputs(x)
        where = position_of(lost)
        assert lost.shape[-1] == 60 - 28 and (lost >= TOKEN).all()
        for head in range(2):
            at = where[0, head]
            assert largest(k[0, head], keys[0, head, at]) < 1e-4
            assert largest(v[0, head], values[0, head, at]) < 1e-5
            assert largest(inputs[0, :, 2 * head : 2 * head + 2], own[0, at, 2 * head : 2 * head + 2]) < 1e-5


@pytest.mark.parametrize("positions", ["clipped", "absolute"])
def test_a_stored_token_is_read_exactly(positions, monkeypatch):
    """One layer: the last logits are the base's over the tokens that are kept, at the places they are seen at."""
    sinks, window, tokens, marked = 4, 8, 40, (11, 12, 20)
    monkeypatch.setattr(Marked, "positions", marked)
    base = tiny(num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=1, hidden_size=16)
    monkeypatch.setattr(
        Marked, "score", lambda self, x, at, error: torch.isin(at, torch.tensor(marked))[:, None].float()
    )
    ids = token_ids(tokens)
    kept = [*range(sinks), *marked, *range(tokens - window, tokens)]
    clipped = [*range(sinks), *[sinks] * 3, *range(sinks + 1, sinks + window + 1)]
    places = clipped if positions == "clipped" else kept
    with torch.no_grad():
        expected = base(ids[:, kept], position_ids=torch.tensor([places])).logits[:, -1]
        model = with_memory(base, None, window, sinks, sink_positions=positions, store="marked", store_size=len(marked))
        for sizes in ([tokens], [1] * tokens, [13, 27]):
            assert largest(in_pieces(model, ids, sizes)[:, -1], expected) < 1e-5
        assert largest(model(ids, use_cache=False).logits[:, -1], expected) < 1e-5


def test_heads_keep_tokens_of_their_own(monkeypatch):
    monkeypatch.setattr(Marked, "positions", (30, 31))
    cache = ahn.read(storing("marked", store_size=2), token_ids(60))
    stored = position_of(cache.layers[0].ranks).sort(-1).values
    assert stored.tolist() == [[[30, 31], [4, 5]]]


def test_spans_keep_neighbours(monkeypatch):
    """Spans begin behind the sinks; a marked token keeps all of its span."""
    monkeypatch.setattr(Marked, "positions", (17,))
    model = storing("marked", store_size=4, store_span=4)
    for sizes in ([60], [1] * 60, [19, 1, 40]):
        cache, low = ahn.AHNCache(model), 0
        with torch.no_grad():
            for size in sizes:
                model(token_ids(60)[:, low : low + size], **{PAST: cache})
                low += size
        assert sorted(position_of(cache.layers[0].ranks)[0, 0].tolist()) == [16, 17, 18, 19]


# What the shipped stores keep.
def kept_by(store, tokens=200, **changes):
    model = storing(store, "deltanet", **changes)
    cache = ahn.read(model, token_ids(tokens))
    return [position_of(layer.ranks) for layer in cache.layers]


def test_recency_keeps_the_last():
    assert all((kept >= 200 - 16 - 8).all() for kept in kept_by("recency"))


def test_random_is_uniform_and_differs_by_head_and_layer():
    kept = torch.stack(kept_by("random", 500, store_size=200))
    assert 200 < kept.float().mean() < 280
    sets = {tuple(heads.sort().values.tolist()) for heads in kept.flatten(0, 2)}
    assert len(sets) == 4


def test_attention_keeps_what_was_attended_to():
    """Against plain sums of the attention of observed queries, head by head."""
    model = storing("attention", None, tiny(num_hidden_layers=1), sink_positions="absolute")
    ids, layer = token_ids(60), layers_of(model)[0]
    attention = model.model.layers[0].self_attn
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        q, k = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, torch.arange(60)[None]))
        at = torch.arange(60)
        seen = (at <= at[:, None]) & ((at > at[:, None] - 16) | (at < 4))
        weights = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        mass = weights[:, :, :: layer.store.every].unflatten(1, (2, 2)).mean(2).sum(2)[0]
        cache = ahn.read(model, ids)
    for head in range(2):
        left = mass[head, 4 : 60 - 16]
        best = (left.topk(8).indices + 4).sort().values
        assert position_of(cache.layers[0].ranks)[0, head].sort().values.tolist() == best.tolist()


def test_surprise_keeps_what_the_state_does_not_return():
    """The score is beta ||v - S^T k|| with the cell's own key and the state at the last multiple of the grid."""
    model = storing("surprise", "deltanet", tiny(num_hidden_layers=1))
    layer = layers_of(model)[0]
    given = []
    error = layer.cell.error
    layer.cell.error = lambda k, v, gates, state: (
        given.append((k, v, gates, state.clone())) or error(k, v, gates, state)
    )
    cache = ahn.read(model, token_ids(60))
    assert len(given) == 4  # pieces of 16
    k, v, gates, state = given[3]
    unit = k / k.norm(dim=-1, keepdim=True)
    missing = v - torch.einsum("bntk,bnkv->bntv", unit, state)
    torch.testing.assert_close(error(k, v, gates, state), gates[0] * missing.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert state.abs().max() > 0 and torch.equal(cache.layers[0].snapshot, given[3][3])


def test_learned_keeps_the_highest_scores():
    model = storing("learned", "deltanet", tiny(num_hidden_layers=1))
    ids, layer = token_ids(60), layers_of(model)[0]
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        scores = layer.store.score(x, torch.arange(60)[None], None)[0, :, 4 : 60 - 16]
    kept = position_of(ahn.read(model, ids).layers[0].ranks)[0]
    # tokens that come twice have the same score but for their age
    assert kept.sort(-1).values.tolist() == (scores.topk(8).indices + 4).sort(-1).values.tolist()


# A cache is a cache.
def test_cache_operations(store, tmp_path):
    model, ids = storing(store, store_span=2), token_ids(60, batch=2)
    new = token_ids(20, batch=2, seed=8)
    cache = ahn.read(model, ids)
    fork = cache.fork()
    cache.save(tmp_path / "two.ahn")
    loaded = ahn.AHNCache.load(tmp_path / "two.ahn", model)
    swapped = cache.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        out = model(new, **{PAST: cache}).logits
        assert torch.equal(model(new, **{PAST: fork}).logits, out)
        assert torch.equal(model(new, **{PAST: loaded}).logits, out)
        assert largest(model(new.flip(0), **{PAST: swapped}).logits.flip(0), out) < 1e-4
    assert largest(out, in_pieces(model, torch.cat([ids, new], 1), [80])[:, 60:]) < 1e-4
    assert loaded.nbytes == cache.nbytes
    cache.reset()
    assert cache.nbytes == 0


def test_constant_memory(store):
    model = storing(store)
    sizes = {ahn.read(model, token_ids(count)).nbytes for count in (100, 200, 400)}
    assert len(sizes) == 1


@pytest.mark.slow
def test_generate(store):
    model = storing(store)
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
    ids = token_ids(40)
    out = model.generate(ids, **options)
    one = ids
    with torch.no_grad():
        for _ in range(30):
            one = torch.cat([one, model(one, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, one)
    beams = model.generate(ids, num_beams=3, **options)
    assert beams.shape == out.shape


def test_half_precision(store):
    model = storing(store, base=tiny().to(torch.bfloat16))
    logits = in_pieces(model, token_ids(60), [30, 1, 29])
    assert logits.isfinite().all()


def test_gradients_reach_the_cells_through_the_losers(store):
    model, ids = storing(store, "deltanet"), token_ids(60, batch=2)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for layer in layers_of(model):
        for name, parameter in layer.cell.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert all(parameter.grad is None for parameter in layer.store.parameters())


# Settings.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "recency"}, "store_size=0: expected at least 1"),
        ({"store_size": 5}, "store_size=5 without a store"),
        ({"store_span": 5}, "store_span=5 without a store"),
        ({"store": "recent", "store_size": 5}, "did you mean 'recency'"),
        ({"store": "recency", "store_size": -1}, "store_size=-1: expected an integer of at least 0"),
        ({"store": "recency", "store_size": 4, "store_span": 17}, "store_span=17: expected at most the window of 16"),
        ({"store": "recency", "store_size": 4, "store_span": 5}, "store_span=5: expected at most store_size=4"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        ahn.AHNConfig("deltanet", 16, 4, **changes)


def test_the_store_counts_as_lossless():
    config = ahn.AHNConfig("deltanet", 16, 4, store="recency", store_size=8)
    assert config.lossless == 28 and ahn.AHNConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"sinks \+ store \+ window = 4 \+ 600 \+ 16 = 620 tokens"):
        ahn.augment(tiny(), config.replace(store_size=600))


def test_old_settings_have_no_store():
    old = ahn.AHNConfig("deltanet", 16, 4).to_dict()
    for name in ("store", "store_size", "store_span"):
        del old[name]
    assert ahn.AHNConfig.from_dict(old) == ahn.AHNConfig("deltanet", 16, 4)


def test_surprise_needs_a_cell():
    with pytest.raises(ConfigError, match="expected a cell"):
        ahn.augment(tiny(), ahn.AHNConfig(None, 16, 4, store="surprise", store_size=8))


def test_adapters_carry_their_store(tmp_path):
    model = storing("learned", "deltanet")
    ids = token_ids(60)
    expected = in_pieces(model, ids, [60])
    ahn.save_adapter(model, tmp_path / "gates")
    loaded = ahn.load_adapter(tiny(), tmp_path / "gates")
    assert loaded.ahn_config == model.ahn_config
    assert torch.equal(in_pieces(loaded, ids, [60]), expected)
    # its cells serve any store, or none
    for changes in ({"store": "recency"}, {"store": None, "store_size": 0}):
        other = ahn.augment(tiny(), model.ahn_config.replace(**changes))
        ahn.load_adapter(other, tmp_path / "gates")
        assert torch.equal(layers_of(other)[1].cell.o_proj.weight, layers_of(model)[1].cell.o_proj.weight)
    ahn.save_adapter(storing("recency", "deltanet"), tmp_path / "cells")
    with pytest.raises(AdapterError, match="no weights for store='learned'"):
        ahn.load_adapter(ahn.augment(tiny(), model.ahn_config), tmp_path / "cells")


def test_memory_files_are_of_one_store(tmp_path):
    model = storing("recency")
    ahn.read(model, token_ids(60)).save(tmp_path / "a.ahn")
    with pytest.raises(MemoryFileError, match="store='recency'"):
        ahn.AHNCache.load(tmp_path / "a.ahn", storing("random"))


# What people see of it.
def test_transcripts_know_what_is_kept(monkeypatch):
    """Ids of stored tokens and their neighbours, of constant size, through padding and copies of rows."""
    monkeypatch.setattr("ahn.memory.transcript.PENDING", 32)
    model, ids = storing("random", window=8, sinks=2, store_size=4), token_ids(300, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 20:31] = 0
    sizes = []
    for tokens in (150, 300):
        cache = ahn.read(model, ids[:, :tokens], chunk=16, attention_mask=mask[:, :tokens])
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.trim_transcript()
        sizes.append(max(row.shape[1] for row in cache.transcript.rows))
        texts = [ids[1, :tokens], torch.cat([ids[0, :20], ids[0, 31:tokens]])]
        for row, (at, known) in enumerate(cache.transcript.rows):
            assert torch.equal(known, texts[row][at])
            for layer in cache.layers:
                stored = layer.stored[row]
                assert torch.isin(stored[stored >= 0], at).all()
    assert max(sizes) <= 2 + 8 + 2 * 2 * 4 * 13


def test_transcripts_of_texts_without_ids(tmp_path):
    """Embeddings can be stored, but there are no words to show of them."""
    model, ids = storing("random", window=8, sinks=2, store_size=4), token_ids(60)
    cache = ahn.read(model, ids)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), **{PAST: cache})
    cache.save(tmp_path / "a.ahn")
    assert cache.transcript.rows[0][0].max() < 60
    alone = ahn.AHNCache(model)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), **{PAST: alone})
    alone.save(tmp_path / "b.ahn")
    with pytest.raises(MemoryFileError, match="no words are known"):
        retained(tmp_path / "b.ahn", model.config)


def test_transcripts_are_of_what_was_read():
    """Not of what the caller's tensor holds later; and tokens that follow each other are one run."""
    model, ids = storing("random", window=8, sinks=2, store_size=4), token_ids(60, batch=2)
    cache, step = ahn.read(model, ids[:, :30]), torch.empty(2, 1, dtype=torch.int64)
    with torch.no_grad():
        for token in ids[:, 30:].split(1, 1):
            model(step.copy_(token), **{PAST: cache})
    twin = cache.fork()
    assert len(cache.transcript.pending) == 1 and cache.transcript.waiting == 30 + 30 * transcript.LEAST
    with torch.no_grad():
        model(step.zero_(), **{PAST: twin})
    for known, length in ((cache, 60), (twin, 61)):
        known.trim_transcript()
        for row, (at, words) in zip(ids, known.transcript.rows, strict=True):
            assert at[-1] == length - 1
            assert torch.equal(words[at < 60], row[at[at < 60]])


@pytest.mark.parametrize("seed", range(20))
def test_what_is_beside(seed):
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(200, generator=generator)[: 10 * seed].sort().values
    positions = torch.randint(-1, 250, (seed,), generator=generator)
    near = (at[:, None] - positions).abs() <= transcript.BESIDE
    assert torch.equal(transcript._beside(at, positions), (near & (positions >= 0)).any(1))


def test_inspect_shows_the_stored_words(tmp_path, monkeypatch, capsys):
    from ahn import cli
    from tiny_base import write_base

    monkeypatch.setattr(Marked, "positions", (60, 61))
    base, _ = write_base(tmp_path)
    (tmp_path / "book.txt").write_text("The old cat sat on the mat and looked at 12 mice.\n" * 30)
    file, page = str(tmp_path / "book.ahn"), tmp_path / "book.html"
    options = ["--base", base, "--adapter", "none", "--window", "24", "--sinks", "8"]
    read = ["read", str(tmp_path / "book.txt"), "-o", file, *options]
    assert cli.main([*read, "--store", "marked", "--store-size", "4"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", file]) == 0
    shown = capsys.readouterr().out
    assert "4 store (marked, spans of 1)" in shown and "\n\n\n" not in shown
    words = shown[shown.index("\nheads ") :]
    lines = words.splitlines()[2:]
    heads = [int(line.split()[0]) for line in lines]
    assert heads == sorted(heads, reverse=True) and heads[0] == 2 and all("⟦" in line for line in lines)
    assert re.fullmatch(r" +2 +60   \S.*⟦.+⟧.*", next(line for line in lines if line[:15].split()[1:] == ["60"]))
    assert cli.main(["inspect", file, "--show", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert cli.main(["inspect", file, "--html", str(page), "--layer", "1"]) == 0
    html = page.read_text()
    assert "token 60: 1 of 2 heads" in html and "heads of layer 1" in html
    assert re.search(r'kept by <b style="--k:0.50">1</b> <b style="--k:1.00">2</b> of 2 heads', html)
    assert "<span>layer 1</span></div><svg" in html and "<span>token 0</span>" in html
    capsys.readouterr()
    assert cli.main(["inspect", file, "--html", "-", "--layer", "1"]) == 0
    assert capsys.readouterr().out.strip() == html.strip()
    assert cli.main(["inspect", file, "--html", str(tmp_path / "none" / "a.html")]) == 2
    assert "error: --html" in capsys.readouterr().err
    assert cli.main(["inspect", file, "--layer", "7"]) == 2
    assert cli.main([*read, "--force"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", file, "--show", "1"]) == 2
    assert "read without a store" in capsys.readouterr().err


def test_passages_are_lines_that_end_nowhere_inside():
    from ahn.cli import _pages

    texts = ["Hi", ".\n\n", '"', " the", " key", None, " a", "\n"]
    heads = [0, 1, 1, 0, 3, 0, 4, 0]
    shown = [_pages.Piece(text, count, at) for at, (text, count) in enumerate(zip(texts, heads, strict=True))]
    lines = [_pages.terminal(passage, 4).plain for passage in _pages.passages(shown)]
    assert lines == ["    4         6    ⟦a⟧↵", '    3         4   Hi⟦.↵"⟧ the ⟦key⟧']


def test_inspect_refuses_what_ask_refuses(tmp_path, capsys):
    """A damaged file, and a base with another tokenizer."""
    from ahn import cli
    from tiny_base import write_base

    base, _ = write_base(tmp_path)
    (tmp_path / "a.txt").write_text("The old cat sat on the mat and looked at 12 mice.\n" * 30)
    file, other = tmp_path / "a.ahn", tmp_path / "other"
    options = ["--base", base, "--window", "24", "--sinks", "8", "--store", "recency", "--store-size", "4"]
    assert cli.main(["read", str(tmp_path / "a.txt"), "-o", str(file), *options]) == 0
    shutil.copytree(base, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] + 1}))
    capsys.readouterr()
    assert cli.main(["inspect", str(file), "--base", str(other)]) == 2
    assert re.search(r"memory of another model .* words in the vocabulary, not", capsys.readouterr().err)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for command in (["inspect"], ["ask", "Who?", "--memory"]):
        assert cli.main([*command, str(file)]) == 2
        assert "damaged memory file: its checksum does not match" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_say_what_is_kept(tmp_path, capsys):
    from ahn import cli
    from tiny_base import write_base

    base, adapter = write_base(tmp_path, store="recency", store_size=8, store_span=2)
    (tmp_path / "a.txt").write_text("The old cat. " * 40)
    file = str(tmp_path / "a.ahn")
    read = ["read", str(tmp_path / "a.txt"), "-o", file, "--base", base, "--force"]
    random = ["--store", "random", "--store-size", "4", "--window", "24", "--sinks", "8"]
    for options, said in (
        (
            ["--adapter", adapter, "--exact", "0"],
            "; exact: the first 8 tokens, 8 chosen ones (recency in spans of 2), the last 24\n",
        ),
        (
            ["--adapter", adapter, "--lossless", "36", "--sinks", "4"],
            "4 tokens, 8 chosen ones (recency in spans of 2), the last 24\n",
        ),
        (["--adapter", adapter, "--lossless", "80"], "8 tokens, 18 chosen ones (recency in spans of 2), the last 54\n"),
        (
            ["--adapter", "none", *random],
            "the window with sinks and a store only; exact: the first 8 tokens, 4 chosen ones (random), the last 24\n",
        ),
    ):
        assert cli.main([*read, *options]) == 0
        assert said in capsys.readouterr().err
    for options, code in ((["--lossless", "36"], 0), (["--lossless", "40"], 2)):
        assert cli.main(["ask", "Who?", "--memory", file, *options]) == code
    assert "--lossless 40: " in capsys.readouterr().err
    for options, said in (
        (["--lossless", "80", "--window", "8"], "not allowed with"),
        (["--lossless", "8", "--sinks", "8"], "8 lossless tokens with 8 sinks"),
        (["--adapter", adapter, "--lossless", "5"], "--lossless 5: room for 1 in the store, which judges spans of 2: "),
        (
            ["--adapter", adapter, "--lossless", "80", "--store-span", "19"],
            "80: room for 18 in the store, which judges",
        ),
    ):
        with contextlib.suppress(SystemExit):
            assert cli.main([*read, *options]) == 2
        assert said in capsys.readouterr().err


def test_commands_name_what_is_wrong_with_a_store(tmp_path, capsys):
    from ahn import cli
    from tiny_base import write_base

    base, _ = write_base(tmp_path)
    (tmp_path / "a.txt").write_text("The old cat. " * 40)
    read = ["read", str(tmp_path / "a.txt"), "-o", str(tmp_path / "a.ahn"), "--base", base, "--window", "24"]
    for options, said in (
        (["--store", "recent", "--store-size", "4"], "did you mean 'recency'"),
        (["--store", "recency"], "--store recency: expected --store-size as well"),
        (["--store-size", "4"], "--store-size 4: expected the name of a --store as well\n"),
        (["--store", "none", "--store-span", "4"], "--store-span 4: goes with a store, and --store none takes it away"),
        (
            ["--store", "random", "--store-size", "4", "--store-span", "5"],
            "--store-span 5: expected at most the --store-",
        ),
        (
            ["--store", "learned", "--store-size", "4", "--adapter", "smollm2-135m-mamba2"],
            " smollm2-135m-mamba2 has none",
        ),
    ):
        assert cli.main([*read, *options]) == 2
        assert said in capsys.readouterr().err
    qwen = [
        "read",
        str(tmp_path / "a.txt"),
        "-o",
        "a.ahn",
        "--base",
        "none/Qwen2.5-Coder-0.5B.gguf",
        "--store-size",
        "4",
    ]
    assert cli.main(qwen) == 2
    assert "or an --adapter that has one (qwen2.5-coder-0.5b-deltanet, qwen2.5-" in capsys.readouterr().err
    assert cli.main(["eval", "--base", base, "--tasks", "ruler", "--store", "recency"]) == 2
    assert "expected --store-size as well" in capsys.readouterr().err
    assert cli.main(["cost", "--base", "qwen2.5-3b", "--store", "random", "--store-size", "1000"]) == 0
    assert "+ 1,000 store +" in capsys.readouterr().out


# Gates.
def test_soft_places_become_those_of_the_store():
    """Nearly without warmth, a block's first query sees sinks, window and the 10 best of what is behind the window."""
    from ahn.train import gates

    q, k, v, scores, least = soft_inputs()
    out = gates.attend(q, k, v, gates.log_weights(scores, least, 1e-5), Window(size=16, sinks=4), 0.5)
    for t in (0, 18, 24, 60, 90):
        for head in range(4):
            behind = range(4, max(4, t - 16 + 1))
            best = sorted(behind, key=lambda j, h=head // 2: -scores[1, h, j])[:10]
            seen = sorted({*range(min(4, t + 1)), *best, *range(max(0, t - 15), t + 1)})
            weights = (k[1, head // 2, seen] @ q[1, head, t] * 0.5).softmax(0)
            torch.testing.assert_close(out[1, t, head], weights @ v[1, head // 2, seen], atol=1e-4, rtol=1e-4)


def test_soft_places_with_much_warmth_are_full_attention_less_a_constant():
    from ahn.train import gates

    q, k, v, scores, _ = soft_inputs()
    free = torch.full((2, 2, 16), gates.ALWAYS)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    out = gates.attend(q, k, v, gates.log_weights(scores, free, 1.0), Window(size=16, sinks=4), 0.5)
    torch.testing.assert_close(out, full.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_the_weights_of_soft_places_add_up_to_them():
    from ahn.train import gates

    _, _, _, scores, _ = soft_inputs()
    for warmth in (0.05, 1.0, 20.0):
        least = gates.least_kept(scores, 10, Window(size=16, sinks=4), warmth)
        for block in range(16):
            behind = scores[..., 4 : max(4, 6 * block - 16 + 1)]
            if behind.shape[-1] <= 10:
                assert (least[..., block] == gates.ALWAYS).all()
            else:
                total = torch.sigmoid((behind - least[..., block, None]) / warmth).sum(-1)
                torch.testing.assert_close(total, torch.full_like(total, 10), atol=0.05, rtol=0)


def test_spans_have_the_best_of_their_scores():
    from ahn.train import gates

    scores = torch.tensor([[[9.0, 1.0, 5.0, 2.0, 3.0, 4.0, 0.0, -1.0]]], requires_grad=True)
    found = gates.pooled(scores, 1, 3)
    assert found.tolist() == [[[9.0, 5.0, 5.0, 5.0, 4.0, 4.0, 4.0, -1.0]]]
    found[..., 1:4].sum().backward()
    assert scores.grad.tolist() == [[[0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]]]
    assert gates.pooled(scores, 1, 1) is scores


@pytest.mark.slow
def test_gates_learn_from_the_loss_itself():
    """Less is lost with the slots given as learned than with the gates as they began, nearly yes or no."""
    from ahn.train import distill, gates

    model = with_memory(tiny(), "deltanet", window=16, sinks=4, store="learned", store_size=8)
    ids = token_ids(96, batch=4, seed=1)

    def lost(warmth):
        with gates.attending(model, warmth):
            return distill.loss(model, ids, torch.ones_like(ids, dtype=torch.bool))

    optimizer = torch.optim.AdamW(gates.parameters(model), lr=1e-2)
    first = lost(1e-3).item()
    for step in range(60):
        optimizer.zero_grad()
        lost(gates.warmth_at(step / 59)).backward()
        optimizer.step()
    assert lost(1e-3).item() < 0.8 * first


def test_attention_transfer_through_a_store(store):
    """Each layer learns from full attention, and writes the evicted tokens; gates have another loss."""
    from ahn.train import distill

    model, ids = storing(store, "deltanet"), token_ids(60, batch=2)
    loss = distill.loss(model, ids, torch.ones_like(ids, dtype=torch.bool), "attention")
    loss.backward()
    assert 0 < loss.item() < torch.inf
    for layer in layers_of(model):
        assert all(parameter.grad.abs().max() > 0 for parameter in layer.cell.parameters())
        assert all(parameter.grad is None for parameter in layer.store.parameters())


@pytest.mark.slow
def test_a_recipe_trains_gates_then_cells(tmp_path, capsys):
    from ahn.train import recipe
    from ahn.train.run import train
    from tiny_base import write_base

    base, adapter = write_base(tmp_path)
    (tmp_path / "a.txt").write_text("The old cat sat on the mat and looked at 12 mice.\n" * 200)
    plan = {
        "base": base, "output": str(tmp_path / "run"), "data": [str(tmp_path / "a.txt")], "start": adapter,
        "length": 64, "batch": 4, "steps": 2, "lossless": [32], "sinks": [4], "window": 16, "kept_sinks": 4,
        "store": "learned", "store_size": 8, "gate_steps": 3, "gate_lr": 1e-2, "log_every": 1, "report_to": [],
    }  # fmt: skip
    folder = train(recipe.from_dict(plan))
    passes = r"[\d.]+ passes over the data"
    gates = rf"\n3 steps of 4 rows for the store's gates: {passes}"
    assert re.search(rf"{gates}, then 2 steps of 4 rows: {passes}\n", capsys.readouterr().err)
    tensors = read_adapter(folder).tensors
    untrained = stores.get("learned")(32, 2, 0)
    assert tensors["layers.0.store.decay"].shape == untrained.decay.shape
    assert not torch.equal(tensors["layers.0.store.decay"], untrained.decay)
    cells = read_adapter(adapter).tensors
    assert not torch.equal(tensors["layers.0.o_proj.weight"], cells["layers.0.o_proj.weight"])
    only = recipe.from_dict(plan | {"steps": 0, "output": str(tmp_path / "gates")})
    alone = read_adapter(train(only)).tensors
    assert re.search(rf"{gates}\n", capsys.readouterr().err)
    assert torch.equal(alone["layers.0.o_proj.weight"], cells["layers.0.o_proj.weight"])
    assert torch.equal(alone["layers.0.store.decay"], tensors["layers.0.store.decay"])
    curve = [entry for entry in json.loads((tmp_path / "gates" / "gates.json").read_text()) if "loss" in entry]
    assert curve[-1]["step"] == 3 and (tmp_path / "gates" / "gates" / "checkpoint-3").is_dir()
    with pytest.raises(AdapterError, match="no weights for store='learned'"):
        train(recipe.from_dict(plan | {"gate_steps": 0, "output": str(tmp_path / "untrained")}))
    with pytest.raises(ConfigError, match="gate_steps=3 without a store"):
        recipe.from_dict(plan | {"store": None, "store_size": 0})
    with pytest.raises(ConfigError, match="store='random' has nothing to train"):
        recipe.from_dict(plan | {"store": "random"})
    with pytest.raises(ConfigError, match="gate_steps with fsdp=True"):
        recipe.from_dict(plan | {"fsdp": True})
