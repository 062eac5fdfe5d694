"""Puts memories on a transformers model, and takes them off again without a trace.

Letters: B batch, T tokens, D hidden size, N query heads, M key/value heads, H head size.

How a layer is reached, without code for any model family:
- a hook before each attention module keeps its input x and its cache, which the attention function is not given;
- the attention function, registered with transformers by name, receives q, k, v after rotary positions and returns
  what goes into o_proj: attention over sinks and window, plus the read from the memory;
- the decoder's `forward` replaces the default cache by an AHNCache, opens and closes its span, and replays a graph
  where one token a row comes (`ahn.decoding`);
- a hook before the model reads a long prompt in chunks when only the last logits are wanted (as in `generate`).

Threads: what belongs to one call is in its cache or in the thread (`ahn.memory.calls`), never on the model. Where a
graph is captured, modules are changed and buffers lent to one cache at a time, so there one call runs after the other.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ahn import decoding, weights
from ahn.compat import OTHER_PAST, PAST
from ahn.config import AHNConfig
from ahn.errors import AHNError, ConfigError, UnsupportedModelError, UnsupportedOperationError
from ahn.ids import checked
from ahn.interrupts import deferred
from ahn.memory.cache import AHNCache
from ahn.memory.calls import Full, calls
from ahn.memory.layer import AHNLayer, heads_of
from ahn.memory.span import Span
from ahn.memory.store_tier import StoringLayer
from ahn.ops import dispatch
from ahn.ops.rotary import Rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "ahn"  # the name our attention goes by in transformers' registry and in `config._attn_implementation`
CHUNK = 512  # tokens read at once: large enough for efficient products, small enough that activations do not count
Observer = Callable[[Any, Tensor, Tensor, Tensor, Tensor, float, Tensor], None]
Attend = Callable[[Any, Tensor, Tensor, Tensor, Tensor, float], Tensor]
GPU_CHUNK = 8192  # tokens of all rows, at least: a GPU takes longer for them than Python for its part
GPU_NUMBERS = 1 << 25  # in what passes between two layers: with few numbers a token, more tokens
LONGEST = "n_positions", 2**31 - 1  # a setting that says how long inputs may be, which lm_eval cuts them to
CHANGING = ("dynamic", "longrope")  # rotary types whose frequencies depend on the length of the text


class _Frame:
    """What `augment` changed on a model, so that `detach` can undo it, and what its calls share."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.layers = model, list[AHNLayer]()
        self.adapter = object()  # another one with each adapter that is loaded
        self._begin()
        self.attention = model.config._attn_implementation
        # by name: parameters may be replaced by their shards, and a reference would keep the whole ones in memory
        self.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.hooks: list[Any] = []
        self.no_graph: str | None = None  # why there is none; None: not looked yet
        self.asked = 0  # tokens of questions that were read by the graph
        self.switches: list[Any] = []  # another list once adapters of peft were switched: a graph has them built in
        self.full: dict[int, Full] = {}  # by thread, within `full_attention`
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.held: tuple[Any, str, Tensor] | None = None  # rotary module, type and frequencies that are held

    def _begin(self) -> None:
        self.graph: decoding.Graph | None = None  # of one token
        self.lock = threading.RLock()
        self.stream: torch.cuda.Stream | None = None  # of the last turn

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model: graph and lock stay."""
        return {name: value for name, value in vars(self).items() if name not in ("graph", "lock", "stream")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @contextmanager
    def turn(self, device: torch.device | None = None) -> Iterator[None]:
        """Within, no other thread uses the model, where calls share the buffers and the changed modules of a graph."""
        device = device or self.model.device
        if not dispatch.in_turn(device.type):
            yield
            return
        with self.lock:
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                if self.stream is not None and self.stream != stream:
                    stream.wait_stream(self.stream)
                self.stream = stream
            yield

    def weights(self) -> weights.State:
        """The weights of model and memory as they are now, for a comparison. Raises UnsupportedModelError if those of
        the memory are not there, or have become something else."""
        _check_memory(self.layers)
        found = weights.state(self.model)
        if found.switches != self.switches:
            self.switches = found.switches
        return found

    def hold_frequencies(self, decoder: Any) -> None:
        """Keep the rotary frequencies those of short texts, where the base changes them with the length ("dynamic",
        "longrope"): what is attended is never further away than sinks + window, and one text has one set of them.
        """
        rotary: Any = getattr(decoder, "rotary_emb", None)
        kind = getattr(rotary, "rope_type", None)
        if kind not in CHANGING:
            return
        self.held = rotary, kind, rotary.inv_freq
        rotary.rope_type = "default"
        rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device, copy=True)

    def release_frequencies(self) -> None:
        if self.held is not None:
            rotary, kind, frequencies = self.held
            rotary.rope_type, rotary.inv_freq = kind, frequencies.to(rotary.inv_freq.device)


def augment(model: PreTrainedModel, config: AHNConfig | None = None) -> PreTrainedModel:
    """Give every layer of a causal language model a memory, in place; the base is frozen.

    An untrained memory changes nothing but the attention to sinks and window; train the cells, or load an adapter.

    Args:
        model: a Llama-shaped transformers causal language model: decoder layers with `self_attn` and an `o_proj`,
            uniform softmax attention.
        config: the memory; default AHNConfig().

    Returns:
        the same model, with `model.ahn_config`.

    Raises:
        UnsupportedModelError: the attention cannot be split into sinks and window; says what is missing.
        ConfigError: the settings do not fit this base.
    """
    model, given = base_of(model), model
    config = AHNConfig() if config is None else config
    if not isinstance(config, AHNConfig):
        raise ConfigError(f"config={config!r}: expected an ahn.AHNConfig")
    if hasattr(model, "ahn_config"):
        raise ConfigError("the model already has memories: ahn.detach(model) first")
    attentions = _attention_modules(model)
    _check_weights(model)
    decoder = model.get_decoder()
    check_fits(config, model.config.get_text_config(), len(attentions))
    frame = _Frame(model)
    frame.hold_frequencies(decoder)
    try:
        rotary = _rotary(decoder, attentions[0], config)
        layers = [_layer(attention, config, rotary) for attention in attentions]
    except ConfigError:
        frame.release_frequencies()
        raise
    frame.layers = layers
    model.requires_grad_(False)
    for attention, layer in zip(attentions, layers, strict=True):
        layer.train(model.training)
        attention.ahn, layer.full = layer, frame.full
        frame.hooks.append(attention.register_forward_pre_hook(_keep_call, with_kwargs=True))
    frame.hooks.append(model.register_forward_pre_hook(_read_in_chunks, with_kwargs=True))
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    _own_config(model)
    model.config._attn_implementation = ATTENTION
    set_unlimited(model, True)
    model.ahn_config, model._ahn_frame = config, frame
    model.ahn_names = {"base": model.config._name_or_path or None, "adapter": None}
    model.save_pretrained = MethodType(_save_pretrained, model)
    model.ahn_retrieval = None
    decoder.ahn_owner = [model]  # in a list: not a submodule
    decoder.ahn_forward = vars(decoder).get("forward")  # of accelerate, say
    decoder.forward = MethodType(_call, decoder)
    return given


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a config of its own: another one may have been made with the same object."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        held: Any = getattr(module, "config", None)
        if id(held) in copies:
            module.config = copies[id(held)]


def set_unlimited(model: PreTrainedModel, unlimited: bool) -> None:
    """Let the config say that inputs may have any length, or nothing of it, as that of the base."""
    config, (name, value) = model.config.get_text_config(), LONGEST
    if unlimited and not hasattr(config, name):
        setattr(config, name, value)
    elif not unlimited and vars(config).get(name) == value:
        delattr(config, name)


def base_of(model: Any) -> Any:
    """The transformers model itself, if it is wrapped by peft."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def frame_of(model: Any) -> _Frame:
    """What the calls of an augmented model share. Raises ConfigError if it has no memories."""
    frame: _Frame | None = getattr(base_of(model), "_ahn_frame", None)
    if frame is None:
        raise ConfigError("the model has no memories: ahn.augment(model, config) first")
    return frame


