"""One step of the whole model without the host: the same logits, and caches that are as if nothing had happened."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ahn
from ahn.cells.base import Cell
from ahn.cli import info
from ahn.compat import PAST
from ahn.engine import compile as compiling
from ahn.engine import generate as generation
from ahn.engine import graph as decoding
from ahn.ops import dispatch, fla
from ahn.ops.dispatch import Kernel
from conftest import FORMS, in_pieces, storing, tiny, token_ids, with_memory

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class NoHost(TorchDispatchMode):
    """Fails on operations that a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(WAITING), name
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def replays(monkeypatch):
    """Steps as on CUDA, but for the capture. Counts the replays. Nothing in them may wait for the device: looked at in
    the first ones, in one of eight after that, and whenever they have periodic work."""
    monkeypatch.setattr(dispatch, "pick_decoding", lambda device: Kernel("graph", "as on CUDA"))
    monkeypatch.setattr(decoding, "ROOM", 8)
    counts = {"made": 0, "replayed": 0}
    run, make = decoding.Graph._run, decoding.Graph.__init__

    def counted_run(self, cache, due):
        counts["replayed"] += 1
        with NoHost() if due or counts["replayed"] < 4 or not counts["replayed"] % 8 else nullcontext():
            return run(self, cache, due)

    def counted_make(self, *args):
        counts["made"] += 1
        make(self, *args)

    monkeypatch.setattr(decoding.Graph, "_run", counted_run)
    monkeypatch.setattr(decoding.Graph, "__init__", counted_make)
    return counts


def largest(a, b):
    return (a - b).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "sinks", "positions"),
    [
        *(("gated_deltanet", sinks, positions) for sinks in (0, 4) for positions in ("clipped", "absolute")),
        ("deltanet", 4, "absolute"),
        ("mamba2", 4, "clipped"),
        ("mamba2", 0, "absolute"),
        (None, 4, "clipped"),
        (None, 0, "absolute"),
    ],
)
def test_every_step_from_the_first_token_on(replays, cell, sinks, positions):
    """Before, at and after the first token that leaves, and several times around the ring."""
    model = with_memory(tiny(), cell, window=16, sinks=sinks, sink_positions=positions)
    ids = token_ids(90, batch=2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [1] * 90), whole) < 1e-4
    assert replays["replayed"] == 89  # all but the first, which finds no buffers
    assert largest(in_pieces(model, ids, [30, 1, 1, 20, *[1] * 38]), whole) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_every_form(replays, form):
    model = with_memory(tiny(), window=16, sinks=4, **FORMS[form])
    ids = token_ids(60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [25, *[1] * 35]), whole) < 1e-4
    assert replays == {"made": 1, "replayed": 35}


@torch.no_grad()
def both_ways(model, one, fast, plain, monkeypatch):
    """Logits of one token a row by a graph from the cache `fast`, and without one from `plain`."""
    by_graph = model(one, **{PAST: fast}).logits
    with monkeypatch.context() as without:
        without.setattr(dispatch, "pick_decoding", lambda device: Kernel("torch", "asked for"))
        return by_graph, model(one, **{PAST: plain}).logits


@pytest.mark.slow
def test_steps_are_those_without_a_graph(replays, cell, monkeypatch):
    """float32, 100 steps: logits within 1e-5 and the same cache."""
    model = with_memory(tiny(), cell, window=16, sinks=4)
    ids = token_ids(130)
    fast, plain = (ahn.read(model, ids[:, :30]) for _ in range(2))
    for t in range(30, 130):
        with_graph, without = both_ways(model, ids[:, t : t + 1], fast, plain, monkeypatch)
        assert largest(with_graph, without) < 1e-5
    assert replays["replayed"] == 100
    assert (fast.tokens_seen, fast.tokens_per_row) == (plain.tokens_seen, plain.tokens_per_row) == (130, [130])
    for ours, theirs in zip(fast.layers, plain.layers, strict=True):
        for name, tensor in theirs.tensors.items():
            assert largest(ours.tensors[name], tensor) < 1e-5, name


