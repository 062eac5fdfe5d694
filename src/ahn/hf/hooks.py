"""The hooks of an augmented model: its attention function, and how calls of the model and of its decoder reach it.

Letters: B batch, T tokens, D hidden size, N query heads, M key/value heads, H head size.

Threads: the state of one call is in its cache or in the thread (`ahn.memory.calls`), never on the model. Capturing a
graph changes modules and lends buffers to one cache at a time, so there one call runs after the other.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from ahn.compat import OTHER_PAST, PAST
from ahn.engine import graph, prefill
from ahn.errors import AHNError, ConfigError, UnsupportedOperationError
from ahn.ids import checked
from ahn.interrupts import deferred
from ahn.memory.batch import ForwardBatch, LayerBatch
from ahn.memory.cache import AHNCache
from ahn.memory.calls import Full, calls
from ahn.memory.handle import Handle, check_memory, handle_of
from ahn.memory.layer import AHNLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ATTENTION = "ahn"  # the name our attention goes by in transformers' registry and in `config._attn_implementation`
Observer = Callable[[Any, LayerBatch, Tensor], None]
Attend = Callable[[Any, LayerBatch], Tensor]


@contextmanager
def full_attention(
    model: PreTrainedModel, observe: Observer | None = None, attend: Attend | None = None
) -> Iterator[None]:
    """Within, an augmented model without a cache and without padding is its base: the teacher of the distillation.

    `observe` is called in each layer with its attention module, the tokens of the sequences, and the output of full
    attention [B, T, N, H]. `attend` returns such an output from the same module and tokens; it replaces full attention
    in layers that do not keep everything.
    """
    full, thread = handle_of(model).full, threading.get_ident()
    before = full.get(thread)
    full[thread] = Full(observe, attend)
    try:
        yield
    finally:
        del full[thread]
        if before is not None:
            full[thread] = before


def _full(layer: AHNLayer) -> Full | None:
    """The functions that replace `layer` in this thread. The backward pass recomputes checkpointed layers in threads
    of its own."""
    if not layer.full:
        return None
    found = layer.full.get(threading.get_ident())
    if found is None and len(layer.full) == 1 and torch._C._current_graph_task_id() >= 0:
        (found,) = layer.full.values()
    return found


@torch.compiler.disable
def keep_call(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs["hidden_states"]
    calls.now = attention, x, kwargs.get(PAST)


@torch.compiler.disable
def attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # the signature is that of AttentionInterface
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. Returns [B, T, N, H] and no weights."""
    layer: AHNLayer | None = getattr(module, "ahn", None)
    call, calls.now = calls.now, None
    if layer is None or call is None or call[0] is not module:
        raise AHNError(f"attention {ATTENTION!r} is for models from ahn.augment: load this one with another")
    _, x, cache = call
    query, key, x = (t.to(value.dtype) for t in (query, key, x))  # autocast leaves some of them in float32
    if dropout:
        raise ConfigError(f"attention_dropout={dropout}: the base is frozen, expected 0")
    if kwargs.get("output_attentions"):
        raise UnsupportedOperationError("output_attentions: weights over a compressed memory do not exist")
    scale = module.head_dim**-0.5 if scaling is None else scaling
    if isinstance(cache, AHNCache):
        cache.forward_batch.written = True
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            new = LayerBatch(cache.forward_batch, query, key, value, x, scale)
            out = layer(new, cache.layers[module.layer_idx])
        if torch.is_grad_enabled() and layer.cell is not None and layer.cell.o_proj.weight.requires_grad:
            out = _NoGradient.apply(layer.cell.o_proj.weight, out)
        return out, None
    instead = _full(layer)
    if instead is not None:
        tokens = LayerBatch(ForwardBatch.of([0], query.shape[2], None), query, key, value, x, scale)
        if instead.attend is not None and layer.window is not None:
            full = instead.attend(module, tokens)
        else:
            groups = query.shape[1] != key.shape[1]
            full = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups)
            full = full.transpose(1, 2)
        if instead.observe is not None:
            instead.observe(module, tokens, full)
        return full, None
    real = None if attention_mask is None else attention_mask[:, -query.shape[2] :].bool().cpu()
    with torch.autocast(query.device.type, enabled=False):
        batch = ForwardBatch.of([0], query.shape[2], real)
        return layer(LayerBatch(batch, query, key, value, x, scale), None), None