def _rotary(decoder: Any, attention: Any, config: AHNConfig) -> Rotary | None:
    """The base's rotation where it is or may come to be needed: `set_window` may give sinks to a model without any.
    Raises ConfigError if it is needed now and cannot be composed."""
    turns = config.memory_positions == "none"
    if not turns and config.sink_positions != "clipped":
        return None
    try:
        return Rotary(decoder, attention)
    except ConfigError:
        if turns or config.sinks or config.store:
            raise
        return None


def _layer(attention: Any, config: AHNConfig, rotary: Rotary | None) -> AHNLayer:
    kept = config.layers is None or attention.layer_idx in config.layers
    return (StoringLayer if kept and config.store else AHNLayer)(attention, config, rotary)


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `augment`: weights, hooks, attention and config are the base's again. Raises ConfigError if there is
    nothing to undo."""
    frame, given = frame_of(model), model
    model = frame.model
    for hook in frame.hooks:
        hook.remove()
    for attention in _attention_modules(model):
        del attention.ahn
    model.config._attn_implementation = frame.attention
    set_unlimited(model, False)
    frame.release_frequencies()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in frame.trainable)
    decoder = model.get_decoder()
    del decoder.forward, model.save_pretrained
    if decoder.ahn_forward is not None:
        decoder.forward = decoder.ahn_forward
    del model.ahn_config, model.ahn_names, model.ahn_retrieval, model._ahn_frame, decoder.ahn_owner, decoder.ahn_forward
    return given


def _save_pretrained(model: PreTrainedModel, *args: Any, **options: Any) -> None:
    from ahn.adapter import save_with_base

    save_with_base(model, *args, **options)


def layers_of(model: PreTrainedModel) -> list[AHNLayer]:
    """The memories of an augmented model, layer by layer. Raises ConfigError if it has none."""
    return list(frame_of(model).layers)


@contextmanager
def full_attention(
    model: PreTrainedModel, observe: Observer | None = None, attend: Attend | None = None
) -> Iterator[None]:
    """Within, an augmented model without a cache and without padding is its base: the teacher of the distillation.

    `observe` is called in each layer with its attention module, q [B, N, T, H], k, v [B, M, T, H], x [B, T, D], the
    scale of the scores, and what full attention gives, [B, T, N, H]. `attend` gives that, from the same arguments,
    in place of full attention, in layers that do not keep everything.
    """
    full, thread = frame_of(model).full, threading.get_ident()
    before = full.get(thread)
    full[thread] = Full(observe, attend)
    try:
        yield
    finally:
        del full[thread]
        if before is not None:
            full[thread] = before


def _full(layer: AHNLayer) -> Full | None:
    """What this thread has put in the place of `layer`. The backward pass computes checkpointed layers again, in
    threads of its own."""
    if not layer.full:
        return None
    found = layer.full.get(threading.get_ident())
    if found is None and len(layer.full) == 1 and torch._C._current_graph_task_id() >= 0:
        (found,) = layer.full.values()
    return found


def set_window(model: PreTrainedModel, window: int, sinks: int, store_size: int | None = None) -> None:
    """Other sinks, window and size of the store (None: as it is) from now on, for new caches and whole sequences.
    Raises ConfigError."""
    model = base_of(model)
    store_size = model.ahn_config.store_size if store_size is None else store_size
    config = model.ahn_config.replace(window=window, sinks=sinks, store_size=store_size)
    layers = layers_of(model)
    check_fits(config, model.config.get_text_config(), len(layers))
    if sinks and config.sink_positions == "clipped" and all(layer.rotary[0] is None for layer in layers):
        Rotary(model.get_decoder(), _attention_modules(model)[0])  # says why not; `augment` without sinks did not
    for layer in layers:
        if layer.window is not None:
            layer.window, layer.sinks = window, sinks
        if isinstance(layer, StoringLayer):
            layer.size = store_size
    model.ahn_config = config


def most_lossless(base: Any) -> int | None:
    """Tokens that a base of this transformers config can keep exactly at most; None without a limit."""
    return min((limit for limit in _limits(base) if limit is not None), default=None)


def _limits(base: Any) -> tuple[int | None, int | None, int | None]:
    """Tokens by the positions of a base, by those of short texts where frequencies change, and by its own window."""
    context = getattr(base, "max_position_embeddings", None)
    settings = getattr(base, "rope_parameters", None) or {}
    short = None
    if (kind := settings.get("rope_type")) in CHANGING:
        short = (settings.get("original_max_position_embeddings") if kind == "longrope" else None) or context
    return context, short, getattr(base, "sliding_window", None)


def check_fits(config: AHNConfig, base: Any, layers: int) -> None:
    """Raises ConfigError if the memory does not fit a base of this transformers config."""
    context, short, native = _limits(base)
    if context is not None and config.lossless > context:
        raise ConfigError(
            f"{_sum(config)} tokens, more than the {context} positions of the base: expected at most {context}"
        )
    if short is not None and config.lossless > short:
        kind = base.rope_parameters["rope_type"]
        raise ConfigError(
            f"{_sum(config)}: this base's {kind!r} positions are those of short texts up to {short} tokens, "
            f"expected at most {short}"
        )
    if native is not None and config.lossless > native:
        raise UnsupportedModelError(
            f"the base itself slides over {native} tokens (config.sliding_window), fewer than {_sum(config)}: "
            f"expected at most {native}"
        )
    if config.layers is not None and config.layers[-1] >= layers:
        raise ConfigError(f"layers={list(config.layers)}: the base has layers 0 to {layers - 1}")


def _sum(config: AHNConfig) -> str:
    """The lossless tokens, for messages."""
    if config.store is None:
        return f"sinks + window = {config.sinks} + {config.window} = {config.lossless}"
    parts = f"{config.sinks} + {config.store_size} + {config.window}"
    return f"sinks + store + window = {parts} = {config.lossless}"


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention of each decoder layer. Raises UnsupportedModelError saying what is missing."""
    kind = type(model).__name__
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise UnsupportedModelError(f"{kind} is no transformers model: expected a causal language model")
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder: expected a causal language model")
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise UnsupportedModelError(f"{kind} has no decoder with `layers`")
    if not len(layers):
        raise UnsupportedModelError(f"{kind} has no layers (num_hidden_layers=0): expected at least 1")
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{kind} has no language-model head")
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"}:
        raise UnsupportedModelError(
            f"{kind} has native {', '.join(sorted(types - {'full_attention'}))} layers: expected full attention in all"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(f"{kind} uses multi-head latent attention: expected keys and values by head")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{kind} caps its attention scores: expected plain softmax attention")
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    needed = ("o_proj", "layer_idx", "config", "head_dim", "scaling")
    for index, attention in enumerate(attentions):
        missing = [name for name in needed if not hasattr(attention, name)]
        if attention is None or missing:
            what = "self_attn" if attention is None else f"self_attn.{', self_attn.'.join(missing)}"
            raise UnsupportedModelError(f"{kind}, layer {index}, has no {what}")
        if hasattr(attention, "sinks"):
            raise UnsupportedModelError(f"{kind} learns attention sinks: expected plain softmax attention")
        heads_of(attention)
    return attentions


def _check_weights(model: Any) -> None:
    """Raises UnsupportedModelError if a base has weights that cannot be computed with."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(f"{name} is offloaded to CPU or disk: expected all weights on their devices")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if type(module) in (nn.Linear, nn.Embedding) else None
        if weight is not None and weight.is_floating_point() and weight.dtype.itemsize == 1:
            raise UnsupportedModelError(
                f"{name} is a plain layer with weights of {weight.dtype}, with which torch cannot multiply: expected "
                "bfloat16, float16 or float32, or a quantised base as transformers loads it"
            )


def _check_memory(layers: list[AHNLayer]) -> None:
    """Raises UnsupportedModelError if the weights of a memory are offloaded, or have been given adapters."""
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if hasattr(module, "base_layer"):
                raise UnsupportedModelError(
                    f"layer {index}: an adapter such as LoRA sits on {name} of the memory itself: expected one on the "
                    r"base alone, with exclude_modules=r'.*\.ahn\..*'"
                )
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise UnsupportedModelError(
                f"layer {index}: the memory's weights are offloaded to CPU or disk: expected them on their device"
            )


@torch.compiler.disable
def _keep_call(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs["hidden_states"]
    calls.now = attention, x, kwargs.get(PAST)


@torch.compiler.disable
def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls; see its AttentionInterface. Returns [B, T, N, H] and no weights."""
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
        cache.span.written = True
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            out = layer(query, key, value, x, cache.span, cache.layers[module.layer_idx], scale)
        if torch.is_grad_enabled() and layer.cell is not None and layer.cell.o_proj.weight.requires_grad:
            out = _NoGradient.apply(layer.cell.o_proj.weight, out)
        return out, None
    instead = _full(layer)
    if instead is not None:
        if instead.attend is not None and layer.window is not None:
            full = instead.attend(module, query, key, value, x, scale)
        else:
            groups = query.shape[1] != key.shape[1]
            full = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups)
            full = full.transpose(1, 2)
        if instead.observe is not None:
            instead.observe(module, query, key, value, x, scale, full)
        return full, None
    real = None if attention_mask is None else attention_mask[:, -query.shape[2] :].bool().cpu()
    with torch.autocast(query.device.type, enabled=False):
        return layer(query, key, value, x, Span.of([0], query.shape[2], real), None, scale), None


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