def test_rows_at_different_positions(replays):
    model = with_memory(tiny(), window=8, sinks=2)
    ids, other = token_ids(40), token_ids(25, seed=5)
    both = torch.cat([ids, torch.cat([torch.zeros(1, 15, dtype=torch.long), other], 1)])
    mask = torch.ones_like(both)
    mask[1, :15] = 0
    with torch.no_grad():
        expected = [model(row, use_cache=False).logits for row in (ids, other)]
    out = in_pieces(model, both, [20, *[1] * 20], mask)
    assert replays["replayed"] == 20
    assert largest(out[:1], expected[0]) < 1e-4
    assert largest(out[1:, 15:], expected[1]) < 1e-4


def test_caches_take_turns(replays, tmp_path):
    """Two texts decoded alternately, forked, saved and read on: each as if it were alone."""
    model = with_memory(tiny(), window=16, sinks=4)
    texts = token_ids(70, batch=2)
    with torch.no_grad():
        whole = model(texts, use_cache=False).logits
    caches = [ahn.read(model, text[:30]) for text in texts]
    forks = []
    for t in range(30, 50):
        for row, cache in enumerate(caches):
            with torch.no_grad():
                logits = model(texts[row : row + 1, t : t + 1], **{PAST: cache}).logits
            assert largest(logits[0, 0], whole[row, t]) < 1e-4
            if t == 40:
                forks.append(cache.fork())
    assert replays == {"made": 1, "replayed": 40}
    for row, cache in enumerate(caches):
        cache.save(tmp_path / f"{row}.ahn")
        loaded = ahn.AHNCache.load(tmp_path / f"{row}.ahn", model)
        for start, one in ((50, cache), (41, forks[row]), (50, loaded)):
            rest = texts[row : row + 1, start:]
            with torch.no_grad():
                assert largest(model(rest[:, :1], **{PAST: one}).logits, whole[row, start]) < 1e-4
                assert largest(model(rest[:, 1:], **{PAST: one}).logits, whole[row, start + 1 :]) < 1e-4


def test_a_cache_that_is_gone_is_not_kept(replays):
    model = with_memory(tiny())
    first = ahn.read(model, token_ids(30))
    with torch.no_grad():
        model(token_ids(1), **{PAST: first})
    graph = model._ahn.graph
    assert graph._lent_to() is first
    del first
    gc.collect()
    assert graph._lent_to() is None
    second = ahn.read(model, token_ids(30, seed=9))
    with torch.no_grad():
        model(token_ids(1), **{PAST: second})
    assert model._ahn.graph is graph and second.layers[0].keys is graph.layers[0].keys


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}], ids=str)
def test_generate(replays, options, monkeypatch):
    model = with_memory(tiny(), window=16, sinks=4)
    ids = token_ids(40)
    cache = ahn.read(model, ids)

    def generated(cache):
        torch.manual_seed(0)
        return ahn.generate(model, ids[:, :2], cache, max_new_tokens=30, eos_token_id=None, **options)

    fast = generated(cache.fork())
    assert replays["replayed"] == (29 if "num_beams" in options else 2 + 29)
    monkeypatch.setattr(dispatch, "pick_decoding", lambda device: Kernel("torch", "asked for"))
    assert torch.equal(fast, generated(cache))


def test_a_short_question_is_read_by_the_graph(replays, monkeypatch):
    model = with_memory(tiny(), window=16, sinks=4)
    cache, ids = ahn.read(model, token_ids(40)), token_ids(50, seed=3)

    def answers(cache):
        counts, out = [], []
        for question in (ids[:, :2], ids[:, 2:7], ids[:, 7 : 7 + generation.FEW + 1]):
            replays["replayed"] = 0
            out.append(ahn.generate(model, question, cache, max_new_tokens=4, eos_token_id=None))
            counts.append(replays["replayed"])
        return torch.cat(out, 1), counts

    fast, counts = answers(cache.fork())
    assert counts == [2 + 3, 5 + 3, 3] and replays["made"] == 1
    model._ahn.graph = None
    monkeypatch.setattr(dispatch, "pick_decoding", lambda device: Kernel("torch", "asked for"))
    assert torch.equal(fast, answers(cache)[0])


def waits_for_the_library(monkeypatch):
    """The one that reads many tokens at once on CUDA: it is there, but nothing has asked for it."""
    monkeypatch.setattr(fla.library, "loaded", False)
    monkeypatch.setattr(Cell, "uses_fla", lambda self, like: True)


def steps_of_question(replays, model, cache, tokens):
    replays["replayed"] = 0
    ahn.generate(model, token_ids(tokens), cache, max_new_tokens=1, eos_token_id=None)
    return replays["replayed"]


@pytest.mark.parametrize("layers", [None, [1]])
def test_longer_questions_while_the_library_for_them_is_not_imported(replays, layers, monkeypatch):
    """Until they have taken as long as its import."""
    monkeypatch.setattr(generation, "FEW_AT_FIRST", 99)
    model = with_memory(tiny(), window=16, sinks=4, layers=layers)
    cache = ahn.read(model, token_ids(40))
    waits_for_the_library(monkeypatch)
    assert [steps_of_question(replays, model, cache, tokens) for tokens in (60, 39, 32)] == [60, 39, 32]
    assert generation._few(model._ahn, 1000) == generation.FEW


def test_the_library_is_for_what_leaves_the_window(replays, monkeypatch):
    model = with_memory(tiny(), window=200, sinks=4)
    waits_for_the_library(monkeypatch)
    assert steps_of_question(replays, model, ahn.read(model, token_ids(40)), generation.FEW + 1) == 0


def test_a_question_to_another_shape_than_that_of_the_graph(replays):
    """Graphs are not made in turn for questions alone."""
    model = with_memory(tiny(), window=16, sinks=4)
    caches = [ahn.read(model, token_ids(40, batch=batch)) for batch in (1, 2)]
    for _ in range(2):
        for batch, cache in enumerate(caches, 1):
            ahn.generate(model, token_ids(3, batch=batch), cache, max_new_tokens=1, eos_token_id=None)
    assert replays == {"made": 1, "replayed": 6}


def test_a_long_question_where_no_graph_is_made(replays, monkeypatch):
    """Of what stands in the way of one, not all is known before."""
    model = with_memory(tiny(), window=16, sinks=4)
    cache, lengths = ahn.read(model, token_ids(40)), []
    monkeypatch.setattr(generation, "FEW", 64)
    model.config.output_hidden_states = True
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    assert steps_of_question(replays, model, cache, 60) == 0 and lengths == [1, 59]


def test_a_question_is_read_at_once_where_the_graph_fails(replays, monkeypatch):
    model = with_memory(tiny(), window=16, sinks=4)
    cache, lengths = ahn.read(model, token_ids(40)), []

    def fails(self, *args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding.Graph, "__init__", fails)
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    found = ahn.generate(model, token_ids(9), cache.fork(), max_new_tokens=3, eos_token_id=None)
    assert lengths == [1, 8, 1, 1]
    monkeypatch.setattr(dispatch, "pick_decoding", lambda device: Kernel("torch", "asked for"))
    assert torch.equal(found, ahn.generate(model, token_ids(9), cache, max_new_tokens=3, eos_token_id=None))


def test_a_short_question_to_rows_at_different_positions(replays):
    model = with_memory(tiny(), window=8, sinks=2)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    cache = ahn.read(model, token_ids(30, batch=2), attention_mask=mask)
    for _ in range(2):
        replays["replayed"] = 0
        ahn.generate(model, token_ids(3, batch=2), cache, max_new_tokens=4, eos_token_id=None)
        assert replays["replayed"] == 3


@pytest.mark.usefixtures("small_grids")
def test_a_short_question_while_a_store_fills_up(replays):
    """Its places are looked up on the host: no step of the graph, which another cache has made."""
    model = storing("recency", "deltanet")
    for length, replayed in ((60, 3 + 3), (10, 0), (60, 3 + 3)):
        cache = ahn.read(model, token_ids(length))
        replays["replayed"] = 0
        ahn.generate(model, token_ids(3), cache, max_new_tokens=4, eos_token_id=None)
        assert replays["replayed"] == replayed


def test_what_a_graph_cannot_do_is_done_without(replays):
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(30))
    one = token_ids(1)
    model(one, **{PAST: cache})  # with gradients enabled
    with torch.no_grad():
        out = model(one, **{PAST: cache}, output_hidden_states=True)
        model(inputs_embeds=model.get_input_embeddings()(one), **{PAST: cache})
    assert len(out.hidden_states) == 3
    assert cache.tokens_seen == 33
    assert replays["replayed"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("small_grids")
@pytest.mark.parametrize(
    ("cell", "positions", "sinks", "span"),
    [("gated_deltanet", "clipped", 4, 1), ("mamba2", "absolute", 0, 5), (None, "clipped", 4, 5)],
)
def test_a_store_from_where_it_is_full_on(replays, store, cell, positions, sinks, span):
    """Several times around the ring; before that, who is still nobody is looked up on the host."""
    if store == "surprise" and cell is None:
        pytest.skip("needs a cell")
    model = storing(store, cell, sinks=sinks, sink_positions=positions, store_span=span)
    ids, full = token_ids(90, batch=2), sinks + 8 + 16
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [10, *[1] * 80]), whole) < 1e-4
    assert replays == {"made": 1, "replayed": 90 - full}
    assert largest(in_pieces(model, ids, [40, *[1] * 5, 10, *[1] * 35]), whole) < 1e-4
    assert replays == {"made": 1, "replayed": 90 - full + 40}


@pytest.mark.slow
@pytest.mark.usefixtures("small_grids")
@pytest.mark.parametrize("form", FORMS)
def test_a_store_with_every_form(replays, store, form):
    model, ids = storing(store, "deltanet", **FORMS[form]), token_ids(60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [31, *[1] * 29]), whole) < 1e-4
    assert replays == {"made": 1, "replayed": 29}


@pytest.mark.slow
@pytest.mark.usefixtures("small_grids")
def test_steps_with_a_store_are_those_without_a_graph(replays, store, monkeypatch):
    """float32, 100 steps: logits within 1e-5 and the same cache, in every tensor."""
    model, ids = storing(store, store_span=3), token_ids(130, batch=2)
    fast, plain = (ahn.read(model, ids[:, :30]) for _ in range(2))
    for t in range(30, 130):
        with_graph, without = both_ways(model, ids[:, t : t + 1], fast, plain, monkeypatch)
        assert largest(with_graph, without) < 1e-5
    assert replays["replayed"] == 100
    for ours, theirs in zip(fast.layers, plain.layers, strict=True):
        for name, tensor in theirs.tensors.items():
            assert largest(ours.tensors[name], tensor) < 1e-5, name


@pytest.mark.slow
@pytest.mark.usefixtures("small_grids")
def test_rows_at_different_positions_with_a_store(replays, store):
    """What is due at some positions is done in the rows that are there."""
    model = storing(store, window=8, sinks=2, store_span=3)
    ids, other = token_ids(60), token_ids(45, seed=5)
    both = torch.cat([ids, torch.cat([torch.zeros(1, 15, dtype=torch.long), other], 1)])
    mask = torch.ones_like(both)
    mask[1, :15] = 0
    with torch.no_grad():
        expected = [model(row, use_cache=False).logits for row in (ids, other)]
    out = in_pieces(model, both, [20, *[1] * 40], mask)
    assert replays == {"made": 1, "replayed": 60 - 15 - 2 - 8 - 8}  # since the shorter row's store is full
    assert largest(out[:1], expected[0]) < 1e-4
    assert largest(out[1:, 15:], expected[1]) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("small_grids")
def test_caches_with_a_store_take_turns(replays, store, tmp_path):
    """Alternately in the graph and, for several tokens at once, out of it: each as if it were alone."""
    model, texts = storing(store), token_ids(90, batch=2)
    with torch.no_grad():
        whole = model(texts, use_cache=False).logits
    caches = [ahn.read(model, text[:30]) for text in texts]
    low, forks = 30, []
    for size in [*[1] * 11, 5, *[1] * 9, 3, *[1] * 4]:
        for row, cache in enumerate(caches):
            with torch.no_grad():
                logits = model(texts[row : row + 1, low : low + size], **{PAST: cache}).logits
            assert largest(logits[0], whole[row, low : low + size]) < 1e-4
            if low == 40:
                forks.append(cache.fork())
        low += size
    assert replays == {"made": 1, "replayed": 48}
    for row, cache in enumerate(caches):
        cache.save(tmp_path / f"{row}.ahn")
        loaded = ahn.AHNCache.load(tmp_path / f"{row}.ahn", model)
        for start, one in ((low, cache), (41, forks[row]), (low, loaded)):
            rest = texts[row : row + 1, start:]
            with torch.no_grad():
                for t in range(5):
                    logits = model(rest[:, t : t + 1], **{PAST: one}).logits
                    assert largest(logits[0, 0], whole[row, start + t]) < 1e-4