class _NoGradient(torch.autograd.Function):
    """Lets a graph be built through a cache and refuses to go back through it: no gradient is lost silently."""

    @staticmethod
    def forward(ctx: Any, trained: Tensor, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedOperationError(
            "gradients do not flow through an AHNCache: call the model with use_cache=False"
        )


def mask_function(
    attention_mask: Tensor | None = None,
    kv_length: int = 0,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function transformers calls. Keeps only the padding, [B, K]; the rest follows from positions."""
    compiling = torch.compiler.is_compiling()  # then transformers cannot look at positions, and always says "packed"
    if not compiling and (use_vmap or not allow_is_causal_skip):
        raise UnsupportedOperationError("packed sequences or custom masks: expected causal attention, one text a row")
    return attention_mask


@torch.compiler.disable(recursive=False)
def call_decoder(handle: Handle, *args: Any, **kwargs: Any) -> Any:
    """One call of an augmented model's decoder. With a cache it is written as a whole or marked as half-written: Ctrl-C
    waits for its end."""
    decoder = handle.decoder
    kwargs = _by_name(decoder, args, kwargs)
    if decoder.config._attn_implementation != ATTENTION:
        raise ConfigError(
            f"attention {decoder.config._attn_implementation!r} has been set in the place of the memory's: expected "
            f"{ATTENTION!r}; ahn.detach(model) first"
        )
    device = next(kwargs[name].device for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
    cache = kwargs[PAST] = _own_cache(handle, kwargs.get(PAST), kwargs.get("use_cache"))
    if cache is None:
        kwargs["use_cache"] = False
        with handle.turn(device):
            return graph.forward(handle, **_opened(kwargs, handle, None))
    with deferred(), cache.in_use(again=True), handle.turn(device):
        out = graph.forward(handle, **_opened(kwargs, handle, cache))
        cache.close_batch()
        return out


def _opened(kwargs: dict[str, Any], handle: Handle, cache: AHNCache | None) -> dict[str, Any]:
    """The arguments of the decoder's class, after the cache has opened a forward batch for them."""
    mask = kwargs.get("attention_mask")
    if mask is not None and (isinstance(mask, dict) or mask.dim() != 2):
        raise UnsupportedOperationError("attention_mask: expected [batch, tokens], 1 for text and 0 for padding")
    ids = kwargs.get("input_ids")
    tokens = ids if ids is not None else kwargs["inputs_embeds"]
    if tokens.dim() < 2 or not tokens.shape[1]:
        raise ConfigError(f"tokens of shape {list(tokens.shape)}: expected [batch, tokens], at least one")
    if ids is not None and (ids.dtype != torch.int64 or ids.device.type == "cpu"):  # a GPU would have to be waited for
        ids = kwargs["input_ids"] = checked(ids, handle.vocabulary)
    batch, length = tokens.shape[:2]
    due = (batch, length + (cache.tokens_seen if cache is not None else 0))
    if mask is not None and tuple(mask.shape) != due:
        raise ConfigError(f"attention_mask of shape {list(mask.shape)}: expected {list(due)}, past tokens included")
    if length > 1 and cache is not None:
        cache.check_weights()
    elif length > 1:
        check_memory(handle.layers)
    opened = cache.open_batch(batch, length, mask, ids) if cache is not None else None
    skips = mask is not None or (cache is not None and cache.skips_padding)
    if skips and kwargs.get("position_ids") is None:
        real = torch.ones(batch, length, device=tokens.device) if mask is None else mask[:, -length:]
        kwargs["position_ids"] = _positions(opened, real.long())
    return kwargs


def _positions(batch: ForwardBatch | None, real: Tensor) -> Tensor:
    """[B, T] positions that skip padding; padding itself is put at the next token's."""
    counted = (real.cumsum(1) - 1).clamp(min=0)
    return counted if batch is None else counted + batch.start.to(real.device)[:, None]


def _own_cache(handle: Handle, cache: Any, use_cache: bool | None) -> AHNCache | None:
    model = handle.model
    if isinstance(cache, AHNCache):
        cache.check_model(handle)
        return cache
    if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0 and not hasattr(cache, "ahn_replaced"):
        cache.ahn_replaced = True  # on the cache, and so on its copies: it stays empty, another call would forget
        return AHNCache(model)  # generate's default
    if cache is not None:
        raise UnsupportedOperationError(f"{PAST} is a {type(cache).__name__}: expected an ahn.AHNCache")
    if use_cache is None:
        use_cache = model.config.use_cache and not torch.is_grad_enabled()
    return AHNCache(model) if use_cache else None


@torch.compiler.disable
def read_in_chunks(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model: if only the last logits of a long prompt are wanted, read all of it but the last chunk. The
    cache may have either of its names."""
    renamed = OTHER_PAST in kwargs
    kwargs = _by_name(model, args, kwargs)
    as_called = ((), kwargs) if renamed else None
    ids = kwargs.get("input_ids")
    cache: Any = kwargs.get(PAST)
    if ids is None or cache is None or kwargs.get("logits_to_keep") != 1 or ids.shape[1] <= prefill.CHUNK:
        return as_called
    cache = kwargs[PAST] = _own_cache(handle_of(model), cache, kwargs.get("use_cache"))
    cut = prefill.chunks(model, ids.shape[0], cache.tokens_seen)
    ends = cut.ends(ids.shape[1])
    if len(ends) < 2:
        return as_called
    head = ends[-2]
    mask = kwargs.get("attention_mask")
    seen = None if mask is None else mask[:, : mask.shape[1] - ids.shape[1] + head]
    with cache.in_use(again=True):
        prefill.read_chunks(model.get_decoder(), ids[:, :head], cache, cut, seen)
    kwargs["input_ids"] = ids[:, head:]
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"][..., -(ids.shape[1] - head) :]
    return (), kwargs


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, the cache by the one that this transformers has for it."""
    kwargs = {PAST if name == OTHER_PAST else name: value for name, value in kwargs.items()}
    if not args:  # as transformers itself calls, once a token: no look at the signature
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs
