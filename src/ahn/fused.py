"""Faster forms of the base's own modules, for as long as a step is captured: nothing here knows a family.

`compiled`: what lies between matrix products, elementwise, is compiled. `products`: linear layers of few vectors are
read by Triton kernels, those of one input by one. What does not look as expected (quantised weights, other names, other
activations, hooks) is left as it is, module by module. Both change instances only, and undo it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahn import kernels
from ahn.cells.base import Linear


@contextmanager
def compiled(decoder: Any) -> Iterator[None]:
    """Within, norms, MLPs and rotations of the base are compiled, each class once: their dozens of elementwise
    operations take longer to start than to run."""
    attention = decoder.layers[0].self_attn
    forms: dict[type, Any] = {}
    changed = [module for module in decoder.modules() if _is_norm(module)]
    changed += [layer.mlp for layer in decoder.layers if hasattr(layer, "mlp")]
    with ExitStack() as undo:
        for module in changed:
            kind = type(module)
            if "forward" in vars(module):
                continue
            if kind not in forms:
                forms[kind] = torch.compile(kind.forward, dynamic=False)
            _put(undo, module, "forward", MethodType(forms[kind], module))
        family = sys.modules[type(attention).__module__]
        if turn := getattr(family, "apply_rotary_pos_emb", None):
            fast = torch.compile(turn, dynamic=False)
            undo.enter_context(mock.patch.object(family, "apply_rotary_pos_emb", fast))
        (rotary,) = attention.ahn.rotary
        if rotary is not None:
            _put(undo, rotary, "turn", torch.compile(rotary.turn, dynamic=False))
        yield


@contextmanager
def products(decoder: Any) -> Iterator[None]:
    """Within, linear layers multiply few vectors by `ahn.kernels.product`: of an attention module all that read the
    layer's input, those of its memory too, in one launch; of an MLP the first two, with what is between them and the
    third."""
    with ExitStack() as undo:
        for layer in decoder.layers:
            attention = layer.self_attn
            cell = attention.ahn.cell
            form = None if cell is None else cell.step_form()
            of_cell = (*form.inputs, form.gate) if form is not None else ()
            inner = [m for m in attention.children() if isinstance(m, nn.Linear) and m is not attention.o_proj]
            readers = _alike([*inner, *of_cell])
            group = Together(readers)
            for module in readers:
                _put(undo, module, "forward", group.of(module))
            if form is not None and all(any(part is module for module in readers) for part in form.inputs):
                _put(undo, cell, "gate_inputs", group.of(*form.inputs))
            if _is_plain(attention.o_proj):
                _put(undo, attention.o_proj, "forward", Together([attention.o_proj]).of(attention.o_proj))
            mlp = getattr(layer, "mlp", None)
            if mlp is not None and _is_gated(mlp):
                _put(undo, mlp.down_proj, "forward", Together([mlp.down_proj]).of(mlp.down_proj))
                _put(undo, mlp, "forward", MethodType(_mlp, mlp))
        yield


class Together:
    """Linear layers that read the same vectors: the first of them that meets new ones multiplies for all."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers  # of one width and dtype
        self.x: Tensor | None = None
        self.out: Tensor

    def of(self, *layers: Any) -> Callable[[Tensor], Tensor]:
        """What computes the outputs, side by side, of some layers that follow each other."""
        low = sum(layer.out_features for layer in self.layers[: self.layers.index(layers[0])])
        high = low + sum(layer.out_features for layer in layers)

        def forward(x: Tensor) -> Tensor:
            if not _few(x, layers[0]):
                return torch.cat([type(layer).forward(layer, x) for layer in layers], -1)
            if x is not self.x:
                from ahn.kernels import product

                self.x, self.out = x, product.together(x, self.layers)
            return self.out[..., low:high]

        return forward


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    if not _few(x, mlp.gate_proj):
        out: Tensor = type(mlp).forward(mlp, x)
        return out
    from ahn.kernels import product

    out = mlp.down_proj(product.gated(x, mlp.gate_proj, mlp.up_proj))
    return out


def _few(x: Tensor, layer: Any) -> bool:
    """Whether the kernels are for this input of a linear layer."""
    return x.dtype == layer.weight.dtype and x.numel() <= kernels.FEW_ROWS * x.shape[-1]


def _is_plain(module: Any) -> bool:
    """A linear layer of which nothing is known but weight and bias: no quantisation, no adapter, no hook."""
    if type(module) not in (nn.Linear, Linear) or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    weights = [weight for weight in (module.weight, module.bias) if weight is not None]
    return all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() and w.is_contiguous() for w in weights)


def _alike(modules: list[Any]) -> list[Any]:
    """Those of the plain linear layers that have the width and the dtype of the first."""
    plain = [module for module in modules if _is_plain(module)]
    return [m for m in plain if (m.in_features, m.weight.dtype) == (plain[0].in_features, plain[0].weight.dtype)]


def _is_gated(mlp: Any) -> bool:
    """An MLP of three plain layers, down(silu(gate x) * (up x)); tried out, for the names do not say so."""
    names = ("gate_proj", "up_proj", "down_proj")
    if "forward" in vars(mlp) or not all(_is_plain(getattr(mlp, name, None)) for name in names):
        return False
    gate, up, down = (getattr(mlp, name) for name in names)
    if len(_alike([gate, up])) < 2:
        return False
    x = torch.randn(1, 1, gate.in_features, generator=torch.Generator().manual_seed(0)).to(gate.weight)
    with torch.no_grad():
        found, expected = mlp(x).float(), down(F.silu(gate(x)) * up(x)).float()
    return bool((found - expected).norm() <= 0.01 * expected.norm())


def _is_norm(module: Any) -> bool:
    """A module of nothing but one vector of weights."""
    parameters = list(module.parameters())
    return len(parameters) == 1 and parameters[0].dim() == 1 and not list(module.children())


def _put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an instance until `undo` closes."""
    setattr(owner, name, value)
    undo.callback(delattr, owner, name)
