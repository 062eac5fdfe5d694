"""One answer, however the text is cut: the authors' logits, any split, any batch, any base."""

import pytest
import torch

import ahn
from ahn.compat import PAST
from ahn.hf.augment import set_window
from ahn.memory.handle import layers_of
from conftest import CELLS, FORMS, golden_base, golden_tensors, in_pieces, tiny, token_ids, with_memory
from toy import Toy

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")
SPLITS = ([60], [7, 13, 1, 1, 30, 8], [1] * 60, [20, 1, 19, 20], [59, 1], [33, 27])


def largest(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def authors():
    """cell -> (model with the authors' weights, ids, their logits)."""
    models = {}
    for cell in CELLS:
        tensors, metadata = golden_tensors(cell)
        model = golden_base(tensors, metadata)
        config = ahn.AHNConfig(cell, int(metadata["window"]), int(metadata["sinks"]), sink_positions="absolute")
        ahn.augment(model, config)
        for i, layer in enumerate(layers_of(model)):
            prefix = f"model.layers.{i}.ahn.fn."
            weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            weights.pop("D", None)
            layer.cell.load_state_dict(weights)
        models[cell] = model, tensors["input_ids"], tensors["logits"]
    return models


@pytest.fixture
def of_authors(authors, cell):
    if cell not in authors:
        pytest.skip("the authors have no such cell")
    return authors[cell]


@pytest.mark.parametrize("sizes", [[300], [7, 61, 64, 65, 1, 1, 99, 2], [200, 100], [67, 1, 1, 1, 230]], ids=str)
def test_authors_logits_in_pieces(of_authors, sizes):
    model, ids, logits = of_authors
    assert largest(in_pieces(model, ids, sizes), logits) < 1e-4


def test_authors_logits_token_by_token(of_authors):
    model, ids, logits = of_authors
    assert largest(in_pieces(model, ids, [1] * 300), logits) < 1e-4


def test_authors_logits_without_a_cache(of_authors):
    model, ids, logits = of_authors
    assert largest(model(ids, use_cache=False).logits, logits) < 1e-4
    with torch.no_grad():
        assert largest(model(ids).logits, logits) < 1e-4


@pytest.mark.parametrize("sizes", [[323], [5, 30, 100, 1, 1, 1, 64, 121]], ids=str)
def test_authors_logits_left_padded_beside_another_sequence(of_authors, sizes):
    model, ids, logits = of_authors
    padding = 23
    other = token_ids(323)
    both = torch.cat([torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], 1), other])
    mask = torch.ones_like(both)
    mask[0, :padding] = 0
    out = in_pieces(model, both, sizes, mask)
    assert largest(out[:1, padding:], logits) < 1e-4
    assert largest(out[1:], in_pieces(model, other, [323])) < 1e-4
    with torch.no_grad():
        assert largest(model(both, attention_mask=mask, use_cache=False).logits[:1, padding:], logits) < 1e-4


@pytest.mark.parametrize("positions", ["clipped", "absolute"])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("cell", ["gated_deltanet", "deltanet", "mamba2", "toy", None])
def test_any_split_gives_the_same_logits(cell, sinks, positions):
    ahn.cells.register("toy", Toy)
    model = with_memory(tiny(), cell, window=16, sinks=sinks, sink_positions=positions)
    ids = token_ids(60, batch=2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in SPLITS:
        assert largest(in_pieces(model, ids, sizes), whole) < 1e-4, sizes


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["gated_deltanet", "deltanet", "mamba2", "toy"])
def test_any_split_of_every_form(cell, form, sinks):
    ahn.cells.register("toy", Toy)
    model = with_memory(tiny(), cell, window=16, sinks=sinks, **FORMS[form])
    ids = token_ids(60, batch=2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in SPLITS:
        assert largest(in_pieces(model, ids, sizes), whole) < 1e-4, sizes


@pytest.mark.parametrize("form", FORMS)
def test_forms_with_padding_and_in_turns(form):
    """Rows of one batch start to forget at different tokens."""
    model = with_memory(tiny(), window=8, sinks=2, **FORMS[form])
    ids, other = token_ids(40), token_ids(25, seed=5)
    both = torch.cat([ids, torch.cat([torch.zeros(1, 15, dtype=torch.long), other], 1)])
    mask = torch.ones_like(both)
    mask[1, :15] = 0
    with torch.no_grad():
        expected = [model(row, use_cache=False).logits for row in (ids, other)]
        without_cache = model(both, attention_mask=mask, use_cache=False).logits
    for out in (without_cache, *(in_pieces(model, both, sizes, mask) for sizes in ([40], [9, 1, 20, 1, 9], [1] * 40))):
        assert largest(out[:1], expected[0]) < 1e-4
        assert largest(out[1:, 15:], expected[1]) < 1e-4


@pytest.mark.parametrize("store", [None, "recency"])
def test_first_pieces_that_are_all_padding(store):
    places = {} if store is None else {"store": store, "store_size": 8}
    model, ids, padding = with_memory(tiny(), **places), token_ids(40), 3
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    expected = in_pieces(model, ids, [40])
    for sizes in ([padding, 40], [1] * 43):
        assert largest(in_pieces(model, padded, sizes, mask)[:, padding:], expected) < 1e-4


def test_without_positions_the_state_does_not_know_where_it_was_written():
    """The same tokens, further back: with rotary keys the state is another, without it is the same."""
    for positions, same in (("none", True), ("rope", False)):
        model = with_memory(tiny(num_hidden_layers=1), "deltanet", window=4, sinks=0, memory_positions=positions)
        ids, states = token_ids(20), []
        for start in (0, 30):
            cache = ahn.AHNCache(model)
            cache.tokens_seen, cache._seen, cache._batch = (
                start,
                [start],
                1,
            )  # as if so many tokens had been forgotten without a trace
            for layer in cache.layers:
                layer.reserve(4, torch.zeros(1, 2, 1, 8), (4, 8, 8))
            with torch.no_grad():
                model(ids, **{PAST: cache})
            states.append(cache.layers[0].state)
        # the first tokens push out what was never there, at both starts or at one: compare what followed
        assert (largest(*states) < 1e-5) == same


def test_what_the_cell_is_given(monkeypatch):
    """Query t beside the key t - W, both before their rotary positions, and how many tokens have left by then."""
    window, sinks, tokens = 8, 2, 30
    model = with_memory(tiny(num_hidden_layers=1), window=window, sinks=sinks, memory_positions="none")
    attention, (layer,) = model.model.layers[0].self_attn, layers_of(model)
    given = {}
    ready, combine = layer.cell.ready, layer.cell.combine
    monkeypatch.setattr(layer.cell, "ready", lambda q, k, *rest: given.update(q=q, k=k) or ready(q, k, *rest))
    monkeypatch.setattr(layer.cell, "combine", lambda *rest: given.update(x=rest[3], left=rest[4]) or combine(*rest))
    with torch.no_grad():
        model(token_ids(tokens), use_cache=False)
        q, k = (p(given["x"]).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    first = sinks + window
    assert largest(given["q"][:, :, first:], q[:, :, first:]) < 1e-5
    assert largest(given["k"][:, :, first:], k[:, :, sinks:-window].repeat_interleave(2, 1)) < 1e-5
    assert given["left"][0, first:].tolist() == list(range(1, tokens - first + 1))


def test_untrained_forms_are_the_window_alone():
    ids = token_ids(60)
    with torch.no_grad():
        window = ahn.augment(tiny(), ahn.AHNConfig(None, 16, 4))(ids, use_cache=False).logits
        for form in FORMS.values():
            model = ahn.augment(tiny(), ahn.AHNConfig("gated_deltanet", 16, 4, **form))
            assert largest(model(ids, use_cache=False).logits, window) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 127, 128, 129, 200])
def test_windows_around_block_sizes(window):
    model = with_memory(tiny(), window=window, sinks=3)
    ids = token_ids(270)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in ([100, 1, 1, 168], [window, 1, 269 - window], [270]):
        assert largest(in_pieces(model, ids, sizes), whole) < 1e-4, sizes


@pytest.mark.parametrize("sinks", [127, 128, 129, 200, 300])
@pytest.mark.parametrize("store", [None, "recency"])
def test_sinks_around_block_sizes(sinks, store):
    """Queries of several blocks lie among the sinks: none sees what comes later."""
    base, ids = tiny(), token_ids(400)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], 1)
    with torch.no_grad():
        expected = base(ids).logits
        places = {} if store is None else {"store": store, "store_size": 8, "sink_positions": "absolute"}
        model = ahn.augment(base, ahn.AHNConfig(None, 400 - sinks, sinks, **places))
        assert largest(model(ids, use_cache=False).logits, expected) < 1e-4
        assert largest(in_pieces(model, ids, [370, 30]), expected) < 1e-4
        assert largest(model(padded, attention_mask=(padded > 0).long()).logits[:, 7:], expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_positions_are_the_base_models(family):
    base = tiny(family)
    ids = token_ids(60)
    with torch.no_grad():
        expected = base(ids).logits
        model = with_memory(base, window=16, sinks=4)
        out = model(ids).logits
    assert largest(out[:, :20], expected[:, :20]) < 1e-5
    assert largest(out[:, 20:], expected[:, 20:]) > 1e-2  # or this test could not fail
    assert largest(in_pieces(model, ids, [1] * 20 + [40])[:, :20], expected[:, :20]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_pieces(family):
    model = with_memory(tiny(family), window=16, sinks=4)
    ids = token_ids(60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [11, 1, 30, 1, 17]), whole) < 1e-4


@pytest.mark.parametrize("family", ["Olmo2", "Granite", "StableLm", "Glm", "Cohere"])
def test_families_nobody_thought_of(family):
    """Other norms, scalings, rotary layouts: partial, interleaved."""
    model = with_memory(tiny(family, head_dim=8) if family == "Glm" else tiny(family), window=16, sinks=4)
    ids = token_ids(60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, [11, 1, 30, 1, 17]), whole) < 1e-4


@pytest.mark.parametrize("family", ["Llama", "Glm", "Cohere", "StableLm", "Phi3"])
def test_clipped_sinks_are_the_sinks_at_that_distance(family):
    """A query behind the lossless tokens must see the sinks as if it were at position sinks + window."""
    window, sinks, tokens = 8, 4, 30
    model = tiny(family, num_hidden_layers=1)
    ids = token_ids(tokens)
    kept = [*range(sinks), *range(tokens - window, tokens)]
    positions = torch.tensor([[*range(sinks), *range(sinks + 1, sinks + window + 1)]])
    with torch.no_grad():
        # one layer: keys and values depend on their own token only, so the base can read the kept tokens alone
        expected = model(ids[:, kept], position_ids=positions).logits[:, -1]
        with_memory(model, cell=None, window=window, sinks=sinks, sink_positions="clipped")
        for sizes in ([tokens], [1] * tokens, [13, 17]):
            assert largest(in_pieces(model, ids, sizes)[:, -1], expected) < 1e-5


def test_sinks_that_come_later_are_clipped_as_well():
    ids = token_ids(40)
    with torch.no_grad():
        expected = with_memory(tiny(), cell=None, window=8, sinks=4)(ids, use_cache=False).logits
        model = with_memory(tiny(), cell=None, window=16, sinks=0)
        set_window(model, 8, 4)
        assert largest(model(ids, use_cache=False).logits, expected) < 1e-6


def test_scaled_rotary_positions_clip_as_well():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    window, sinks, tokens = 8, 4, 30
    model = tiny(num_hidden_layers=1, rope_parameters=rope)
    ids = token_ids(tokens)
    kept = [*range(sinks), *range(tokens - window, tokens)]
    positions = torch.tensor([[*range(sinks), *range(sinks + 1, sinks + window + 1)]])
    with torch.no_grad():
        expected = model(ids[:, kept], position_ids=positions).logits[:, -1]
        with_memory(model, cell=None, window=window, sinks=sinks)
        assert largest(in_pieces(model, ids, [tokens])[:, -1], expected) < 1e-5


def test_two_caches_open_at_once():
    model = with_memory(tiny())
    one, two = token_ids(60, seed=1), token_ids(60, seed=2)
    expected = in_pieces(model, one, [60]), in_pieces(model, two, [60])
    caches, out = (ahn.AHNCache(model), ahn.AHNCache(model)), ([], [])
    with torch.no_grad():
        for low in range(0, 60, 10):
            for i, ids in enumerate((one, two)):
                out[i].append(model(ids[:, low : low + 10], **{PAST: caches[i]}).logits)
    for i in range(2):
        assert largest(torch.cat(out[i], 1), expected[i]) < 1e-4


def test_batch_rows_do_not_see_each_other():
    model = with_memory(tiny())
    ids = token_ids(60, batch=3)
    changed = ids.clone()
    changed[1] = token_ids(60, seed=8)
    a, b = in_pieces(model, ids, [25, 1, 34]), in_pieces(model, changed, [25, 1, 34])
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert largest(a[1], b[1]) > 1e-2


def test_a_turn_without_a_mask_goes_on_where_the_text_was():
    """Padding that was read is not counted, whether a later call says so or not."""
    model, ids = with_memory(tiny()), token_ids(70)
    padded = torch.cat([torch.zeros(1, 20, dtype=torch.long), ids[:, :50]], 1)
    cache = ahn.read(model, padded, attention_mask=(torch.arange(70) >= 20)[None].long())
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 50:]
        assert largest(model(ids[:, 50:], **{PAST: cache.fork()}).logits, expected) < 1e-4
        assert largest(ahn.read(model, ids[:, 50:], cache).last_logits, expected[:, -1]) < 1e-4


def test_rows_padded_anew_in_a_later_turn():
    """Padding in the middle of a row, as batched conversations have it, is as if it were not there."""
    model = with_memory(tiny())
    short, long = token_ids(50, seed=1), token_ids(58, seed=2)
    ids = torch.cat([torch.cat([short[:, :30], torch.zeros(1, 8, dtype=torch.long), short[:, 30:]], 1), long])
    mask = torch.ones_like(ids)
    mask[0, 30:38] = 0
    out = in_pieces(model, ids, [30, 12, 1, 1, 14], mask)
    assert largest(out[:1, 38:], in_pieces(model, short, [50])[:, 30:]) < 1e-4
    assert largest(out[1:], in_pieces(model, long, [58])) < 1e-4


def test_fork_diverges_without_copying_back():
    model = with_memory(tiny())
    ids = token_ids(60)
    with torch.no_grad():
        cache = ahn.AHNCache(model)
        model(ids[:, :40], **{PAST: cache})
        fork = cache.fork()
        model(token_ids(15, seed=9), **{PAST: fork})
        out = model(ids[:, 40:], **{PAST: cache}).logits
    assert fork.tokens_seen == 55
    assert largest(out, in_pieces(model, ids, [40, 20])[:, 40:]) == 0


def test_layers_can_keep_full_attention():
    base = tiny(num_hidden_layers=3)
    ids = token_ids(60)
    model = with_memory(base, layers=(1,))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in SPLITS:
        assert largest(in_pieces(model, ids, sizes), whole) < 1e-4, sizes
    cache = ahn.read(model, ids)
    assert [layer.keys.shape[2] >= 60 for layer in cache.layers] == [True, False, True]


@pytest.mark.parametrize("form", [{}, *FORMS.values()], ids=["paper", *FORMS])
def test_gradients_match_a_loop_over_tokens(cell, form):
    """Through the whole model, without a cache, with the naive recurrence in place of the chunked one."""

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = with_memory(tiny(), cell, **form)
    ids = token_ids(90, batch=2)
    chunked = gradients()
    for layer in layers_of(model):
        layer.cell.chunk = layer.cell.naive
    naive = gradients()
    cells = {name for name, _ in model.named_parameters() if ".ahn." in name}
    assert chunked.keys() == naive.keys() == cells  # the base is frozen, every weight of the cells is reached
    for name, gradient in naive.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-5)


def test_gradients_under_checkpointing_and_padding():
    model = with_memory(tiny()).train()
    ids = token_ids(60, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    enable = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{enable}_checkpointing_enable")()  # renamed in 5.23
    torch.testing.assert_close(gradients(), plain)


def test_a_cache_refuses_to_lose_gradients():
    model = with_memory(tiny())
    loss = model(token_ids(60), **{PAST: ahn.AHNCache(model)}, labels=token_ids(60)).loss
    with pytest.raises(ahn.errors.UnsupportedOperationError, match="use_cache=False"):
        loss.backward()


def test_layers_without_positions_see_the_sinks_unturned():
    settings = {"no_rope_layers": [0, 0], "layer_types": ["full_attention"] * 2}
    clipped, absolute = (with_memory(tiny("SmolLM3", **settings), sink_positions=p) for p in ("clipped", "absolute"))
    ids = token_ids(60)
    assert largest(in_pieces(clipped, ids, [30, 1, 29]), in_pieces(absolute, ids, [60])) < 1e-4
