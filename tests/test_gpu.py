"""What only a GPU can show: flash-linear-attention against the naive forms, and the whole model on CUDA."""

import contextlib
import functools
import gc
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import ahn
from ahn.cells.modules import unit
from ahn.cli import info
from ahn.compat import PAST
from ahn.engine import compile as compiling
from ahn.fingerprint import fingerprint
from ahn.hf.augment import set_window
from ahn.memory.handle import layers_of
from ahn.ops import dispatch, flex
from ahn.ops.softmax import attend
from ahn.ops.specs import Queries, Window
from ahn.train import distill
from ahn.train.trainer import compiled_layers
from conftest import (
    FORMS,
    drifting,
    golden_base,
    golden_tensors,
    in_pieces,
    soft_inputs,
    storing,
    tiny,
    token_ids,
    with_memory,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch):
    """It takes seconds for every new shape, so only the test of it does."""
    monkeypatch.setenv("AHN_KERNEL", ",".join(name for name in dispatch.KERNELS if name != "inductor"))


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 777])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_scan_is_the_naive_form(cell, size, tokens, dtype):
    if (cell, size) == ("mamba2", 256):
        pytest.skip("no forms of its kernels are given, and to try them all takes minutes")
    torch.manual_seed(tokens)
    module = ahn.cells.get(cell)(4 * size, 4, size, dtype, "cuda")
    q, k, v = torch.randn(3, 2, 4, tokens, size, device="cuda", dtype=dtype).unbind(0)
    x = torch.randn(2, tokens, 4 * size, device="cuda", dtype=dtype)
    state = torch.randn(2, 4, size, size, device="cuda") / 8
    with torch.no_grad():
        gates = module.gates(module.gate_inputs(x))
        read, after = module.scan(q, k, v, gates, state.clone())
        expected = module.naive(unit(q), unit(k), v.float(), gates, state)
    assert relative(read, expected[0]) < module.tolerance[dtype]
    assert relative(after, expected[1]) < module.tolerance[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [65, 777])
