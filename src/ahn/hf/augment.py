"""Puts memories on a transformers model, and takes them off again without a trace.

A layer is reached without code for any model family:
- a hook before each attention module keeps its input x and its cache for the attention function;
- the attention function, registered with transformers by name, receives q, k, v after rotary positions and returns
  what goes into o_proj: attention over sinks and window, plus the read from the memory;
- the decoder's `forward` replaces the default cache by an AHNCache, opens and closes its batch, and replays a graph
  where one token a row comes (`ahn.engine.graph`);
- a hook before the model reads a long prompt in chunks when only the last logits are wanted (as in `generate`).
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import TYPE_CHECKING, Any

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ahn.config import AHNConfig
from ahn.errors import ConfigError
from ahn.hf import attributes
from ahn.hf.architecture import attention_modules, check_fits, check_weights, set_unlimited
from ahn.hf.hooks import ATTENTION, attention_function, call_decoder, keep_call, mask_function, read_in_chunks
from ahn.hf.weights import save_with_base
from ahn.memory.handle import Handle, base_of, handle_of
from ahn.memory.layer import AHNLayer
from ahn.ops.rotary import Rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def augment(model: PreTrainedModel, config: AHNConfig | None = None) -> PreTrainedModel:
    """Give every layer of a causal language model a memory, in place; the base is frozen.

    An untrained memory changes nothing but the attention to sinks and window; train the cells, or load an adapter.

    Args:
        model: a Llama-shaped transformers causal language model: decoder layers with `self_attn` and an `o_proj`,
            uniform softmax attention.
        config: the memory; default AHNConfig().

    Returns:
        the same model. `model.ahn_config` shows its settings; `set_window` and another `augment` change them.

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
    attentions = attention_modules(model)
    check_weights(model)
    decoder = model.get_decoder()
    check_fits(config, model.config.get_text_config(), len(attentions))
    handle = Handle(model, config)
    handle.hold_frequencies()
    try:
        rotary = _rotary(decoder, attentions[0], config)
        handle.layers = [AHNLayer(attention, config, rotary) for attention in attentions]
    except ConfigError:
        handle.release_frequencies()
        raise
    model.requires_grad_(False)
    for attention, layer in zip(attentions, handle.layers, strict=True):
        layer.train(model.training)
        attention.ahn, layer.full = layer, handle.full
        handle.hooks.append(attention.register_forward_pre_hook(keep_call, with_kwargs=True))
    handle.hooks.append(model.register_forward_pre_hook(read_in_chunks, with_kwargs=True))
    AttentionInterface.register(ATTENTION, attention_function)
    AttentionMaskInterface.register(ATTENTION, mask_function)
    _own_config(model)
    model.config._attn_implementation = ATTENTION
    set_unlimited(model, True)
    model._ahn = handle
    attributes.add(model)
    model.save_pretrained = MethodType(save_with_base, model)
    decoder.forward = MethodType(call_decoder, handle)
    return given


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a config of its own: another one may have been made with the same object."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        held: Any = getattr(module, "config", None)
        if id(held) in copies:
            module.config = copies[id(held)]


def _rotary(decoder: Any, attention: Any, config: AHNConfig) -> Rotary | None:
    """The base's rotation, if it is needed or may be needed later: `set_window` may give sinks to a model without any.
    Raises ConfigError if it is needed now and cannot be composed."""
    unrotates = config.memory_positions == "none"
    if not unrotates and config.sink_positions != "clipped":
        return None
    try:
        return Rotary(decoder, attention)
    except ConfigError:
        if unrotates or config.sinks or config.store:
            raise
        return None


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `augment`: weights, hooks, attention and config are the base's again. Raises ConfigError if there is
    nothing to undo."""
    handle, given = handle_of(model), model
    model, decoder = handle.model, handle.decoder
    for hook in handle.hooks:
        hook.remove()
    for attention in attention_modules(model):
        del attention.ahn
    model.config._attn_implementation = handle.attention
    set_unlimited(model, False)
    handle.release_frequencies()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in handle.trainable)
    del decoder.forward, model.save_pretrained
    if handle.forward is not None:
        decoder.forward = handle.forward
    attributes.remove(model)
    del model._ahn
    return given


def set_window(model: PreTrainedModel, window: int, sinks: int, store_size: int | None = None) -> None:
    """Other sinks, window and size of the store (None: as it is) from now on, for new caches and whole sequences.
    Raises ConfigError."""
    handle = handle_of(model)
    store_size = handle.config.store_size if store_size is None else store_size
    config = handle.config.replace(window=window, sinks=sinks, store_size=store_size)
    check_fits(config, handle.model.config.get_text_config(), len(handle.layers))
    if sinks and config.sink_positions == "clipped" and all(layer.positions.rotary is None for layer in handle.layers):
        Rotary(handle.decoder, attention_modules(handle.model)[0])  # says why not; `augment` without sinks did not
    handle.resize(window, sinks, store_size)
