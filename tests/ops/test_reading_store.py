"""The Triton kernels of reading with a store against plain torch: on CUDA, or interpreted on a CPU
(TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from ahn.ops import dispatch, eviction
from ahn.ops.banded import attend_window
from ahn.ops.ranks import empty_ranks
from ahn.ops.rotary import Rotary
from ahn.ops.softmax import attend
from ahn.ops.specs import KeptKeys, Queries, Window
from conftest import STORES, in_pieces, storing, tiny, token_ids, with_memory

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)
# Triton looks at its environment when the kernels are defined
from ahn.ops.kernels import banded  # noqa: E402
from ahn.ops.kernels import eviction as triton_eviction  # noqa: E402
from ahn.ops.kernels import rotary as triton_rotary  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if CUDA else torch.float16]  # the interpreter multiplies no bfloat16
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture
def plain(monkeypatch):
    """AHN_KERNEL for the references."""
    monkeypatch.setenv("AHN_KERNEL", "torch")


@pytest.mark.parametrize("slots", [1, 3, 100, *([1500, 24_000] if CUDA else [])])
@pytest.mark.parametrize("steps", [1, 64, 65, 200, *([4096] if CUDA else [])])
def test_eviction(plain, slots, steps):
    generator = torch.Generator().manual_seed(slots * steps)

    def some(first, count):  # many ties, and steps without a newcomer
        priority = torch.randint(-4, 5, (2, 3, count), generator=generator).float()
        real = torch.rand(2, count, generator=generator) < 0.9
        return eviction.rank(priority, first + torch.arange(count)[None], real).to(DEVICE)

    empty = empty_ranks(2, 3, slots, torch.device(DEVICE))
    before, new = eviction.evict(empty, some(0, 50)).ranks, some(50, steps)
    for ranks in (before, before[:, :, ::2].repeat_interleave(2, -1)[..., :slots] if steps == 1 else before):
        expected, found = eviction.evict(ranks, new), triton_eviction.evict(ranks, new)
        if ranks is before:
            assert torch.equal(found.evicted, expected.evicted)
        assert torch.equal(found.evicted_ranks, expected.evicted_ranks)
        assert torch.equal(found.ranks.sort(-1).values, expected.ranks.sort(-1).values)
        assert torch.equal(torch.cat([ranks, new], -1).gather(-1, found.kept), found.ranks)


def test_contest_in_parts(plain, monkeypatch):
    """More steps than are resolved together."""
    torch.manual_seed(0)
    positions, real = torch.arange(150, device=DEVICE)[None], torch.ones(1, 150, dtype=torch.bool, device=DEVICE)
    ranks = eviction.rank(torch.randn(2, 3, 150, device=DEVICE), positions, real)
    before, new = ranks[..., :50].contiguous(), ranks[..., 50:].contiguous()
    expected = eviction.evict(before, new)
    monkeypatch.delenv("AHN_KERNEL")
    monkeypatch.setattr(triton_eviction, "at_once", lambda ranks: 32)
    found = eviction.evict(before, new)
    assert torch.equal(found.evicted, expected.evicted)
    assert torch.equal(found.evicted_ranks, expected.evicted_ranks)
    assert torch.equal(torch.cat([before, new], -1).gather(-1, found.kept), found.ranks)
    assert torch.equal(found.ranks.sort(-1).values, expected.ranks.sort(-1).values)


def test_rank(plain):
    torch.manual_seed(0)
    priority = torch.randn(2, 3, 77, device=DEVICE)
    priority[:, :, :5] = torch.tensor([0.0, -0.0, 1e-40, -1e30, 3e38])
    for rows in (1, 2):
        positions = torch.randint(1 << 20, (rows, 77), device=DEVICE)
        real = torch.rand(rows, 77, device=DEVICE) < 0.7
        expected = eviction.rank(priority, positions, real)
        assert torch.equal(triton_eviction.rank(priority, positions, real), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 2, 8), (14, 2, 64), (3, 3, 80), *([(4, 2, 128)] if CUDA else [])]
)
@pytest.mark.parametrize(
    ("queries", "before", "window", "sinks", "slots", "entering"),
    [
        (1, 0, 7, 0, 0, 0),
        (5, 3, 7, 4, 3, 2),
        (33, 40, 20, 2, 30, 33),
        (70, 64, 64, 0, 1, 70),
        (200, 50, 50, 3, 90, 150),
        *([(1000, 512, 512, 64, 1472, 1000), (515, 300, 3000, 128, 2000, 0)] if CUDA else []),
        *([(4200, 600, 600, 128, 5000, 4200)] if CUDA else []),
    ],
)
@pytest.mark.parametrize("at_once", ["unsorted", 0, 3, *(["best"] if CUDA else [])])
def test_attention(plain, monkeypatch, queries, before, window, sinks, slots, entering, heads, kv_heads, size, dtype,
                   at_once):  # fmt: skip
    """At once: of what all see, so many or a multiple are attended by another kernel, on CUDA cuDNN's."""
    if at_once != "best":
        monkeypatch.setattr(banded, "FEW", 1 << 30 if at_once == "unsorted" else 0)
        monkeypatch.setattr(dispatch, "dense_at_once", lambda q, count: at_once)
    attended = []
    monkeypatch.setattr(banded, "attend_dense", lambda *args: attended.append(args[1].shape[2]) or attend(*args))
    torch.manual_seed(queries)
    batch, count = 2, sinks + slots + entering
    q, q_kept = torch.randn(2, batch, queries, heads, size, device=DEVICE).to(dtype).transpose(2, 3)
    near = torch.randn(2, batch, kv_heads, before + queries, size, device=DEVICE).to(dtype)
    keys = torch.randn(2, batch, kv_heads, count + 1, size, device=DEVICE).to(dtype)[..., :count, :]  # of a larger one
    first = torch.arange(queries - entering, queries)
    since = torch.cat([torch.full((sinks + slots,), -1), first]).expand(batch, kv_heads, -1)
    until = torch.where(torch.rand(since.shape) < 0.5, since, torch.randint(queries + 1, since.shape))
    until[..., :sinks] = queries
    until[torch.rand(until.shape) < 0.3] = queries
    always = int(((since <= 0) & (until >= queries)).sum(-1).min())
    seen = KeptKeys(*keys, since.to(DEVICE), until.to(DEVICE), entering)
    for start in ([before + sinks], [before + sinks, max(0, before - 5)]):
        at = torch.tensor(start, device=DEVICE)
        with monkeypatch.context() as free:
            free.delenv("AHN_KERNEL")
            found = banded.attend(Queries(q, q_kept, size**-0.5), tuple(near), at, Window(window, sinks), seen)
        exact = KeptKeys(*(t.float() for t in keys), seen.since, seen.until, entering)
        nothing = tuple(near[:, :, :, :0].float())
        asked = Queries(q.float(), q_kept.float(), size**-0.5)
        expected = attend_window(asked, nothing, tuple(near.float()), at, Window(window, sinks), exact)
        real = expected[1] > -1e4  # the others see nothing
        assert torch.equal(real, found[1] > -1e4)
        assert found[0].isfinite().all()
        assert relative(found[0][real], expected[0][real]) < LIMIT[dtype]
        assert relative(found[1][real], expected[1][real]) < LIMIT[dtype]
    if at_once in (0, 3):
        assert attended == ([always // at_once * at_once] * 2 if at_once and always >= at_once else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (33, 2), (70, 1)])
@pytest.mark.parametrize(("size", "width"), [(16, 16), (64, 64), (80, 32)])
def test_rotation(plain, tokens, rows, size, width, dtype):
    torch.manual_seed(tokens)
    model = tiny(head_dim=size).to(DEVICE)
    rotary = Rotary(model.model, model.model.layers[0].self_attn)
    assert rotary.halves
    x = torch.randn(2, tokens, 3, size, device=DEVICE).to(dtype).transpose(1, 2)
    for delta in (torch.randint(-40, 40, (rows, tokens), device=DEVICE), torch.tensor([[7]], device=DEVICE)):
        angles = tuple(t[..., :width] for t in rotary.angles(delta))
        assert relative(triton_rotary.rotate(x, *angles), rotary.rotate(x, angles)) < LIMIT[dtype]
        few = torch.rand(width // 2, device=DEVICE)
        by = torch.cat([delta[..., None] * few] * 2, -1)
        assert relative(triton_rotary.rotate_by(x, delta, few), rotary.rotate(x, (by.cos(), by.sin()))) < LIMIT[dtype]
        assert rotary.simple


@pytest.mark.usefixtures("small_grids")
@pytest.mark.parametrize("kind", [*STORES, None])
def test_the_whole_model(kind, monkeypatch):
    """In any pieces, padded or not, as plain torch."""
    base = tiny(head_dim=16).to(DEVICE)
    model = with_memory(base) if kind is None else storing(kind, base=base, store_span=2)
    ids = token_ids(90, batch=2).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    for seen in (None, mask):
        logits = {}
        for kernel in ("torch", "triton"):
            monkeypatch.setenv("AHN_KERNEL", kernel)
            logits[kernel] = [in_pieces(model, ids, sizes, seen) for sizes in ([90], [40, 1, 2, 47])]
        for expected, found in zip(*logits.values(), strict=True):
            real = mask.bool() if seen is not None else torch.ones_like(ids).bool()
            assert relative(found[real], expected[real]) < 1e-4