def test_gradients_of_the_scan(cell, tokens, dtype):
    def gradients(naive):
        torch.manual_seed(tokens)
        module = ahn.cells.get(cell)(256, 4, 64, dtype, "cuda")
        leaves = [t.detach().requires_grad_() for t in torch.randn(3, 2, 4, tokens, 64, device="cuda", dtype=dtype)]
        x = torch.randn(2, tokens, 256, device="cuda", dtype=dtype)
        q, k, v = leaves
        gates = module.gates(module.gate_inputs(x))
        state = torch.zeros(2, 4, 64, 64, device="cuda")
        read, _ = (
            module.naive(unit(q), unit(k), v.float(), gates, state) if naive else module.scan(q, k, v, gates, state)
        )
        (
            read * torch.randn(read.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        ).sum().backward()
        return [leaf.grad for leaf in leaves] + [p.grad for p in module.parameters() if p.grad is not None]

    fast, naive = gradients(False), gradients(True)
    assert len(fast) == len(naive)
    for a, b in zip(fast, naive, strict=True):
        assert relative(a, b) < 2 * ahn.cells.get(cell).tolerance[dtype]


def test_authors_logits(cell):
    tensors, metadata = golden_tensors(cell)
    config = ahn.AHNConfig(cell, int(metadata["window"]), int(metadata["sinks"]), sink_positions="absolute")
    model = ahn.augment(golden_base(tensors, metadata).cuda(), config)
    for i, layer in enumerate(layers_of(model)):
        prefix = f"model.layers.{i}.ahn.fn."
        layer.cell.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix) and n[-2:] != ".D"}
        )
    ids = tensors["input_ids"].cuda()
    for sizes in ([300], [7, 61, 64, 65, 1, 1, 99, 2], [1] * 300):
        assert (in_pieces(model, ids, sizes).cpu() - tensors["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("sinks", [0, 3])
def test_any_split_in_half_precision(cell, sinks):
    model = with_memory(tiny(head_dim=64).cuda().bfloat16(), cell, window=50, sinks=sinks)
    ids = token_ids(300, batch=2).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in ([300], [99, 1, 1, 130, 69], [1] * 300):
        assert relative(in_pieces(model, ids, sizes), whole) < 0.05


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("store", [None, "learned"])
def test_another_device_than_the_current_one(store):
    ids, found = token_ids(90), []
    for device in ("cuda:0", "cuda:1"):
        base = tiny(head_dim=64).to(device)
        model = storing(store, base=base) if store else with_memory(base)
        assert torch.cuda.current_device() == 0
        found.append(in_pieces(model, ids.to(device), [60, *[1] * 30]).cpu())
    assert relative(found[1], found[0]) < 1e-4


def test_attention_of_a_sequence_is_compiled_for_every_length():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for blocks in range(1, 12):
            q, k, v = torch.randn(3, 1, 2, 128 * blocks, 64, device="cuda").bfloat16()
            flex.attend_sequence(Queries(q, q, 0.125), k, v, Window(size=40, sinks=4))


@pytest.mark.skipif(not HOPPER, reason="what is known is for Hopper")
@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_library_tries_no_forms(size, tmp_path):
    """Of the delta rules: each form takes a second to compile, and which is the fastest for few tokens is chance."""
    script = f"""
        import torch
        from ahn.ops import fla
        q, k, v = torch.nn.functional.normalize(torch.randn(3, 1, 100, 2, {size}, device="cuda"), dim=-1).bfloat16()
        beta, state = torch.rand(1, 100, 2, device="cuda"), torch.zeros(1, 2, {size}, {size}, device="cuda")
        with torch.no_grad():
            fla.gated_delta_rule(q, k, v, beta, -beta, state, 1.0)
            fla.delta_rule(q, k, v, beta, state, 1.0)
    """
    unset = {"FLA_CACHE_MODE", "FLA_CONFIG_DIR"}
    known = {name: value for name, value in os.environ.items() if name not in unset}
    environment = known | {"TRITON_PRINT_AUTOTUNING": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "utotuning" not in done.stdout + done.stderr


def test_kernel_choice_is_visible():
    rows = {operation: kernel for operation, kernel, _ in info.report()}
    assert set(rows.values()) <= {*dispatch.KERNELS, "torch"}


def test_the_compiled_training_step(cell):
    """The same loss and gradients as the plain step, in bfloat16, for windows that were not there when it compiled."""
    sizes, length = [(90, 30), (150, 7), (40, 60)], 384

    def gradients(compiled):
        torch._dynamo.reset()
        model = with_memory(tiny(head_dim=64).cuda().bfloat16(), cell, **FORMS["maps"])
        for layer in layers_of(model):
            layer.cell.float()
        found = []
        with compiled_layers(model) if compiled else contextlib.nullcontext():
            for step, size in enumerate(sizes):
                set_window(model, *size)
                ids = token_ids(length, batch=2, seed=step).cuda()
                loss = distill.loss(model, ids, torch.ones_like(ids, dtype=torch.bool))
                loss.backward()
                found.append(loss.item())
        return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (losses, fast), (expected, plain) = gradients(True), gradients(False)
    assert losses == pytest.approx(expected, rel=0.02)
    assert fast.keys() == plain.keys()
    for name, gradient in plain.items():
        assert relative(fast[name], gradient) < 0.1, name


def kernels_used(model):
    graph = model._ahn.graph
    return graph is not None and bool(graph._captured)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("allowed", ["cudnn,flash", "flash"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (130, 513), (129, None), (1000, None)])
def test_fused_attention_and_its_normaliser(monkeypatch, queries, keys, allowed, size, dtype):
    """Dense, and causal where there are as many keys as queries; the keys a part of a longer buffer."""
    torch.manual_seed(queries)
    q = torch.randn(2, queries, 6, size, device="cuda", dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, 2, 1100, size, device="cuda", dtype=dtype)[..., 5 : 5 + (keys or queries), :]
    monkeypatch.setenv("AHN_KERNEL", "torch")
    expected = attend(q.float(), k.float(), v.float(), None, size**-0.5, causal=keys is None)
    monkeypatch.setenv("AHN_KERNEL", allowed)
    assert dispatch.pick_attention(q).name in allowed
    out = attend(q, k, v, None, size**-0.5, causal=keys is None)
    assert relative(out[0], expected[0]) < 1e-2
    assert relative(out[1], expected[1]) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (130, 513), (128, 1027)])
def test_masked_attention_and_its_normaliser(monkeypatch, queries, keys, by_head, dtype):
    """One query sees nothing: it has to vanish beside any other part."""
    torch.manual_seed(queries)
    q = torch.randn(3, queries, 6, 64, device="cuda", dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 3, 2, 1100, 64, device="cuda", dtype=dtype)[..., 5 : 5 + keys, :]
    mask = torch.rand(3 if by_head else 1, *([2] if by_head else []), queries, keys, device="cuda") < 0.4
    mask[..., 0], mask[..., 0, :] = True, False
    monkeypatch.setenv("AHN_KERNEL", "torch")
    expected = attend(q.float(), k.float(), v.float(), mask, 0.125)
    monkeypatch.delenv("AHN_KERNEL")
    out = attend(q, k, v, mask, 0.125)
    assert relative(out[0][:, :, 1:], expected[0][:, :, 1:]) < 1e-2 if queries > 1 else True
    assert relative(out[1][:, :, 1:], expected[1][:, :, 1:]) < 2e-3 if queries > 1 else True
    assert out[0].isfinite().all() and (out[1][:, :, 0] < -1e4).all()


@pytest.mark.parametrize("sinks", [0, 13])
@pytest.mark.parametrize("window", [100, 257])
@pytest.mark.parametrize("form", ["one kernel", "dense", "by length"])
def test_reading_in_pieces_of_the_ring(monkeypatch, cell, window, sinks, form):
    """Windows that are no multiple of anything, two rows, several times around the ring."""
    if form != "one kernel":
        monkeypatch.setattr(dispatch, "NARROW", 0)
        monkeypatch.setattr(dispatch, "PLANNED", 0 if form == "dense" else 300)
    model = with_memory(tiny(head_dim=64, max_position_embeddings=2048).cuda().bfloat16(), cell, window, sinks)
    ids = token_ids(1100, batch=2).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in ([1100], [99, 400, 1, 600], [500, 13, 87, 500]):
        assert relative(in_pieces(model, ids, sizes), whole) < 0.05


def test_cudnn_groups_heads():
    """If not, reading copies keys for every query head: correct, but slower."""
    if dispatch.pick_attention(torch.empty(1, 64, device="cuda", dtype=torch.bfloat16)).name == "cudnn":
        assert dispatch.groups_heads()


def test_reading_compiled(monkeypatch, cell):
    """Texts of several lengths by the same graphs; nothing that is compiled fails and is left plain."""
    monkeypatch.delenv("AHN_KERNEL")
    monkeypatch.setattr(dispatch, "LONG", 100)
    monkeypatch.setattr(dispatch, "NARROW", 0)
    monkeypatch.setattr(dispatch, "PLANNED", 0)
    monkeypatch.setattr(compiling, "MANY", 20)
    monkeypatch.setattr(compiling, "of_any_length", functools.cache(compiling.of_any_length.__wrapped__))
    shape = {"hidden_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    base = tiny("Qwen3", **shape, max_position_embeddings=4096).cuda().bfloat16()
    model = with_memory(base, cell, window=257, sinks=13)
    torch._dynamo.reset()  # other tests have compiled the same functions, and there is a limit
    counters = torch._dynamo.utils.counters
    counters.clear()
    for length, chunk in ((1300, 211), (901, 301), (777, 99)):
        ids = token_ids(length).cuda()
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
        found = ahn.read(model, ids, chunk=chunk).last_logits
        assert relative(found, whole[:, -1]) < 0.05
    assert counters["stats"]["unique_graphs"] >= 5
    assert counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.parametrize(
    "allowed", ["graph", "graph,triton", "graph,gemv", "graph,gemv,triton", "graph,gemv,triton,pdl", "triton"]
)
@pytest.mark.parametrize("sinks", [0, 5])
def test_decoding_is_the_whole_sequence(monkeypatch, cell, allowed, sinks):
    """float32, from before the first token leaves on, several times around the ring, with every set of kernels."""
    monkeypatch.setenv("AHN_KERNEL", allowed)
    model = with_memory(tiny(head_dim=16).cuda(), cell, window=37, sinks=sinks)
    ids = token_ids(160, batch=3).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [20, *[1] * 140]) - whole).abs().max() < 1e-4
    assert kernels_used(model) == ("graph" in allowed)


