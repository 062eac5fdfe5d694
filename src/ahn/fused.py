"""Faster forms of the base's own modules, for as long as a step is captured or a chunk is read: nothing here knows a
family.

`compiled`: what lies between matrix products, elementwise, is compiled. `compiled_for_reading`: so is what the memory
does there, once for chunks of any length. `products`: linear layers of few vectors are read by Triton kernels, those of
one input by one, and where a layer is of the usual form, with the norm before and the sum behind. `turned`: one kernel
turns queries and keys. What does not look as expected (quantised weights, other names, other activations, hooks) is
left as it is, module by module. All is undone afterwards.
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

from ahn.cells.base import Linear
from ahn.compat import PAST
from ahn.memory.calls import calls
from ahn.ops import dispatch
from ahn.ops.rotary import turns_halves

MANY = 512  # tokens of a chunk from which on what is compiled for reading is used

_changing = threading.RLock()


@contextmanager
def compiled(decoder: Any, any_length: bool = False) -> Iterator[None]:
    """Within, norms, MLPs and rotations of the base are compiled, each class once: their dozens of elementwise
    operations take longer to start than to run. Not for the last norm alone, which takes longer to compile."""
    from torch._dynamo import config

    fast = of_any_length if any_length else of_one_length
    attention = decoder.layers[0].self_attn
    forms: dict[type, Any] = {}
    changed = [module for layer in decoder.layers for module in _called(layer)]
    changed += [module for module in decoder.children() if changed and _is_norm(module)]
    with _changing, config.patch(recompile_limit=dispatch.SHAPES), ExitStack() as undo:
        for module in changed:
            kind = type(module)
            if "forward" in vars(module):
                continue
            if kind not in forms:
                forms[kind] = fast(kind.forward)
            _put(undo, module, "forward", MethodType(forms[kind], module))
        family = sys.modules[type(attention).__module__]
        turn = getattr(family, "apply_rotary_pos_emb", None)
        if turn is not None and not isinstance(turn, Turns):
            undo.enter_context(mock.patch.object(family, "apply_rotary_pos_emb", fast(turn)))
        rotary = next((r for layer in decoder.layers for r in layer.self_attn.ahn.rotary if r is not None), None)
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
    """`function`, compiled when it is first called: to ask for it imports the compiler, which takes 4 s."""
    compile_once = cache(lambda: torch.compile(function, dynamic=False))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compile_once()(*args, **kwargs)

    return call


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
    """Within, linear layers multiply few vectors by `ahn.ops.kernels.gemv`: of an attention module all that read the
    layer's input, those of its memory too, in one launch; of an MLP the first two, with what is between them and the
    third. Where all that fits, norms and sums are part of it (`Block`)."""
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
            block = Block.of(layer, group)
            if block is not None:
                _put(undo, layer, "forward", block.forward)
                _put(undo, attention.o_proj, "forward", block.end)
            elif _is_plain(attention.o_proj):
                _put(undo, attention.o_proj, "forward", Together([attention.o_proj]).of(attention.o_proj))
            mlp = getattr(layer, "mlp", None)
            if block is None and mlp is not None and _is_gated(mlp):
                _put(undo, mlp.down_proj, "forward", Together([mlp.down_proj]).of(mlp.down_proj))
                _put(undo, mlp, "forward", MethodType(_mlp, mlp))
        yield


@contextmanager
def turned(decoder: Any) -> Iterator[None]:
    """Within, queries and keys of one token a row are turned by one kernel, and the queries for the sinks with them, if
    the base turns them half by half."""
    family = sys.modules[type(decoder.layers[0].self_attn).__module__]
    with _changing, ExitStack() as undo:
        plain = getattr(family, "apply_rotary_pos_emb", None)
        if plain is not None and turns_halves(plain):
            turns = Turns(plain)
            undo.enter_context(mock.patch.object(family, "apply_rotary_pos_emb", turns))
            for layer in decoder.layers:
                if "forward" not in vars(layer.self_attn):
                    _put(undo, layer.self_attn, "forward", turns.within(layer.self_attn))
                    _put(undo, layer.self_attn.ahn, "_turn", turns.again)
        yield


class Turns(threading.local):
    """In the place of a base's function that turns queries and keys. That is the function of all models of the family,
    so each thread has attributes of its own."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.memory: Any = None  # of the layer that is being called
        self.q: Tensor | None = None  # as turned last
        self.twice: Tensor

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = calls.now[2] if self.memory is not None and calls.now is not None else None
        whole = cos.shape[-1] == q.shape[-1] and q.dtype == k.dtype
        if args or kwargs or cache is None or not whole or q.shape[2] > 1 or q.shape[-1] % 2:
            return self.plain(q, k, cos, sin, *args, **kwargs)
        from ahn.ops.kernels import decode

        self.q, k, self.twice = decode.turn(q, k, (cos, sin), self.memory.sink_angles(cache.span, q.device))
        return self.q, k

    def again(self, rotary: Any, q: Tensor, angles: Any) -> Tensor:
        """`AHNLayer._turn`."""
        return self.twice if q is self.q else rotary.turn(q, angles)

    def within(self, attention: Any) -> Callable[..., Any]:
        plain = attention.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.memory = attention.ahn
            try:
                return plain(*args, **kwargs)
            finally:
                self.memory = None

        return forward


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
                from ahn.ops.kernels import gemv

                self.x, self.out = x, gemv.together(x, self.layers)
            return self.out[..., low:high]

        return forward

    def normed(self, x: Tensor, norm: Any) -> Tensor:
        """`x` normalised; the outputs for it are there as well."""
        from ahn.ops.kernels import gemv

        self.x = x.new_empty(x.shape)
        self.out = gemv.together(x, self.layers, norm, self.x)
        return self.x


class End:
    """The last product of an attention module, with what is to be added to it, [B, 1, D]."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.add: Tensor | None = None
        self.out: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not _few(x, self.layer):
            return type(self.layer).forward(self.layer, x)
        from ahn.ops.kernels import gemv

        self.out = gemv.together(x, [self.layer], add=self.add)
        return self.out


class Block:
    """A decoder layer of the usual form: h + attention(norm h), and h + MLP(norm h) of that. Its products normalise
    what they read, and add to h what they end."""

    def __init__(self, layer: Any, readers: Together, norms: list[Any]) -> None:
        self.layer, self.readers, self.norms = layer, readers, norms
        self.end = End(layer.self_attn.o_proj)
        self.ends = False  # whether attention returns what `end` does: the first call shows it

    @classmethod
    def of(cls, layer: Any, readers: Together) -> Block | None:
        """None if the layer is of another form, or its parts are."""
        mlp, end = getattr(layer, "mlp", None), layer.self_attn.o_proj
        if mlp is None or not readers.layers or not _is_gated(mlp) or not _is_block(layer):
            return None
        norms = [_rms_norm(layer.input_layernorm), _rms_norm(layer.post_attention_layernorm)]
        if None in norms or not _is_plain(end) or _hooks(mlp):
            return None
        first, *rest = (part.weight for part in (*readers.layers, mlp.gate_proj, *norms))
        alike = all((w.dtype, w.shape[-1]) == (first.dtype, first.shape[-1]) for w in rest)
        alike = alike and end.weight.dtype == mlp.down_proj.weight.dtype == first.dtype
        return cls(layer, readers, norms) if alike else None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        layer, mlp = self.layer, self.layer.mlp
        if not _few(hidden_states, mlp.gate_proj):
            return type(layer).forward(layer, hidden_states, **kwargs)
        from ahn.ops.kernels import gemv

        self.end.add = hidden_states if self.ends else None
        out, _ = layer.self_attn(hidden_states=self.readers.normed(hidden_states, self.norms[0]), **kwargs)
        if not self.ends:
            self.ends = out is self.end.out
            out = hidden_states + out
        self.end.add = self.end.out = None
        inner = gemv.gated(out, mlp.gate_proj, mlp.up_proj, self.norms[1])
        return gemv.together(inner, [mlp.down_proj], add=out)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    if not _few(x, mlp.gate_proj):
        out: Tensor = type(mlp).forward(mlp, x)
        return out
    from ahn.ops.kernels import gemv

    out = mlp.down_proj(gemv.gated(x, mlp.gate_proj, mlp.up_proj))
    return out


def _few(x: Tensor, layer: Any) -> bool:
    """Whether the kernels are for this input of a linear layer."""
    return x.dtype == layer.weight.dtype and x.numel() <= dispatch.FEW_ROWS * x.shape[-1]


def _is_plain(module: Any) -> bool:
    """A linear layer of which nothing is known but weight and bias: no quantisation, no adapter, no hook."""
    if type(module) not in (nn.Linear, Linear) or "forward" in vars(module) or _hooks(module):
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


def _is_block(layer: Any) -> bool:
    """A decoder layer that is h + attention(norm h), then h + MLP(norm h), and nothing else: tried out with others in
    the place of its parts, each of which answers only to what it has to be given."""
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


def _rms_norm(module: Any) -> Any:
    """A plain RMSNorm as the kernels know it, or None; tried out, with numbers so small that its epsilon shows."""
    from ahn.ops.kernels import gemv

    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if not _is_norm(module) or not epsilon or "forward" in vars(module) or _hooks(module):
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


def _hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _called(layer: Any) -> list[Any]:
    """Norms and MLP of a decoder layer of the base, if not a `Block` does what they do."""
    in_block = isinstance(getattr(vars(layer).get("forward"), "__self__", None), Block)
    rest = {*(layer.self_attn if in_block else layer).modules()} - {*layer.self_attn.ahn.modules()}
    norms = [module for module in rest if _is_norm(module)]
    return norms if in_block or not hasattr(layer, "mlp") else [*norms, layer.mlp]


def _is_norm(module: Any) -> bool:
    """A module of nothing but one vector of weights."""
    parameters = list(module.parameters(recurse=False))
    return len(parameters) == 1 and parameters[0].dim() == 1 and not list(module.children())


def _put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an instance until `undo` closes."""
    setattr(owner, name, value)
    undo.callback(vars(owner).pop, name, None)
