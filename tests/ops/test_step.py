"""The Triton kernels of one token against plain torch: on CUDA, or interpreted on a CPU (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

import ahn
from ahn.cells.modules import unit
from ahn.engine import fuse
from ahn.engine.graph import DecodeBatch, Kind
from ahn.memory.batch import ForwardBatch, LayerBatch
from ahn.memory.evicted import Evictions
from ahn.memory.handle import layers_of
from ahn.ops import dispatch
from ahn.ops.banded import attend_one
from ahn.ops.dispatch import Kernel
from ahn.ops.rotary import Rotary
from ahn.ops.specs import Queries, Write
from conftest import FORMS, in_pieces, storing, tiny, token_ids, with_memory

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)
from ahn.ops.kernels import decode, moves  # noqa: E402 - Triton looks at its environment when the kernels are defined

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if CUDA else torch.float16]  # the interpreter multiplies no bfloat16
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture
def plain(monkeypatch):
    """AHN_KERNEL for the references."""
    monkeypatch.setenv("AHN_KERNEL", "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (14, 2, 64), (3, 3, 80)])
@pytest.mark.parametrize(
    ("slots", "sinks", "last"), [(1, 0, 0), (7, 3, 1), (200, 5, 150), (333, 130, 400), (333, 0, None), (129, 128, 127)]
)
def test_attention(plain, slots, sinks, last, heads, kv_heads, size, dtype):
    torch.manual_seed(slots)
    batch = 2
    q, q_sinks = torch.randn(2, batch, 1, heads, size, device=DEVICE).to(dtype).transpose(2, 3)
    k, v = torch.randn(2, batch, kv_heads, slots + 5, size, device=DEVICE).to(dtype)[..., :slots, :]  # of a larger one
    for positions in ([last], [last, max(0, (last or 0) - 3)]):
        at = None if last is None else torch.tensor(positions, device=DEVICE)
        filled = at.new_tensor([slots - 1]) if at is not None else None
        out, lse = decode.attend(Queries(q, q_sinks, size**-0.5), k, v, sinks, at)
        at = None if at is None else at.minimum(filled)
        expected = attend_one(Queries(q.float(), q_sinks.float(), size**-0.5), k.float(), v.float(), sinks, at)
        assert relative(out, expected[0]) < LIMIT[dtype]
        assert relative(lse, expected[1]) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (3, 3, 80)])
@pytest.mark.parametrize("writes", [None, [False], [True, False, True]], ids=str)
def test_cell(plain, cell, heads, kv_heads, size, writes, dtype):
    """Steps in a row, so that an error of the state would add up."""
    torch.manual_seed(size)
    batch, hidden = 3, 24
    module = ahn.cells.get(cell)(hidden, heads, size, dtype, DEVICE)
    torch.nn.init.normal_(module.o_proj.weight, std=size**-0.5)
    form = module.step_form()
    able = None if writes is None else torch.tensor(writes, device=DEVICE)[:, None]
    evictions = Evictions(able, torch.ones(1, 1, device=DEVICE), torch.tensor(1), None)
    state = torch.randn(batch, heads, size, size, device=DEVICE) / 4
    expected_state = state.clone()
    for _ in range(50 if CUDA else 2):
        x = torch.randn(2, batch, 1, hidden, device=DEVICE).to(dtype)
        q = torch.randn(batch, heads, 1, size, device=DEVICE).to(dtype)
        k, v = torch.randn(2, batch, kv_heads, 1, size, device=DEVICE).to(dtype)
        out = torch.randn(batch, 1, heads, size, device=DEVICE).to(dtype)
        with torch.no_grad():
            inputs = module.gate_inputs(x[0])
            read = decode.recur(form, q, Write(k, v, inputs, able), state, unit=True)
            added = decode.add_read(form, out, read, module.g_proj(x[1]), module.o_proj.weight, able)
            gates = module.gates(inputs)
            gates = gates if able is None else tuple(gate * able[:, None] for gate in gates)
            groups = heads // kv_heads
            keys, values = (t.repeat_interleave(groups, 1) for t in (k, v))
            expected_read = module.step(unit(q), unit(keys), values.float(), gates, expected_state)
            expected = module.combine(out, out, expected_read, x[1], evictions.total)
            expected = expected if able is None else torch.where(able[..., None, None], expected, out)
        assert relative(state, expected_state) < 1e-5
        assert relative(read, expected_read[:, :, 0]) < 1e-5
        assert relative(added, expected) < LIMIT[dtype]


@pytest.mark.parametrize(("slots", "size"), [(5, 8), (333, 80)])
def test_merge_beside_the_recurrence(cell, slots, size):
    """The same as one after the other."""
    torch.manual_seed(size)
    module = ahn.cells.get(cell)(24, 4, size, device=DEVICE)
    q = torch.randn(2, 4, 1, size, device=DEVICE)
    k, v = torch.randn(2, 2, 2, slots, size, device=DEVICE)
    state = torch.randn(2, 4, size, size, device=DEVICE)
    inputs = torch.randn(2, 1, module.num_gates * 4, device=DEVICE)
    arguments = (module.step_form(), q, Write(k[:, :, :1], v[:, :, :1], inputs, None))
    expected, expected_state = decode.attend(Queries(q, q, 0.1), k, v, 3, None), state.clone()
    expected_read = decode.recur(*arguments, expected_state, True)
    parts = decode.attend_parts(Queries(q, q, 0.1), k, v, 3, None)
    read = decode.recur(*arguments, state, True, parts)
    pairs = zip((parts.out, parts.lse, read, state), (*expected, expected_read, expected_state), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("features", [16, 40])
def test_more_features_than_channels(plain, features):
    """Queries and keys as learned maps give them."""
    torch.manual_seed(0)
    module = ahn.cells.get("gated_deltanet")(24, 4, 8, device=DEVICE)
    x = torch.randn(2, 1, 24, device=DEVICE)
    q, k = torch.randn(2, 2, 4, 1, features, device=DEVICE)
    v = torch.randn(2, 2, 1, 8, device=DEVICE)
    state = torch.randn(2, 4, features, 8, device=DEVICE)
    expected_state = state.clone()
    with torch.no_grad():
        inputs = module.gate_inputs(x)
        read = decode.recur(module.step_form(), q, Write(k, v, inputs, None), state, unit=False)
        values = v.repeat_interleave(2, 1)
        expected = module.step(q, k, values, module.gates(inputs), expected_state)
    assert relative(read, expected[:, :, 0]) < 1e-5
    assert relative(state, expected_state) < 1e-5


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("form", [{}, FORMS["maps"]], ids=str)
def test_whole_model(cell, form, sinks):
    """Token by token, before and after the first one leaves, two rows of one length."""
    model = with_memory(tiny(), cell, window=9, sinks=sinks, **form).to(DEVICE)
    ids = token_ids(24, batch=2).to(DEVICE)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [6, *[1] * 18]) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "rows", "more_rows"), [(8, 1, 1), (80, 2, 2), (80, 2, 1), (8, 1, 0)])
def test_rotation(size, rows, more_rows, dtype):
    """As the base rotates, and as the queries are rotated for the sinks after it; parts of a larger tensor."""
    torch.manual_seed(size)
    model = tiny(head_dim=size).to(DEVICE)
    attention = model.model.layers[0].self_attn
    rotary = Rotary(model.model, attention)
    q, k, _ = torch.randn(2, 1, 7, size, device=DEVICE).to(dtype).transpose(1, 2).split([4, 2, 1], 1)
    angles = model.model.rotary_emb(q, torch.tensor([[5], [9]], device=DEVICE)[:rows])
    further = rotary.angles(torch.tensor([[-3], [-700]], device=DEVICE)[:more_rows]) if more_rows else None
    rotated = moves.rotate(q, k, angles, further)
    expected = rotary.apply(q.float(), k.float(), *(t.float() for t in angles))
    assert relative(rotated[0], expected[0]) < LIMIT[dtype]
    assert relative(rotated[1], expected[1]) < LIMIT[dtype]
    twice = expected[0] if further is None else rotary.rotate(expected[0], further)
    assert relative(rotated[2], twice) < LIMIT[dtype]


@pytest.mark.parametrize("positions", ["clipped", "absolute"])
@pytest.mark.parametrize(("family", "launches"), [("Qwen3", 1), ("Cohere", 0)])
def test_rotated_within(plain, monkeypatch, family, launches, positions):
    """One launch a layer, in the place of the base's function; not of a base that rotates neighbours."""
    count, kernel = [], moves.rotate
    monkeypatch.setattr(moves, "rotate", lambda *args: count.append(args[3] is not None) or kernel(*args))
    model = with_memory(tiny(family), window=5, sinks=3, sink_positions=positions).to(DEVICE)
    before = [dict(vars(module)) for module in model.modules()]
    ids = token_ids(14, batch=2).to(DEVICE)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    with fuse.fused_rotation(model.model):
        assert (in_pieces(model, ids, [6, *[1] * 8]) - whole).abs().max() < 1e-4
    assert len(count) == launches * 2 * 8
    assert sum(count) == (launches * 2 * 5 if positions == "clipped" else 0)  # once the sinks are further away
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("positions", [[0], [2], [3], [11], [40, 5]], ids=str)
@pytest.mark.parametrize(("cell_name", "window"), [("gated_deltanet", 9), (None, 9), ("deltanet", None)], ids=str)
def test_exchange(cell_name, window, positions):
    """The same buffers and the same old token as by plain torch."""
    torch.manual_seed(0)
    model = with_memory(tiny(), cell_name, window=9, sinks=3, layers=[1] if window is None else None).to(DEVICE)
    plain, fused = (ahn.AHNCache(model).layers[0] for _ in range(2))
    k, v = torch.randn(2, 2, 1, 2, 8, device=DEVICE).transpose(2, 3)
    width = plain.gate_width
    inputs = torch.randn(2, 1, width, device=DEVICE) if width else None
    for memory in (plain, fused):
        memory.reserve(50, k, (4, 8, 8) if width else None)
        for number, tensor in enumerate(memory.tensors.values()):
            tensor.copy_(torch.arange(tensor.numel(), device=DEVICE).view_as(tensor) + number)
    start = torch.tensor(positions, device=DEVICE)
    expected = plain.exchange(plain.slots(start), k, v, inputs, old=True)
    found = moves.exchange(fused, start, k, v, inputs)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in fused.tensors.items())


ROTATIONS = [{}, {"memory_positions": "none"}, {"sink_positions": "absolute"}]
ROTATIONS.append(ROTATIONS[1] | ROTATIONS[2])


@pytest.mark.parametrize("positions", [[0], [11], [29], [40, 33]], ids=str)
@pytest.mark.parametrize(
    ("cell_name", "span", "size"), [("gated_deltanet", 1, 5), ("mamba2", 4, 70), (None, 3, 3), (None, 1, 1)]
)
@pytest.mark.parametrize("form", ROTATIONS, ids=str)
def test_displace(plain, monkeypatch, cell_name, span, size, positions, form):
    """Several tokens one after the other, with priorities that tie: the same evicted tokens and the same store."""
    torch.manual_seed(0)
    settings = {"window": 9, "sinks": 3, "store_size": size, "store_span": span} | (form if cell_name else {})
    model = storing("recency", cell_name, **settings).to(DEVICE)
    layer, *_ = layers_of(model)
    rotary = layer.positions.rotary
    assert rotary is None or rotary.frequencies is not None
    memories = [ahn.AHNCache(model).layers[0] for _ in range(2)]
    width = memories[0].gate_width
    for memory in memories:
        memory.reserve(50, torch.zeros(2, 2, 1, 8, device=DEVICE), (4, 8, 8) if width else None)
    for step_number in range(6):
        start = torch.tensor(positions, device=DEVICE) + step_number
        scores = torch.randint(-2, 3, memories[0].scores.shape, device=DEVICE) / -2  # both zeros among them
        k, v = torch.randn(2, 2, 1, 2, 8, device=DEVICE).transpose(2, 3)
        pushed = (k, v, torch.randn(2, 1, width, device=DEVICE)) if width else (k, v)
        for memory in memories:
            memory.scores.copy_(scores)
        expected = layer.kept.displace(pushed, ForwardBatch(start.cpu(), 1, [1] * len(start)), memories[0])
        found = layer.kept.displace_fused(pushed, DecodeBatch(start, Kind(periodic=False, filling=False)), memories[1])
        assert torch.allclose(found[0], expected[0], atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))
        for name, tensor in memories[1].tensors.items():
            same = torch.allclose if name == "keys" else torch.equal
            assert same(tensor, memories[0].tensors[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [[0], [5000], [40, 33]], ids=str)
def test_put_score(plain, positions, dtype):
    model = storing("learned", None, window=9, sinks=3, store_size=5).to(DEVICE)
    layer, *_ = layers_of(model)
    memories = [ahn.AHNCache(model).layers[0] for _ in range(2)]
    for memory in memories:
        memory.reserve(50, torch.zeros(2, 2, 1, 8, device=DEVICE), None)
    start, x = torch.tensor(positions, device=DEVICE), torch.randn(2, 1, 32, device=DEVICE).to(dtype)
    step = DecodeBatch(start, Kind(periodic=False, filling=False))
    k = torch.zeros(2, 2, 1, 8, device=DEVICE)
    memories[0].put_score(step, layer.kept.score(LayerBatch(step, k, k, k, x, 1.0), None))
    moves.put_score(layer.store.gate_form(), memories[1], start, x)
    assert (memories[0].scores != 0).sum() == 4
    assert torch.allclose(memories[1].scores, memories[0].scores, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_grids")
@pytest.mark.parametrize("form", [{}, FORMS["maps"]], ids=str)
def test_whole_model_with_a_store(monkeypatch, store, form):
    """Token by token as in a graph, from where the store is full on."""
    monkeypatch.setattr(dispatch, "pick_decoding", lambda device: Kernel("graph", "here as well"))
    model = storing(store, window=9, sinks=3, store_size=4, store_span=2, **form).to(DEVICE)
    ids = token_ids(30, batch=2).to(DEVICE)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [14, *[1] * 16]) - whole).abs().max() < 1e-4
    assert model._ahn.graph is not None