def test_decoding_with_everything(monkeypatch):
    monkeypatch.delenv("AHN_KERNEL", raising=False)
    model = with_memory(tiny("Qwen3", head_dim=16).cuda(), window=37, sinks=5)
    ids = token_ids(120, batch=2).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [20, *[1] * 100]) - whole).abs().max() < 1e-4
    assert kernels_used(model)
    assert "forward" not in vars(model.model.norm)


@pytest.mark.parametrize("form", FORMS)
def test_decoding_of_every_form(form):
    model = with_memory(tiny(head_dim=16).cuda(), window=37, sinks=5, **FORMS[form])
    ids = token_ids(120, batch=2).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [30, *[1] * 90]) - whole).abs().max() < 1e-4
    assert kernels_used(model)


def test_decoding_in_half_precision_with_grouped_heads(cell):
    shape = {"hidden_size": 256, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}
    model = with_memory(tiny("Qwen2", **shape).cuda().bfloat16(), cell, window=150, sinks=3)
    for batch in (1, 2, 3, 5):  # the last one is too many rows for `gemv`
        ids = token_ids(400, batch=batch).cuda()
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
        assert relative(in_pieces(model, ids, [100, *[1] * 300]), whole) < 0.05
        assert kernels_used(model)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_norms_sums_and_rotations_are_in_the_kernels(monkeypatch, cell, family, batch):
    """Of several tiles each; and a kernel that starts early finds the same numbers, to the last bit."""
    from ahn.ops.kernels import gemv, moves

    launched = {"norm": 0, "add": 0, "rotate": 0}
    together, rotate = gemv.together, moves.rotate

    def counted(x, layers, norm=None, normed=None, add=None):
        launched["norm"] += norm is not None
        launched["add"] += add is not None
        return together(x, layers, norm, normed, add)

    def counted_rotate(*args):
        launched["rotate"] += 1
        return rotate(*args)

    monkeypatch.setattr(gemv, "together", counted)
    monkeypatch.setattr(moves, "rotate", counted_rotate)
    monkeypatch.setattr(gemv, "PROGRAMS", 64)
    monkeypatch.setattr(gemv, "TILE", 1024)
    shape = {"hidden_size": 512, "intermediate_size": 1400, "num_attention_heads": 8, "head_dim": 64}
    base = tiny(family, **shape, initializer_range=0.015).cuda().bfloat16()
    for name, weight in base.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    model = with_memory(base, cell, window=150, sinks=3)
    ids = token_ids(400, batch=batch).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    early = in_pieces(model, ids, [100, *[1] * 300])
    assert kernels_used(model)
    assert relative(early, whole) < 0.05
    # two layers, two steps before the capture and the captured one; what a first step finds out it adds by itself
    assert launched == {"norm": 6, "add": 2 * (3 + 2), "rotate": 6}
    monkeypatch.setenv("AHN_KERNEL", "graph,gemv,triton,fla,flash,cudnn")
    model._ahn.graph = None
    assert torch.equal(in_pieces(model, ids, [100, *[1] * 300]), early)


