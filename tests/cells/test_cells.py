"""The contract of every cell in the registry: three forms that agree, gradients, zero gates that do nothing."""

from pathlib import Path

import pytest
import torch

import ahn
from ahn.cells.modules import unit
from ahn.ops import chunked
from conftest import CELLS, drifting
from toy import Toy

HEADS, SIZE, HIDDEN = 3, 8, 24
LENGTHS = (1, 63, 64, 65, 150)


ahn.cells.register("toy", Toy)


@pytest.fixture(params=sorted({*ahn.cells.names(), "toy"}))
def cell(request):
    torch.manual_seed(0)
    cell = ahn.cells.get(request.param)(HIDDEN, HEADS, SIZE)
    torch.nn.init.normal_(cell.o_proj.weight)
    return cell


def inputs(cell, tokens, batch=2, grad=False):
    torch.manual_seed(tokens)
    x = torch.randn(batch, tokens, HIDDEN)
    q, k, v = torch.randn(3, batch, HEADS, tokens, SIZE).unbind(0)
    state = torch.randn(batch, HEADS, SIZE, SIZE)
    leaves = [x, q, k, v, state]
    return [leaf.requires_grad_(grad) for leaf in leaves]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_contract_covers_the_registry():
    files = {path.stem for path in Path(ahn.cells.__file__).parent.glob("*.py")} - {"__init__", "base", "modules"}
    assert set(CELLS) <= files <= set(ahn.cells.names())


@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunk_and_step_are_the_naive_form(cell, tokens):
    x, q, k, v, state = inputs(cell, tokens)
    q, k = unit(q), unit(k)
    gates = cell.gates(cell.gate_inputs(x))
    read, after = cell.naive(q, k, v, gates, state)
    limit = cell.tolerance[torch.float32]

    chunk_read, chunk_after = cell.chunk(q, k, v, gates, state)
    assert relative(chunk_read, read) < limit
    assert relative(chunk_after, after) < limit

    step_after = state.clone()
    at = [slice(t, t + 1) for t in range(tokens)]
    steps = [cell.step(q[:, :, t], k[:, :, t], v[:, :, t], tuple(g[:, :, t] for g in gates), step_after) for t in at]
    assert relative(torch.cat(steps, 2), read) < limit
    assert relative(step_after, after) < limit


@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_gradient_of_the_chunk_form(cell, tokens):
    def gradients(form):
        cell.zero_grad()
        x, q, k, v, state = leaves = inputs(cell, tokens, grad=True)
        read, after = getattr(cell, form)(unit(q), unit(k), v, cell.gates(cell.gate_inputs(x)), state)
        torch.manual_seed(9)
        loss = (cell.output(read, x) * torch.randn(2, tokens, HEADS, SIZE)).sum() + (
            after * torch.randn_like(after)
        ).sum()
        loss.backward()
        return {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)} | {
            n: p.grad for n, p in cell.named_parameters()
        }

    naive, chunk = gradients("naive"), gradients("chunk")
    for name, gradient in naive.items():
        assert relative(chunk[name], gradient) < 1e-4, name


def test_delta_rule_over_groups_of_groups_of_blocks():
    torch.manual_seed(0)
    tokens, size = 64 * 8 * 8 + 65, 4
    q, k, v = torch.randn(3, 1, 1, tokens, size).unbind(0)
    cell = ahn.cells.get("gated_deltanet")(8, 1, size)
    gates = torch.rand(1, 1, tokens), -torch.rand(1, 1, tokens) / 100
    state = torch.randn(1, 1, size, size)
    for fast, naive in zip(
        cell.chunk(unit(q), unit(k), v, gates, state), cell.naive(unit(q), unit(k), v, gates, state), strict=True
    ):
        assert (fast - naive).norm() / naive.norm() < 1e-5


def test_mamba2_over_more_blocks_than_are_summed_at_once():
    cell = ahn.cells.get("mamba2")(HEADS * SIZE, HEADS, SIZE)
    tokens = chunked.BLOCK * (2 * chunked.BLOCKS + 1) + 5
    x, q, k, v, state = inputs(cell, tokens)
    gates = cell.gates(cell.gate_inputs(x))
    with torch.no_grad():
        read, after = cell.naive(unit(q), unit(k), v, gates, state)
        fast_read, fast_after = cell.chunk(unit(q), unit(k), v, gates, state)
    assert relative(fast_read, read) < 1e-5
    assert relative(fast_after, after) < 1e-5


def test_zero_gates_change_nothing(cell):
    x, q, k, v, state = inputs(cell, 10)
    gates = tuple(torch.zeros_like(g) for g in cell.gates(cell.gate_inputs(x)))
    for form in (cell.naive, cell.chunk):
        torch.testing.assert_close(form(unit(q), unit(k), v, gates, state)[1], state)


def test_strong_decay_over_many_tokens_stays_finite():
    cell = ahn.cells.get("gated_deltanet")(HIDDEN, HEADS, SIZE)
    _, q, k, v, state = inputs(cell, 300)
    gates = torch.rand(2, HEADS, 300), torch.full((2, HEADS, 300), -30.0)
    read, after = cell.chunk(unit(q), unit(k), v, gates, state)
    expected = cell.naive(unit(q), unit(k), v, gates, state)
    assert read.isfinite().all()
    assert after.isfinite().all()
    assert relative(read, expected[0]) < 1e-5


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gated_deltanet", lambda d, n, h: 3 * d * n + h * h * n + 2 * n + h),
        ("deltanet", lambda d, n, h: 2 * d * n + h * h * n + h),
        ("mamba2", lambda d, n, h: 2 * d * n + h * h * n + 4 * n + n * h),
    ],
)
def test_number_of_parameters(name, count):
    # Gated DeltaNet: the paper's 3N counts the authors' unused D, which we do not keep
    parameters = sum(p.numel() for p in ahn.cells.get(name)(HIDDEN, HEADS, SIZE).parameters())
    assert parameters == count(HIDDEN, HEADS, SIZE)


def test_an_untrained_cell_adds_nothing():
    for name in ahn.cells.names():
        cell = ahn.cells.get(name)(HIDDEN, HEADS, SIZE)
        x, q, *_ = inputs(cell, 5)
        assert cell.output(q, x).abs().max() == 0


def test_unknown_name_says_what_was_meant():
    with pytest.raises(ahn.errors.ConfigError, match=r"gated_deltanets.*did you mean 'gated_deltanet'"):
        ahn.AHNConfig(cell="gated_deltanets")


def test_a_cell_from_an_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint("toy_from_elsewhere", f"{__name__}:Toy", "ahn.cells")
    monkeypatch.setattr("ahn.registry.entry_points", lambda group: [point] if group == "ahn.cells" else [])
    assert "toy_from_elsewhere" in ahn.cells.names()
    assert ahn.cells.get("toy_from_elsewhere").name == "toy"
    assert ahn.AHNConfig(cell="toy_from_elsewhere").cell == "toy_from_elsewhere"


@pytest.mark.parametrize("cell", sorted(CELLS))
def test_the_state_does_not_drift(cell):
    """In small, in float32; `test_gpu.py` has a million tokens."""
    _, states = drifting(cell, "cpu", torch.float32, 2**14, 2**11, steps=200)
    for way in ("chunks", "steps"):
        assert ((states[way] - states["exact"]).norm() / states["exact"].norm()).item() < 1e-4
