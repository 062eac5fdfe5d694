"""Few vectors times the base's matrices, in Triton, against plain linear layers: on CUDA, or interpreted on a CPU."""

import os
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ahn.engine import compile as compiling
from ahn.engine import fuse, probe
from conftest import in_pieces, storing, tiny, token_ids, with_memory

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)
from ahn.ops.kernels import gemv  # noqa: E402 - Triton looks at its environment when the kernels are defined

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if CUDA else torch.float16]  # the interpreter multiplies no bfloat16
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def weigh_norms(model):
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)


def blocks(model):
    """By layer, whether norms and sums are part of the products."""
    forwards = [vars(layer).get("forward") for layer in model.model.layers]
    return [forward is not None and forward.__self__.ends for forward in forwards]


@pytest.fixture
def multiplied(monkeypatch):
    """Counts the launches, which are of few programs: those are interpreted one after the other. No graphs, no other
    kernels."""
    monkeypatch.setenv("AHN_KERNEL", "gemv")
    monkeypatch.setattr(gemv, "PROGRAMS", 8)
    counts = {"together": 0, "gated": 0}
    for name in counts:
        kernel = getattr(gemv, name)

        def counted(*args, kernel=kernel, name=name, **kwargs):
            counts[name] += 1
            return kernel(*args, **kwargs)

        monkeypatch.setattr(gemv, name, counted)
    return counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("programs", [2, 512])
@pytest.mark.parametrize(("length", "rows"), [(24, (5, 3, 1)), (130, (9,))])
def test_products(monkeypatch, length, rows, programs, vectors, dtype):
    """Of matrices with and without biases, by programs of one row and of several, in one tile and in several."""
    torch.manual_seed(length)
    monkeypatch.setattr(gemv, "PROGRAMS", programs)
    monkeypatch.setattr(gemv, "TILE", 256)
    x = torch.randn(vectors, 1, length, device=DEVICE).to(dtype)
    layers = [nn.Linear(length, count, bias=i % 2 == 0, device=DEVICE).to(dtype) for i, count in enumerate(rows)]
    with torch.no_grad():
        exact = [F.linear(x.float(), m.weight.float(), None if m.bias is None else m.bias.float()) for m in layers]
        assert relative(gemv.together(x, layers), torch.cat(exact, -1)) < LIMIT[dtype]
        up = nn.Linear(length, rows[0], device=DEVICE).to(dtype)
        expected = F.silu(exact[0]) * F.linear(x.float(), up.weight.float(), up.bias.float())
        assert relative(gemv.gated(x, layers[0], up), expected) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vectors", "programs", "length"), [(1, 2, 130), (3, 512, 24), (2, 8, 600)])
def test_with_a_norm_before_and_a_sum_behind(monkeypatch, length, programs, vectors, dtype):
    """And the normalised vectors, written by more tiles than there are programs and by fewer."""
    torch.manual_seed(length)
    monkeypatch.setattr(gemv, "PROGRAMS", programs)
    monkeypatch.setattr(gemv, "TILE", 256)
    x = torch.randn(vectors, 1, length, device=DEVICE).to(dtype) / 50
    norm = gemv.Norm(torch.rand(length, device=DEVICE).to(dtype) + 0.5, 1e-4)
    layers = [nn.Linear(length, count, bias=count == 2, device=DEVICE).to(dtype) for count in (1, 2)]
    add, normed = torch.randn(vectors, 1, 3, device=DEVICE).to(dtype), torch.empty_like(x)
    with torch.no_grad():
        exact = F.rms_norm(x.float(), (length,), norm.weight.float(), norm.epsilon)
        expected = [F.linear(exact, m.weight.float(), None if m.bias is None else m.bias.float()) for m in layers]
        found = gemv.together(x, layers, norm, normed, add)
        assert relative(found, torch.cat(expected, -1) + add.float()) < LIMIT[dtype]
        assert relative(normed, exact) < LIMIT[dtype]
        up = nn.Linear(length, 2, bias=False, device=DEVICE).to(dtype)
        expected = F.silu(expected[1]) * F.linear(exact, up.weight.float())
        assert relative(gemv.gated(x, layers[1], up, norm), expected) < LIMIT[dtype]


