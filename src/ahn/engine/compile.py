"""Compiled forms of the work between the matrix products of the base: elementwise operations, norms, rotations.

`compiled` serves while a step of a graph is captured, `compiled_for_reading` while a chunk is read: it compiles the
memory's steps too, once for chunks of any length. All is undone afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ahn.engine.fuse import Block, FusedRotation, changing
from ahn.engine.patch import patched
from ahn.engine.probe import is_norm
from ahn.memory.cell_tier import CellTier
from ahn.ops import dispatch
from ahn.ops.rotary import FUNCTION, family_of
from ahn.ops.softmax import merge_all

MANY = 512  # from a chunk of so many tokens on, forms compiled for reading are used


@contextmanager
def compiled(decoder: Any, any_length: bool = False) -> Iterator[None]:
    """Within, norms, MLPs and rotations of the base are compiled, each class once: their dozens of elementwise
    operations take longer to launch than to run. The last norm alone would take longer to compile than it saves."""
    from torch._dynamo import config

    fast = of_any_length if any_length else of_one_length
    attention = decoder.layers[0].self_attn
    forms: dict[type, Any] = {}
    changed = [module for layer in decoder.layers for module in _called(layer)]
    changed += [module for module in decoder.children() if changed and is_norm(module)]
    with changing, config.patch(recompile_limit=dispatch.SHAPES), ExitStack() as undo:
        for module in changed:
            kind = type(module)
            if "forward" in vars(module):
                continue
            if kind not in forms:
                forms[kind] = fast(kind.forward)
            undo.enter_context(patched(module, "forward", MethodType(forms[kind], module)))
        family = family_of(attention)
        rotate = getattr(family, FUNCTION, None)
        if rotate is not None and not isinstance(rotate, FusedRotation):
            undo.enter_context(patched(family, FUNCTION, fast(rotate)))
        rotaries = (layer.self_attn.ahn.positions.rotary for layer in decoder.layers)
        rotary = next((rotary for rotary in rotaries if rotary is not None), None)  # one serves all layers
        if rotary is not None:
            undo.enter_context(patched(rotary, "rotate", MethodType(fast(type(rotary).plain_rotate), rotary)))
        yield


@contextmanager
def compiled_for_reading(decoder: Any) -> Iterator[None]:
    """Within, a chunk is read by compiled forms: those of `compiled`, and the memory's steps around attention and
    recurrence. Steps that cannot be compiled stay plain. One chunk at a time is read so; others are read plainly."""
    if not changing.acquire(blocking=False):
        yield
        return
    from torch._dynamo import config

    try:
        with compiled(decoder, any_length=True), ExitStack() as undo, config.patch(suppress_errors=True):
            for layer in decoder.layers:
                memory = layer.self_attn.ahn
                undo.enter_context(patched(memory, "merge", of_any_length(merge_all)))
                if isinstance(memory.last, CellTier):
                    for name in ("prepare", "combine"):
                        _compile_form(undo, memory.last, name)
            yield
    finally:
        changing.release()


def _compile_form(undo: ExitStack, tier: CellTier, name: str) -> None:
    """Compile a plain form of the cell's tier until `undo` closes; a form that has been swapped already stays."""
    if getattr(tier.forms, name) == getattr(tier, name):
        compiled_form = MethodType(of_any_length(getattr(type(tier), name)), tier)
        undo.enter_context(patched(tier.forms, name, compiled_form))


def of_one_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called: importing the compiler takes 4 s."""
    compile_once = cache(lambda: torch.compile(function, dynamic=False))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compile_once()(*args, **kwargs)

    return call


@cache
def of_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors [B, T, D] or [B, N, T, H], compiled once for all T; plain for few tokens. The result is
    kept, because torch.compile itself takes longer than a chunk may; so pass no method of an instance."""
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


def _called(layer: Any) -> list[Any]:
    """Norms and MLP of a decoder layer of the base, without those whose work a `Block` does."""
    in_block = isinstance(getattr(vars(layer).get("forward"), "__self__", None), Block)
    rest = {*(layer.self_attn if in_block else layer).modules()} - {*layer.self_attn.ahn.modules()}
    norms = [module for module in rest if is_norm(module)]
    return norms if in_block or not hasattr(layer, "mlp") else [*norms, layer.mlp]