def test_rows_at_different_positions_in_a_graph():
    model = with_memory(tiny(head_dim=16).cuda(), window=8, sinks=2)
    ids, other = token_ids(60), token_ids(45, seed=5)
    both = torch.cat([ids, torch.cat([torch.zeros(1, 15, dtype=torch.long), other], 1)]).cuda()
    mask = torch.ones_like(both)
    mask[1, :15] = 0
    with torch.no_grad():
        expected = [model(row.cuda(), use_cache=False).logits for row in (ids, other)]
    out = in_pieces(model, both, [20, *[1] * 40], mask)
    assert kernels_used(model)
    assert (out[:1] - expected[0]).abs().max() < 1e-4
    assert (out[1:, 15:] - expected[1]).abs().max() < 1e-4


def test_generate_with_and_without_a_graph(monkeypatch):
    model = with_memory(tiny(head_dim=16).cuda(), window=16, sinks=4)
    ids = token_ids(50).cuda()
    cache = ahn.read(model, ids)

    def generated(cache, **options):
        torch.manual_seed(0)
        return ahn.generate(model, ids[:, :2], cache, max_new_tokens=40, eos_token_id=None, **options)

    modes = ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 2})
    fast = [generated(cache.fork(), **options) for options in modes]
    assert kernels_used(model)
    monkeypatch.setenv("AHN_KERNEL", "torch")
    for options, found in zip(modes, fast, strict=True):
        assert torch.equal(found, generated(cache.fork(), **options))


def test_caches_take_turns_in_the_graph(tmp_path):
    model = with_memory(tiny(head_dim=16).cuda(), window=16, sinks=4)
    texts = token_ids(70, batch=2).cuda()
    with torch.no_grad():
        whole = model(texts, use_cache=False).logits
    caches = [ahn.read(model, text[:30]) for text in texts]
    for t in range(30, 60):
        for row, cache in enumerate(caches):
            with torch.no_grad():
                logits = model(texts[row : row + 1, t : t + 1], **{PAST: cache}).logits
            assert (logits[0, 0] - whole[row, t]).abs().max() < 1e-4
    for row, cache in enumerate(caches):
        cache.save(tmp_path / f"{row}.ahn")
        for one in (ahn.AHNCache.load(tmp_path / f"{row}.ahn", model), cache.fork(), cache):
            with torch.no_grad():
                rest = model(texts[row : row + 1, 60:], **{PAST: one}).logits
            assert (rest - whole[row, 60:]).abs().max() < 1e-4


def test_graphs_of_models_that_are_gone(monkeypatch):
    """Python's collector frees them, but not within the capture of another: that would end it."""

    class Collecting(torch.cuda.graph):
        def __enter__(self):
            super().__enter__()
            if gc.isenabled():
                gc.collect()

    monkeypatch.setattr(torch.cuda, "graph", Collecting)
    thresholds, ids = gc.get_threshold(), token_ids(30).cuda()
    gc.set_threshold(1 << 30)  # so that a model which is gone is still there when the next one is captured
    try:
        for _ in range(3):
            model = with_memory(tiny(head_dim=16).cuda(), window=8, sinks=2)
            in_pieces(model, ids, [20, *[1] * 10])
            assert kernels_used(model)
    finally:
        gc.set_threshold(*thresholds)
    assert gc.isenabled()


@pytest.mark.usefixtures("small_grids")
@pytest.mark.parametrize("allowed", ["graph", "graph,triton", "triton"])
@pytest.mark.parametrize(("positions", "span"), [("clipped", 1), ("absolute", 5)])
def test_decoding_with_a_store_is_the_whole_sequence(monkeypatch, store, allowed, positions, span):
    """float32, from before the store is full on, several times around the ring, with every set of kernels."""
    monkeypatch.setenv("AHN_KERNEL", allowed)
    base = tiny(head_dim=16).cuda()
    model = storing(store, base=base, window=37, sinks=5, store_size=20, sink_positions=positions, store_span=span)
    ids = token_ids(180, batch=3).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [50, *[1] * 130]) - whole).abs().max() < 1e-4
    assert kernels_used(model) == ("graph" in allowed)
    if "graph" in allowed:
        due = {False, True} if store in ("attention", "surprise") else {False}
        assert set(model._ahn.graph._captured) == due


@pytest.mark.usefixtures("small_grids")
@pytest.mark.parametrize("form", FORMS)
def test_decoding_with_a_store_of_every_form(store, form):
    model = storing(store, "deltanet", tiny(head_dim=16).cuda(), **FORMS[form])
    ids = token_ids(90, batch=2).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [31, *[1] * 59]) - whole).abs().max() < 1e-4
    assert kernels_used(model)


@pytest.mark.parametrize("store", ["recency", "random"])
def test_a_store_in_half_precision_with_grouped_heads(store):
    """Those whose scores do not depend on rounding. Places that are several blocks of the kernel."""
    shape = {"hidden_size": 256, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}
    base = tiny("Qwen2", **shape, max_position_embeddings=4096).cuda().bfloat16()
    model = storing(store, base=base, window=150, sinks=3, store_size=1472, store_span=8)
    ids = token_ids(1900, batch=2).cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert relative(in_pieces(model, ids, [1700, *[1] * 200]), whole) < 0.05
    assert kernels_used(model)


@pytest.mark.usefixtures("small_grids")
def test_rows_at_different_positions_with_a_store(store):
    model = storing(store, base=tiny(head_dim=16).cuda(), window=8, sinks=2, store_span=3)
    ids, other = token_ids(60), token_ids(45, seed=5)
    both = torch.cat([ids, torch.cat([torch.zeros(1, 15, dtype=torch.long), other], 1)]).cuda()
    mask = torch.ones_like(both)
    mask[1, :15] = 0
    with torch.no_grad():
        expected = [model(row.cuda(), use_cache=False).logits for row in (ids, other)]
    out = in_pieces(model, both, [20, *[1] * 40], mask)
    assert kernels_used(model)
    assert (out[:1] - expected[0]).abs().max() < 1e-4
    assert (out[1:, 15:] - expected[1]).abs().max() < 1e-4


@pytest.mark.usefixtures("small_grids")
def test_caches_with_a_store_take_turns_in_the_graph(store):
    """In the graph and, for several tokens at once, out of it."""
    model = storing(store, base=tiny(head_dim=16).cuda())
    texts = token_ids(90, batch=2).cuda()
    with torch.no_grad():
        whole = model(texts, use_cache=False).logits
    caches, low = [ahn.read(model, text[:30]) for text in texts], 30
    for size in [*[1] * 11, 5, *[1] * 20, 3, *[1] * 10]:
        for row, cache in enumerate(caches):
            with torch.no_grad():
                logits = model(texts[row : row + 1, low : low + size], **{PAST: cache}).logits
            assert (logits[0] - whole[row, low : low + size]).abs().max() < 1e-4
        low += size
    assert kernels_used(model)


def test_generate_with_a_store(monkeypatch):
    model = storing("attention", base=tiny(head_dim=16).cuda())
    cache = ahn.read(model, token_ids(50).cuda())

    def generated():
        return ahn.generate(model, token_ids(2).cuda(), cache.fork(), max_new_tokens=60, eos_token_id=None)

    fast = generated()
    assert kernels_used(model)
    monkeypatch.setenv("AHN_KERNEL", "torch")
    assert torch.equal(fast, generated())


def test_the_state_does_not_drift(cell):
    """A million random tokens through the chunked kernels in bfloat16, and 2,048 steps of decoding behind them, against
    the recurrence in float64 over all of the same numbers on the CPU."""
    module, states = drifting(cell, "cuda", torch.bfloat16, 2**20, 8192)
    assert relative(states["chunks"], states["exact"]) < module.tolerance[torch.bfloat16]
    assert relative(states["steps"], states["exact"]) < module.tolerance[torch.bfloat16]


@pytest.mark.parametrize(("tokens", "size"), [(96, 64), (1000, 64), (640, 128)])
def test_soft_slots(tokens, size, monkeypatch):
    """The kernel in bfloat16 against plain torch in float32, with the gradients by the gate's scores."""
    from ahn.train import gates

    q, k, v, scores, least = soft_inputs("cuda", torch.bfloat16, size, tokens)
    outs, gradients = [], []
    for dtype, kernel in ((torch.bfloat16, "triton"), (torch.float32, "torch")):
        monkeypatch.setenv("AHN_KERNEL", kernel)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        gate = scores.clone().requires_grad_()
        out = gates.attend(*leaves, gates.log_weights(gate, least, 0.4), Window(size=16, sinks=4), size**-0.5)
        (out.float() * torch.arange(1, size + 1, device="cuda")).sum().backward()
        outs.append(out)
        gradients.append([t.grad for t in (*leaves, gate)])
    assert relative(*outs) < 1e-2
    for fast, slow in zip(*gradients, strict=True):
        assert relative(fast, slow) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_is_that_of_the_cpu(dtype):
    model = with_memory(tiny(vocab_size=30_011, hidden_size=64)).to(dtype)
    model.extra = torch.nn.Parameter(torch.randn(7, dtype=dtype))
    expected = fingerprint(model)
    assert fingerprint(model.to("cuda")) == expected


def test_an_archive_takes_no_bytes_of_the_gpu():
    """Held after reading, at most while asking, and held after that."""
    from ahn.memory.head_keys import RetrievalHeads
    from tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = with_memory(tiny(vocab_size=len(tokenizer)).cuda(), window=256)
    scales = torch.stack([torch.zeros(1, 8), torch.full((1, 8), 0.05)])
    model.ahn_retrieval = RetrievalHeads(((0, 1),), 2, {0: scales})
    options = {"max_new_tokens": 4, "do_sample": False}
    found = {}
    for kind in ("keys", "none", "text", "keys"):  # the first time kernels are built and graphs captured
        gc.collect()
        before = torch.cuda.memory_allocated()
        memory = ahn.read(model, token_ids(3000), archive=kind)
        held = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        ahn.ask(model, tokenizer, memory, "Where is the cat?", 0, **options)
        peak = torch.cuda.max_memory_allocated() - before
        if kind == "keys":
            assert ahn.ask(model, tokenizer, memory, "Where is the cat?", 200, finder="heads", **options).sources
        gc.collect()
        found[kind] = held, peak, torch.cuda.memory_allocated() - before
        del memory
    assert found["none"] == found["text"] == found["keys"]


def test_passages_of_heads_are_those_of_the_cpu():
    from ahn.recall.finders.heads import by_passage

    q = torch.randn(32, 128) / 300  # the keys are many blocks, so both buffers are filled again
    keys = torch.randint(-127, 128, (200_000, 128), dtype=torch.int8)
    keys[100:300, 0] = -128
    bounds = torch.tensor([*range(0, 200_000, 83), 200_000])
    ours, theirs = (by_passage(q.to(device), keys, bounds).cpu().mean(0) for device in ("cuda", "cpu"))
    assert (ours - theirs).abs().max() < 0.05 * theirs.max()
