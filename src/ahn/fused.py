"""Faster forms of the base's own modules, for as long as a step is captured or a chunk is read: nothing here knows a
family.

`compiled`: what lies between matrix products, elementwise, is compiled. `compiled_for_reading`: so is what the memory
does there, once for chunks of any length. `products`: linear layers of few vectors are read by Triton kernels, those of
one input by one. What does not look as expected (quantised weights, other names, other activations, hooks) is left as
it is, module by module. All is undone afterwards.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ahn import kernels
from ahn.cells.base import Linear

MANY = 512  # tokens of a chunk from which on what is compiled for reading is used

_changing = threading.RLock()


@contextmanager
def compiled(decoder: Any, any_length: bool = False) -> Iterator[None]:
    """Within, norms, MLPs and rotations of the base are compiled, each class once: their dozens of elementwise
    operations take longer to start than to run."""
    fast = of_any_length if any_length else of_one_length
    attention = decoder.layers[0].self_attn
    forms: dict[type, Any] = {}
    changed = [module for module in decoder.modules() if _is_norm(module)]
    changed += [layer.mlp for layer in decoder.layers if hasattr(layer, "mlp")]
    with _changing, ExitStack() as undo:
        for module in changed:
            kind = type(module)
            if "forward" in vars(module):
                continue
            if kind not in forms:
                forms[kind] = fast(kind.forward)
            _put(undo, module, "forward", MethodType(forms[kind], module))
        family = sys.modules[type(attention).__module__]
        if turn := getattr(family, "apply_rotary_pos_emb", None):
            undo.enter_context(mock.patch.object(family, "apply_rotary_pos_emb", fast(turn)))
        (rotary,) = attention.ahn.rotary
        if rotary is not None:
            _put(undo, rotary, "turn", MethodType(fast(type(rotary).turn), rotary))
        yield


@contextmanager
def compiled_for_reading(decoder: Any) -> Iterator[None]:
    """Within, a chunk is read by what is compiled: base as by `compiled`, and what the memory does around attention and
    recurrence. Where something cannot be compiled it is left. One chunk at a time: if another is being read so, this
    one is not."""
    if not _changing.acquire(blocking=False):
        yield
        return
    from torch._dynamo import config

    try:
        with compiled(decoder, any_length=True), ExitStack() as undo, config.patch(suppress_errors=True):
            for layer in decoder.layers:
                memory = layer.self_attn.ahn
                for name in ("_merge", "_prepare", "_combine"):
                    if name not in vars(memory):
                        _put(undo, memory, name, MethodType(of_any_length(getattr(type(memory), name)), memory))
            yield
    finally:
        _changing.release()


def of_one_length(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


@cache
def of_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors [B, T, D] or [B, N, T, H], compiled once for all T; as it is for few tokens. Not of an
    instance: what it returns is kept, for torch.compile itself takes longer than a chunk may."""
    from torch._dynamo import maybe_mark_dynamic

    fast = torch.compile(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        length = max(tensors[0].shape[1 : max(2, tensors[0].dim() - 1)])
        if length < MANY:
            return function(*args, **kwargs)
        for tensor in tensors:
            for dim, size in enumerate(tensor.shape):
                if size in (length, length - 1):
                    maybe_mark_dynamic(tensor, dim)
        return fast(*args, **kwargs)

    return call


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
    if not all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() and w.is_contiguous() for w in weights):
        return False
    return len({weight.dtype for weight in weights}) == 1


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
    parameters = list(module.parameters(recurse=False))
    return len(parameters) == 1 and parameters[0].dim() == 1 and not list(module.children())


def _put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an instance until `undo` closes."""
    setattr(owner, name, value)
    undo.callback(vars(owner).pop, name, None)
