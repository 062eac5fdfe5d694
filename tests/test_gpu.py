"""What only a GPU can show: flash-linear-attention against the naive forms, and the whole model on CUDA."""

import pytest
import torch

import ahn
from ahn import kernels
from ahn.augmentation import layers_of, set_window
from ahn.cells.base import unit
from ahn.train import distill
from ahn.train.trainer import compile_layers
from conftest import FORMS, golden_base, golden_tensors, in_pieces, tiny, token_ids, with_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 777])
def test_scan_is_the_naive_form(cell, tokens, dtype):
    torch.manual_seed(tokens)
    module = ahn.cells.get(cell)(256, 4, 64, dtype, "cuda")
    q, k, v = torch.randn(3, 2, 4, tokens, 64, device="cuda", dtype=dtype).unbind(0)
    x = torch.randn(2, tokens, 256, device="cuda", dtype=dtype)
    state = torch.randn(2, 4, 64, 64, device="cuda") / 8
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


def test_kernel_choice_is_visible():
    rows = {operation: kernel for operation, kernel, _ in kernels.report()}
    assert set(rows.values()) <= {"fla", "torch", "torch flash", "torch flex"}


@pytest.fixture
def exact_afterwards():
    yield
    torch.set_float32_matmul_precision("highest")  # training lowers it for its process


def test_the_compiled_training_step(cell, exact_afterwards):
    """The same loss and gradients as the plain step, in bfloat16, for windows that were not there when it compiled."""
    sizes, length = [(90, 30), (150, 7), (40, 60)], 384

    def gradients(compiled):
        torch._dynamo.reset()
        model = with_memory(tiny(head_dim=64).cuda().bfloat16(), cell, **FORMS["maps"])
        for layer in layers_of(model):
            layer.cell.float()
        if compiled:
            compile_layers(model)
        found = []
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