def _mask(
    attention_mask: Tensor | None = None,
    kv_length: int = 0,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function transformers calls: only which tokens are padding, [B, K]; the rest follows from positions."""
    compiling = torch.compiler.is_compiling()  # then transformers cannot look at positions, and always says "packed"
    if not compiling and (use_vmap or not allow_is_causal_skip):
        raise UnsupportedOperationError("packed sequences or custom masks: expected causal attention, one text a row")
    return attention_mask


@torch.compiler.disable(recursive=False)
def _call(decoder: Any, *args: Any, **kwargs: Any) -> Any:
    """One call of an augmented model's decoder. With a cache it is written as a whole or marked as half-written: Ctrl-C
    waits for its end."""
    kwargs, (model,) = _by_name(decoder, args, kwargs), decoder.ahn_owner
    frame = model._ahn_frame
    if decoder.config._attn_implementation != ATTENTION:
        raise ConfigError(
            f"attention {decoder.config._attn_implementation!r} has been set in the place of the memory's: expected "
            f"{ATTENTION!r}; ahn.detach(model) first"
        )
    device = next(kwargs[name].device for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
    cache = kwargs[PAST] = _own_cache(frame, kwargs.get(PAST), kwargs.get("use_cache"))
    if cache is None:
        kwargs["use_cache"] = False
        with frame.turn(device):
            return decoding.forward(decoder, **_opened(kwargs, frame, None))
    with deferred(), cache.in_use(again=True), frame.turn(device):
        out = decoding.forward(decoder, **_opened(kwargs, frame, cache))
        cache.close_span()
        return out


def _opened(kwargs: dict[str, Any], frame: _Frame, cache: AHNCache | None) -> dict[str, Any]:
    """The arguments of the decoder's class; the cache knows what is coming."""
    mask = kwargs.get("attention_mask")
    if mask is not None and (isinstance(mask, dict) or mask.dim() != 2):
        raise UnsupportedOperationError("attention_mask: expected [batch, tokens], 1 for text and 0 for padding")
    ids = kwargs.get("input_ids")
    tokens = ids if ids is not None else kwargs["inputs_embeds"]
    if tokens.dim() < 2 or not tokens.shape[1]:
        raise ConfigError(f"tokens of shape {list(tokens.shape)}: expected [batch, tokens], at least one")
    if ids is not None and (ids.dtype != torch.int64 or ids.device.type == "cpu"):  # a GPU would have to be waited for
        ids = kwargs["input_ids"] = checked(ids, frame.vocabulary)
    batch, length = tokens.shape[:2]
    due = (batch, length + (cache.tokens_seen if cache is not None else 0))
    if mask is not None and tuple(mask.shape) != due:
        raise ConfigError(f"attention_mask of shape {list(mask.shape)}: expected {list(due)}, past tokens included")
    if length > 1 and cache is not None:
        cache.check_weights()
    elif length > 1:
        _check_memory(frame.layers)
    span = cache.open_span(batch, length, mask, ids) if cache is not None else None
    skips = mask is not None or (cache is not None and cache.skips_padding)
    if skips and kwargs.get("position_ids") is None:
        real = torch.ones(batch, length, device=tokens.device) if mask is None else mask[:, -length:]
        kwargs["position_ids"] = _positions(span, real.long())
    return kwargs


def _positions(span: Span | None, real: Tensor) -> Tensor:
    """[B, T] positions that skip padding; padding itself is put at the next token's."""
    counted = (real.cumsum(1) - 1).clamp(min=0)
    return counted if span is None else counted + span.start.to(real.device)[:, None]


def _own_cache(frame: _Frame, cache: Any, use_cache: bool | None) -> AHNCache | None:
    model = frame.model
    if isinstance(cache, AHNCache):
        cache.check_model(frame)
        return cache
    if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0 and not hasattr(cache, "ahn_replaced"):
        cache.ahn_replaced = True  # it stays empty: another call with it would forget
        return AHNCache(model)  # generate's default
    if cache is not None:
        raise UnsupportedOperationError(f"{PAST} is a {type(cache).__name__}: expected an ahn.AHNCache")
    if use_cache is None:
        use_cache = model.config.use_cache and not torch.is_grad_enabled()
    return AHNCache(model) if use_cache else None


@torch.compiler.disable
def _read_in_chunks(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model: of a long prompt whose last logits alone are wanted, read all but the last chunk. The cache may
    have either of its names."""
    renamed = OTHER_PAST in kwargs
    kwargs = _by_name(model, args, kwargs)
    as_called = ((), kwargs) if renamed else None
    ids = kwargs.get("input_ids")
    cache: Any = kwargs.get(PAST)
    if ids is None or cache is None or kwargs.get("logits_to_keep") != 1 or ids.shape[1] <= CHUNK:
        return as_called
    cache = kwargs[PAST] = _own_cache(model._ahn_frame, cache, kwargs.get("use_cache"))
    first, chunk = chunks(model, ids.shape[0], cache.tokens_seen)
    ends = chunk_ends(ids.shape[1], first, chunk)
    if len(ends) < 2:
        return as_called
    head = ends[-2]
    mask = kwargs.get("attention_mask")
    seen = None if mask is None else mask[:, : mask.shape[1] - ids.shape[1] + head]
    from ahn.generation import read_chunks

    with cache.in_use(again=True):
        read_chunks(model.get_decoder(), ids[:, :head], cache, chunk, seen, first=first)
    kwargs["input_ids"] = ids[:, head:]
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"][..., -(ids.shape[1] - head) :]
    return (), kwargs


def chunks(model: PreTrainedModel, rows: int, seen: int) -> tuple[int, int]:
    """How many tokens to read at once after `seen` ones, at first and from then on.

    On CUDA a wide window is a whole number of chunks, which begin where it does: so few shapes of attention occur, for
    each of which cuDNN makes a plan. For a narrow one, or a store, attention is our own, for any shape.
    """
    if model.device.type != "cuda":
        return CHUNK, CHUNK
    config = model.ahn_config
    most = max(GPU_CHUNK, GPU_NUMBERS // model.get_decoder().config.hidden_size)
    most = max(CHUNK, most // rows // CHUNK * CHUNK)
    narrow = config.window <= dispatch.NARROW and dispatch.contest("cuda").name == "triton"
    if narrow or config.store is not None or config.window < CHUNK:
        return most, most
    chunk = config.window // -(-config.window // most)
    return chunk + (config.sinks - seen) % chunk, chunk


def chunk_ends(total: int, first: int, chunk: int) -> list[int]:
    """Where chunks of `total` tokens end: the first, all others, and one of less than an eighth is part of the one
    before it, for it would take as long as Python needs for any."""
    ends = [*range(first, total, chunk), total]
    if len(ends) > 1 and total - ends[-2] < chunk // 8:
        del ends[-2]
    return ends


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, the cache by the one that this transformers has for it."""
    kwargs = {PAST if name == OTHER_PAST else name: value for name, value in kwargs.items()}
    if not args:  # as transformers itself calls, once a token: no look at the signature
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs
