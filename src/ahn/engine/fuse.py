"""Faster forms of the base's own modules, while a step of a graph is captured. Nothing here knows a family.

`products`: Triton kernels multiply few vectors by the weights of linear layers. Layers that read the same vector share
one launch; in a decoder layer of the usual form, the norm before and the sum behind are part of it. `fused_rotation`:
one kernel rotates queries and keys. Modules that do not look as expected (`ahn.engine.probe`: quantised weights, other
names, other activations, hooks) stay as they are, one by one. All is undone afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ahn.engine.patch import patched
from ahn.engine.probe import has_hooks, is_block, is_gated, is_plain, plain_and_alike, rms_norm
from ahn.memory.calls import calls
from ahn.ops import dispatch
from ahn.ops.rotary import FUNCTION, family_of, rotates_halves

changing = threading.RLock()


@contextmanager
def products(decoder: Any) -> Iterator[None]:
    """Within, `ahn.ops.kernels.gemv` multiplies few vectors by linear layers. All layers of an attention module and of
    its memory that read the layer's input share one launch; so do the first two of an MLP, with the activation between
    them and the third. Where everything fits, norms and sums are part of it (`Block`)."""
    with ExitStack() as undo:
        for layer in decoder.layers:
            attention = layer.self_attn
            cell = attention.ahn.cell
            form = None if cell is None else cell.step_form()
            of_cell = (*form.inputs, form.gate) if form is not None else ()
            inner = [m for m in attention.children() if isinstance(m, nn.Linear) and m is not attention.o_proj]
            readers = plain_and_alike([*inner, *of_cell])
            group = Together(readers)
            for module in readers:
                undo.enter_context(patched(module, "forward", group.of(module)))
            if form is not None and all(any(part is module for module in readers) for part in form.inputs):
                undo.enter_context(patched(attention.ahn.last.forms, "gate_inputs", group.of(*form.inputs)))
            block = Block.of(layer, group)
            if block is not None:
                undo.enter_context(patched(layer, "forward", block.forward))
                undo.enter_context(patched(attention.o_proj, "forward", block.end))
            elif is_plain(attention.o_proj):
                alone = Together([attention.o_proj]).of(attention.o_proj)
                undo.enter_context(patched(attention.o_proj, "forward", alone))
            mlp = getattr(layer, "mlp", None)
            if block is None and mlp is not None and is_gated(mlp):
                alone = Together([mlp.down_proj]).of(mlp.down_proj)
                undo.enter_context(patched(mlp.down_proj, "forward", alone))
                undo.enter_context(patched(mlp, "forward", MethodType(_mlp, mlp)))
        yield


@contextmanager
def fused_rotation(decoder: Any) -> Iterator[None]:
    """Within, one kernel rotates queries and keys of one token a row, and the queries for sinks and store once more, if
    the base rotates half by half."""
    family = family_of(decoder.layers[0].self_attn)
    with changing, ExitStack() as undo:
        plain = getattr(family, FUNCTION, None)
        if plain is not None and rotates_halves(plain):
            fused = FusedRotation(plain)
            undo.enter_context(patched(family, FUNCTION, fused))
            for layer in decoder.layers:
                if "forward" not in vars(layer.self_attn):
                    undo.enter_context(patched(layer.self_attn, "forward", fused.within(layer.self_attn)))
                    undo.enter_context(patched(layer.self_attn.ahn.positions, "rotate", fused.again))
        yield


class FusedRotation(threading.local):
    """Takes the place of the base's function that rotates queries and keys. All models of the family share that
    function, so each thread has attributes of its own."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.memory: Any = None  # of the layer that is being called
        self.q: Tensor | None = None  # as rotated last
        self.twice: Tensor

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = calls.now[2] if self.memory is not None and calls.now is not None else None
        whole = cos.shape[-1] == q.shape[-1] and q.dtype == k.dtype
        if args or kwargs or cache is None or not whole or q.shape[2] > 1 or q.shape[-1] % 2:
            return self.plain(q, k, cos, sin, *args, **kwargs)
        from ahn.ops.kernels import moves

        self.q, k, self.twice = moves.rotate(
            q, k, (cos, sin), self.memory.positions.kept_angles(cache.forward_batch, q.device)
        )
        return self.q, k

    def again(self, rotary: Any, q: Tensor, angles: Any) -> Tensor:
        """In the place of `ahn.memory.positions.rotate`."""
        return self.twice if q is self.q else rotary.rotate(q, angles)

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
    """Linear layers that read the same vectors: the first one that is called with new vectors multiplies for all."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers  # of one width and dtype
        self.x: Tensor | None = None
        self.out: Tensor

    def of(self, *layers: Any) -> Callable[[Tensor], Tensor]:
        """A function that returns the outputs, side by side, of some consecutive layers."""
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
    """The last product of an attention module, and the tensor [B, 1, D] to add to it."""

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
    """A decoder layer of the usual form: h + attention(norm h), then h + MLP(norm h). Its products normalise their
    inputs and add their outputs to h."""

    def __init__(self, layer: Any, readers: Together, norms: list[Any]) -> None:
        self.layer, self.readers, self.norms = layer, readers, norms
        self.end = End(layer.self_attn.o_proj)
        self.ends = False  # whether attention returns the output of `end`: the first call shows it

    @classmethod
    def of(cls, layer: Any, readers: Together) -> Block | None:
        """None if the layer or one of its parts has another form."""
        mlp, end = getattr(layer, "mlp", None), layer.self_attn.o_proj
        if mlp is None or not readers.layers or not is_gated(mlp) or not is_block(layer):
            return None
        norms = [rms_norm(layer.input_layernorm), rms_norm(layer.post_attention_layernorm)]
        if None in norms or not is_plain(end) or has_hooks(mlp):
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
    """Whether the kernels take this input of a linear layer."""
    return x.dtype == layer.weight.dtype and x.numel() <= dispatch.FEW_ROWS * x.shape[-1]
