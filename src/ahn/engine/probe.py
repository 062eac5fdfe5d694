"""Whether a base's modules have a form for which there is a faster one. Where names do not say so, they are tried."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahn.cells.modules import Linear
from ahn.compat import PAST


def is_plain(module: Any) -> bool:
    """A linear layer with a weight and a bias and nothing else: no quantisation, no adapter, no hook."""
    if type(module) not in (nn.Linear, Linear) or "forward" in vars(module) or has_hooks(module):
        return False
    weights = [weight for weight in (module.weight, module.bias) if weight is not None]
    if not all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() and w.is_contiguous() for w in weights):
        return False
    return len({weight.dtype for weight in weights}) == 1


def plain_and_alike(modules: list[Any]) -> list[Any]:
    """Those of the plain linear layers that have the width and the dtype of the first."""
    plain = [module for module in modules if is_plain(module)]
    return [m for m in plain if (m.in_features, m.weight.dtype) == (plain[0].in_features, plain[0].weight.dtype)]


def is_gated(mlp: Any) -> bool:
    """An MLP of three plain layers, down(silu(gate x) * (up x)); tried out, because names do not say so."""
    names = ("gate_proj", "up_proj", "down_proj")
    if "forward" in vars(mlp) or not all(is_plain(getattr(mlp, name, None)) for name in names):
        return False
    gate, up, down = (getattr(mlp, name) for name in names)
    if len(plain_and_alike([gate, up])) < 2:
        return False
    x = torch.randn(1, 1, gate.in_features, generator=torch.Generator().manual_seed(0)).to(gate.weight)
    with torch.no_grad():
        found, expected = mlp(x).float(), down(F.silu(gate(x)) * up(x)).float()
    return bool((found - expected).norm() <= 0.01 * expected.norm())


def is_block(layer: Any) -> bool:
    """A decoder layer that computes h + attention(norm h), then h + MLP(norm h), and nothing else. It is tried with
    stand-ins for its parts, each of which answers only to the right input."""
    if "forward" in vars(layer):
        return False
    generator = torch.Generator().manual_seed(0)
    hidden, attended, mixed, first, second = torch.randn(5, 1, 1, 8, generator=generator)
    given = {name: object() for name in ("attention_mask", "position_embeddings", PAST)}

    def attention(hidden_states: Any = None, **kwargs: Any) -> Any:
        return (attended, None) if hidden_states is first and given.items() <= kwargs.items() else None

    bare = object.__new__(type(layer))  # with no other parts than these
    vars(bare).update(
        training=False,
        input_layernorm=lambda x: first if x is hidden else None,
        self_attn=attention,
        post_attention_layernorm=lambda x: second if torch.equal(x, hidden + attended) else None,
        mlp=lambda x: mixed if x is second else None,
    )
    try:
        out = type(layer).forward(bare, hidden, **given)
    except (AttributeError, TypeError):  # it has other parts, or uses them otherwise
        return False
    return isinstance(out, Tensor) and torch.equal(out, hidden + attended + mixed)


def rms_norm(module: Any) -> Any:
    """A plain RMSNorm as the kernels know it, or None; tried out, with numbers so small that its epsilon shows."""
    from ahn.ops.kernels import gemv

    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if not is_norm(module) or not epsilon or "forward" in vars(module) or has_hooks(module):
        return None
    (weight,) = module.parameters()
    x = torch.randn(1, 1, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        for size in (1.0, epsilon**0.5):
            found, x_f = module(x * size).float(), (x * size).float()
            expected = x_f * (x_f.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.float()
            if not (found - expected).norm() <= 0.01 * expected.norm():
                return None
    return gemv.Norm(weight, epsilon)


def has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_norm(module: Any) -> bool:
    """A module of nothing but one vector of weights."""
    parameters = list(module.parameters(recurse=False))
    return len(parameters) == 1 and parameters[0].dim() == 1 and not list(module.children())
