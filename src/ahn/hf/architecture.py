"""Checks that a model can have memories, and that a memory fits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ahn.config import AHNConfig
from ahn.errors import ConfigError, UnsupportedModelError
from ahn.memory.layer import heads_of
from ahn.ops.rotary import CHANGING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LONGEST = "n_positions", 2**31 - 1  # a setting that says how long inputs may be, which lm_eval cuts them to


def set_unlimited(model: PreTrainedModel, unlimited: bool) -> None:
    """Let the config say that inputs may have any length, or undo that."""
    config, (name, value) = model.config.get_text_config(), LONGEST
    if unlimited and not hasattr(config, name):
        setattr(config, name, value)
    elif not unlimited and vars(config).get(name) == value:
        delattr(config, name)


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


def attention_modules(model: PreTrainedModel) -> list[Any]:
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


def check_weights(model: Any) -> None:
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