@pytest.mark.parametrize(
    ("family", "cell_name", "batch", "launches"),
    [
        ("Llama", "gated_deltanet", 1, (3, 1)),
        ("Qwen2", "mamba2", 3, (3, 1)),
        ("Qwen3", "deltanet", 1, (3, 1)),
        ("Phi3", "gated_deltanet", 2, (2, 0)),
    ],
)
def test_whole_model(multiplied, family, cell_name, batch, launches):
    """Token by token; as many launches a layer as expected. Phi3 has one matrix for gate and up, which stays, and so
    do norms and sums."""
    model = with_memory(tiny(family), cell_name, window=5, sinks=3).to(DEVICE)
    weigh_norms(model)
    ids = token_ids(12, batch=batch).to(DEVICE)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    before = [dict(vars(module)) for module in model.modules()]
    with fuse.products(model.model):
        assert (in_pieces(model, ids, [7, *[1] * 5]) - whole).abs().max() < 1e-4
        assert blocks(model) == [family != "Phi3"] * 2
    together, gated = launches
    assert multiplied == {"together": together * 2 * 5, "gated": gated * 2 * 5}
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize(("family", "left"), [("Qwen2", 0), ("Qwen3", 2 * 2 + 1), ("Phi3", 2 * 3 + 1)])
def test_what_is_compiled_besides(monkeypatch, family, left):
    """Norms on heads, or all of a layer that is no block; the last norm alone is not worth it. Where nothing is left
    the compiler, which takes seconds to be imported, is not asked."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(function) or function)
    model, ids = with_memory(tiny(family), window=9, sinks=3).to(DEVICE), token_ids(2).to(DEVICE)
    decoder = model.model
    with fuse.products(decoder), fuse.fused_rotation(decoder), compiling.compiled(decoder):
        in_pieces(model, ids, [1, 1])
        assert bool(asked) == bool(left)
        forwards = {m: vars(m).get("forward") for m in decoder.modules() if m is not decoder}
        assert sum(isinstance(f, MethodType) and f.__self__ is m for m, f in forwards.items()) == left


def test_without_a_cell_and_with_a_store(monkeypatch, multiplied):
    """What the other kernels are given are views of one tensor."""
    monkeypatch.setenv("AHN_KERNEL", "gemv,triton")
    ids = token_ids(24).to(DEVICE)
    for model in (with_memory(tiny(), None, window=9), storing("recency", window=9, store_size=4)):
        model.to(DEVICE)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
        with fuse.products(model.model):
            assert (in_pieces(model, ids, [18, *[1] * 6]) - whole).abs().max() < 1e-4
    assert multiplied["gated"] == 2 * 2 * 6


def test_what_does_not_fit_is_left(multiplied):
    """Another activation, a hook, another forward, more rows than are few: each as before."""
    model = with_memory(tiny(hidden_act="gelu"), window=9, sinks=3).to(DEVICE)
    first, second = model.model.layers
    first.self_attn.o_proj.register_forward_hook(lambda module, args, out: None)
    second.self_attn.k_proj.forward = second.self_attn.k_proj.forward
    ids = token_ids(20).to(DEVICE)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    with fuse.products(model.model):
        assert "forward" not in vars(first.mlp) and "forward" not in vars(first.self_attn.o_proj)
        assert (in_pieces(model, ids, [11, *[1] * 9]) - whole).abs().max() < 1e-4
    assert multiplied == {"together": 3 * 9, "gated": 0}
    five = token_ids(12, batch=5).to(DEVICE)
    with fuse.products(model.model), torch.no_grad():
        in_pieces(model, five, [11, 1])
    assert multiplied["together"] == 3 * 9


def test_layers_of_another_form(multiplied, monkeypatch):
    """A residual that is scaled, a norm with another weight, or one that is watched: nothing is left out."""
    for family, changes in (
        ("Granite", {"residual_multiplier": 0.5}),
        ("Gemma", {"hidden_act": "silu", "head_dim": 8}),
        ("Llama", {}),
    ):
        model = with_memory(tiny(family, **changes), window=9, sinks=3).to(DEVICE)
        weigh_norms(model)
        for layer in model.model.layers if family == "Llama" else ():
            layer.input_layernorm.register_forward_hook(lambda module, args, out: out / 2)
        ids = token_ids(13).to(DEVICE)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
        with fuse.products(model.model):
            assert (in_pieces(model, ids, [11, 1, 1]) - whole).abs().max() < 1e-4
            assert blocks(model) == [False, False]
            assert "forward" in vars(model.model.layers[0].self_attn.o_proj)


def test_what_the_usual_layer_is(monkeypatch):
    """Nothing else is done with its parts, and attention is given all that the layer is."""
    layer = tiny().model.layers[0]
    assert probe.is_block(layer)
    plain = type(layer).forward
    others = (
        lambda self, x, **kwargs: 2 * plain(self, x, **kwargs),
        lambda self, x, **kwargs: plain(self, 2 * x, **kwargs),
        lambda self, x, **kwargs: plain(self, x),
        lambda self, x, **kwargs: (plain(self, x, **kwargs),),
    )
    for other in others:
        monkeypatch.setattr(type(layer), "forward", other)
        assert not probe.is_block(layer)


def test_attention_that_does_not_end_with_its_product(multiplied, monkeypatch):
    """The sum is then made behind it, by the rest of the layer; the first step shows it."""
    model = with_memory(tiny(), window=9, sinks=3).to(DEVICE)
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward

    def halved(self, *args, **kwargs):
        out, weights = plain(self, *args, **kwargs)
        return out / 2, weights

    monkeypatch.setattr(attention, "forward", halved)
    ids = token_ids(14).to(DEVICE)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    with fuse.products(model.model):
        assert (in_pieces(model, ids, [11, *[1] * 3]) - whole).abs().max() < 1e-4
        assert blocks(model) == [False, False]
    assert multiplied == {"together": 3 * 2 * 3, "gated": 2 * 3}
