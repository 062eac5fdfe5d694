"""The Triton kernels that train a store's gates against plain torch: on CUDA, or interpreted on a CPU
(TRITON_INTERPRET=1)."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu]
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)

from ahn.ops.specs import Window  # noqa: E402
from ahn.train import gates  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("tokens", "size", "sinks", "window", "heads", "kv_heads"),
    [(96, 8, 4, 16, 4, 2), (100, 16, 0, 7, 3, 1), (70, 24, 5, 40, 4, 2), (33, 16, 2, 10, 2, 2)],
)
def test_attention_and_gradients(monkeypatch, tokens, size, sinks, window, heads, kv_heads):
    torch.manual_seed(0)
    q = torch.randn(2, tokens, heads, size, device=DEVICE).transpose(1, 2)
    k, v = torch.randn(2, 2, kv_heads, tokens, size, device=DEVICE).unbind()
    scores, wanted = torch.randn(2, kv_heads, tokens, device=DEVICE), torch.randn(2, tokens, heads, size, device=DEVICE)
    kept, found = Window(window, sinks), []
    for kernel in ("triton", "torch"):
        monkeypatch.setenv("AHN_KERNEL", kernel)
        leaves = [t.clone().requires_grad_() for t in (q, k, v, scores)]
        least = gates.least_kept(scores, 10, kept, 1.0)
        out = gates.attend(*leaves[:3], gates.log_weights(leaves[3], least, 0.4), kept, 0.3)
        (out * wanted).sum().backward()
        found.append([out, *(t.grad for t in leaves)])
    for fast, plain in zip(*found, strict=True):
        assert relative(fast, plain) < 1e-4


@pytest.mark.parametrize("warmth", [0.05, 1.0])
@pytest.mark.parametrize(("tokens", "sinks", "window"), [(96, 4, 16), (100, 0, 7), (33, 2, 50)])
def test_the_weights_add_up_to_the_slots(monkeypatch, tokens, sinks, window, warmth):
    monkeypatch.setenv("AHN_KERNEL", "triton")
    torch.manual_seed(0)
    scores = torch.randn(2, 2, tokens, device=DEVICE)
    kept = Window(window, sinks)
    least = gates.least_kept(scores, 10, kept, warmth)
    behind = gates._behind(scores, kept)
    few = (behind.sum(-1) <= 10).expand_as(least)
    assert (least[few] == gates.ALWAYS).all()
    total = gates._weights(scores, least, warmth, behind).sum(-1)[~few]
    torch.testing.assert_close(total, torch.full_like(total, 10), atol=0.01, rtol=0)


def test_a_machine_is_checked(monkeypatch):
    """Their kernel is compared before a run starts, and a wrong one is named."""
    from ahn.errors import AHNError
    from ahn.ops.kernels import soft_retention
    from ahn.train.check import Heads, check

    monkeypatch.setattr("ahn.train.check.TOKENS", 70)
    machine = "deltanet", Heads(2, 16, torch.device(DEVICE), torch.float32)
    names = [row.name for row in check(*machine, gates=True)]
    assert "gates, gradient of weights" in names
    assert not any(row.name.startswith("gates") for row in check(*machine))
    right = soft_retention.attend
    monkeypatch.setattr(soft_retention, "attend", lambda q, k, v, kept, *rest: right(q, k, v, kept * 1.1, *rest))
    with pytest.raises(AHNError, match="gates, gradient of weights is off by"):
        check(*machine, gates=True)
