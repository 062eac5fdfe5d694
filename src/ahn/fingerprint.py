"""The fingerprint of a model: a short text that two models share only if they compute the same results.

It covers every weight and persistent buffer, those of the memories included, and the settings of the base that change
its logits. A memory file carries the fingerprint of the model that read it.

Letters: P pieces of a tensor, W words (int64) of a piece.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ahn import weights
from ahn.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORDS = 1 << 15  # of a piece
AT_ONCE = 1 << 20  # words, a multiple of those of a piece
SAMPLES = 1024  # numbers of each base tensor in `sampled`
# Settings of a transformers config that do not change the logits. Names with a leading underscore do not either.
IDLE = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "auto_map", "quantization_config", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id", "tokenizer_class"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_decoder"),
    *("pretraining_tp", "attn_implementation", "router_aux_loss_coef", "output_router_logits", "max_window_layers"),
    "n_positions",  # which says that there is no limit, where there are memories
}  # fmt: skip


def fingerprint(model: PreTrainedModel, adapters: bool = True) -> str:
    """The fingerprint of a model's present weights and settings. It is computed anew each time.

    It notices any change of a single number, and all but one in 2**32 of other changes. All devices give the same.

    Args:
        adapters: whether the setting of peft's adapters is part of it. The first versions left it out.

    Raises:
        ConfigError: weights are offloaded, so they cannot be read here.
    """
    digest = hashlib.sha256(json.dumps(_settings(model, adapters), sort_keys=True).encode())
    tensors = {name: _plain(name, tensor) for name, tensor in sorted(_tensors(model).items())}
    digest.update(json.dumps([(name, str(t.dtype), list(t.shape)) for name, t in tensors.items()]).encode())
    factors = torch.randint(-(2**63), 2**63 - 1, (WORDS,), generator=torch.Generator().manual_seed(0)) | 1
    for sums in [_sums(tensor, factors.to(tensor.device)) for tensor in tensors.values() if tensor.numel()]:
        digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def sampled(model: PreTrainedModel) -> str:
    """The first form of the fingerprint, to check files that carry it.

    It covers every number of the cells and 1,024 spread over each tensor of the base, but no settings.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = _plain(name, parameter).flatten()
        if values.dtype.itemsize == 1:  # torch cannot index 8-bit floats
            values = values.view(torch.uint8)
        if ".ahn." not in name and len(values) > SAMPLES:
            values = values[torch.linspace(0, len(values) - 1, SAMPLES, dtype=torch.float64).long().to(values.device)]
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters, a tied one once, and the buffers that are saved with them."""
    saved = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in saved}


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The numbers of a tensor as they are in memory, or the dequantised numbers of a quantised one."""
    values = tensor.detach()
    if values.is_meta:
        raise ConfigError(f"{name} is offloaded: expected all weights in memory, on the CPU or an accelerator")
    if hasattr(values, "dequantize") and type(values) is not torch.nn.Parameter and type(values) is not Tensor:
        values = values.dequantize()
    return values


def _settings(model: PreTrainedModel, adapters: bool) -> dict[str, Any]:
    """The settings that differ from their defaults: later versions of transformers add more defaults."""
    config = model.config.get_text_config()
    given, usual = config.to_dict(), type(config)().to_dict()
    rope = {key: value for key, value in (given.pop("rope_parameters", None) or {}).items() if value is not None}
    idle = IDLE | ({"max_position_embeddings"} if rope.get("rope_type", "default") == "default" else set())
    kept = {
        key: value
        for key, value in given.items()
        if not (key in idle or key.startswith("_") or (key in usual and usual[key] == value))
    }
    more = {"ahn.adapters": weights.adapters(model) if adapters else {}, "ahn.scales": _scales(model)}
    return {"class": type(model).__name__, "rope": rope, **kept, **{key: value for key, value in more.items() if value}}


def _scales(model: PreTrainedModel) -> dict[str, float]:
    """The scale of the scores in each attention module whose scale is not its family's."""
    found = {}
    for name, module in model.named_modules():
        scale, size = vars(module).get("scaling"), vars(module).get("head_dim")
        if not isinstance(scale, int | float) or not isinstance(size, int):
            continue
        config = getattr(module, "config", None)
        numbers = getattr(config, "query_pre_attn_scalar", None) or size  # of Gemma
        usual = getattr(config, "attention_multiplier", None) or numbers**-0.5  # of Granite
        if scale != usual:
            found[name] = scale
    return found


def _sums(tensor: Tensor, factors_W: Tensor) -> Tensor:
    """A weighted sum of the words of each piece, modulo 2**64, [P].

    The factors are odd, so a change of one word always changes the sum. The upper bits of a word are first folded into
    its lower ones: without that, two flipped signs could cancel, because twice the highest bit is 0 modulo 2**64.
    Folding by 33 bits keeps the signs of the two floats in a word apart.
    """
    raw = tensor.contiguous().flatten().view(torch.uint8)
    if len(raw) % 8 or raw.storage_offset() % 8:
        raw = pad(raw, (0, -len(raw) % 8))
    words, sums = raw.view(torch.int64), []
    folded = torch.empty(min(len(words), AT_ONCE), dtype=torch.int64, device=words.device)
    for part in words.split(AT_ONCE):
        mixed = torch.bitwise_right_shift(part, 33, out=folded[: len(part)])
        mixed.bitwise_and_(0x7FFFFFFF).bitwise_xor_(part)
        whole = len(part) // WORDS * WORDS
        if whole:
            sums.append(mixed[:whole].view(-1, WORDS).mul_(factors_W).sum(1))
        if rest := len(part) - whole:
            sums.append(mixed[whole:].mul_(factors_W[:rest]).sum()[None])
    return torch.cat(sums)