def test_only_some_layers_have_a_store(replays, store):
    model, ids = storing(store, base=tiny(num_hidden_layers=3), layers=(1,)), token_ids(60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [30, *[1] * 30]), whole) < 1e-4
    assert replays["replayed"] == 30


def test_weights_that_moved_need_another_graph(replays):
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(30))
    with torch.no_grad():
        model(token_ids(1), **{PAST: cache})
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        model(token_ids(1), **{PAST: cache})
    assert replays["made"] == 2


def test_adapters_that_are_switched_need_another_graph(replays):
    model = with_memory(tiny())
    for made, scale in enumerate([1, 2, 2]):
        model.model.layers[0].self_attn.scaling *= scale
        cache = ahn.read(model, token_ids(30))
        with torch.no_grad():
            model(token_ids(1), **{PAST: cache})
            model(token_ids(1), **{PAST: cache})
        assert replays["made"] == made + 1
    model(token_ids(1), **{PAST: ahn.read(model, token_ids(30))})
    assert replays["made"] == 3


def test_a_failed_capture_says_so_and_goes_on(replays, monkeypatch, caplog):
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(30))

    def fails(self, *args):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(decoding.Graph, "__init__", fails)
    with torch.no_grad():
        for _ in range(2):
            model(token_ids(1), **{PAST: cache})
    assert [record.getMessage() for record in caplog.records] == [
        "decoding without a CUDA graph: operation not permitted when stream is capturing"
    ]
    assert cache.tokens_seen == 32


def test_a_copy_of_a_model_decodes_by_itself(replays):
    model = with_memory(tiny())
    twin = copy.deepcopy(model)
    assert twin.model.forward.__self__ is twin._ahn and twin._ahn.decoder is twin.model
    ahn.detach(model)
    assert "forward" not in vars(model.model)


def test_the_choice_can_be_restricted(monkeypatch):
    monkeypatch.setenv("AHN_KERNEL", "torch")
    assert {kernel for _, kernel, _ in info.report()} == {"torch"}
    assert dispatch.pick_decoding("cuda") == ("torch", "AHN_KERNEL=torch")
    monkeypatch.setenv("AHN_KERNEL", "graph, flash")
    assert dispatch.pick_decoding("cuda").name == "graph"
    assert dispatch.pick_attention(torch.empty(1, 64)).name == "flash"
    assert dispatch.pick_whole_sequence("cuda", 64, 128).name == "torch"
    monkeypatch.setenv("AHN_KERNEL", "torch,flash")
    with pytest.raises(ahn.errors.ConfigError, match="no kernel torch; expected auto or torch alone"):
        info.report()
    monkeypatch.setenv("AHN_KERNEL", "tritn")
    with pytest.raises(
        ahn.errors.ConfigError, match="AHN_KERNEL=tritn: no kernel tritn; expected auto or torch alone, or some"
    ):
        info.report()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Phi3"])
def test_the_base_is_compiled_once_for_all_layers(monkeypatch, family):
    """Without breaks, and undone afterwards."""
    monkeypatch.setattr(dispatch, "pick_decoding", lambda device: Kernel("graph", "as on CUDA"))
    compiled, compile = [], torch.compile

    def counted(function, **options):
        compiled.append(function)
        return compile(function, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", counted)
    model = with_memory(tiny(family, num_hidden_layers=6), window=16, sinks=4)
    ids = token_ids(40)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = dict(vars(model.model.layers[0].mlp))
    with compiling.compiled(model.model):
        assert largest(in_pieces(model, ids, [1] * 40), whole) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * len(compiled)  # norms on heads differ in shape
    assert vars(model.model.layers[0].mlp) == before
