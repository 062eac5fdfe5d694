"""Generation after the tokens that a cache has seen, with the options of transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.compat import PAST
from ahn.engine.graph import goes_on
from ahn.engine.prefill import Chunks, check_cache, chunks, past_mask, read_chunks, whole_mask
from ahn.errors import ConfigError
from ahn.ids import rows_of
from ahn.interrupts import deferred
from ahn.memory.cache import AHNCache
from ahn.memory.handle import Handle, base_of, handle_of
from ahn.ops import fla

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FEW = 32  # up to this length, replaying the graph per token beats one eager prefill
FEW_AT_FIRST = 512  # the same over all questions, while flash-linear-attention is not loaded: its import takes 5 s
PLAIN = {  # options that `generate`'s own loop knows
    "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "no_repeat_ngram_size", "pad_token_id", "eos_token_id", "bos_token_id", "use_cache", "streamer", "logits_processor",
    "stopping_criteria",
}  # fmt: skip


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: those of the model's generation settings, and the tokenizer's."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}


def generate(
    model: PreTrainedModel,
    ids: Tensor | Sequence[int],
    cache: AHNCache,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`model.generate` on new tokens only, after the tokens that `cache` has seen; `cache` is changed in place.

    Greedy decoding and sampling use a loop of this package, which gives the same tokens with less Python between two of
    them; any option that it does not know leads to transformers' own. Beam search tries its beams on copies, then
    `cache` reads the result.

    Args:
        ids: the new token ids [T] or [B, T]; or all that a tokenizer returns.
        attention_mask: [B, T], 0 for padding, which must be in front. Default: the tokenizer's, else no padding.
        options: those of `model.generate` (max_new_tokens, streamer, ...).

    Returns:
        the generated token ids [B, T_new], without the prompt.

    Raises:
        ConfigError: no tokens or some that do not exist, padding behind text, max_new_tokens below 1, or a cache of
            another model, other weights or another number of rows.
        UnsupportedOperationError: the cache is in use.
        KeyboardInterrupt: after the token in progress, so that `cache` can still be used and saved.
    """
    model = base_of(model)
    new = options.get("max_new_tokens")
    if new is not None and (isinstance(new, bool) or not isinstance(new, Integral) or new < 1):
        raise ConfigError("{max_new_tokens}: expected an integer of at least 1", max_new_tokens=new)
    ids, own_mask = rows_of(ids, handle_of(model).vocabulary)
    check_cache(cache)
    with deferred(ready=True), cache.in_use():  # the handler of Ctrl-C is set once for all tokens
        cache.check_weights()
        mask = whole_mask(cache, ids, own_mask if attention_mask is None else attention_mask)
        seen = torch.cat([past_mask(cache, len(ids)), torch.ones_like(ids).cpu()], 1) if mask is None else mask
        if not seen[:, -1].all():
            raise ConfigError("attention_mask ends with padding: expected it in front of the text")
        ids, seen = ids.to(model.device), seen.to(model.device)
        settings = options.get("generation_config") or model.generation_config
        if (options.get("num_beams") or getattr(settings, "num_beams", None) or 1) > 1:
            return _by_beams(model, ids, cache, seen, options)
        if options.keys() <= PLAIN and (
            settings is None or settings.get_generation_mode() in ("greedy_search", "sample")
        ):
            # the streamer too: transformers itself does not pass it on to a loop that is not its own
            options["custom_generate"] = _NextTokens(options.get("streamer"), padded=mask is not None)
        return _new(model, ids, cache, seen, options)


def _new(model: Any, ids: Tensor, cache: AHNCache, seen: Tensor, options: dict[str, Any]) -> Tensor:
    out = model.generate(ids, attention_mask=seen, **{PAST: cache}, **options)
    return getattr(out, "sequences", out)[:, ids.shape[1] :]


def _by_beams(model: Any, ids: Tensor, cache: AHNCache, seen: Tensor, options: dict[str, Any]) -> Tensor:
    """Beams are rows, and the best one need not be a row at the end: `cache` reads it again."""
    new = _new(model, ids, cache.fork(), seen, options)
    copies = len(new) // len(ids)
    read_ids = torch.cat([ids.repeat_interleave(copies, 0), new[:, :-1]], 1)
    mask = torch.cat([seen.repeat_interleave(copies, 0), torch.ones_like(new[:, :-1])], 1)
    if copies > 1 and cache.batch_size > 1:
        cache.batch_repeat_interleave(copies)
    cut = Chunks(chunks(model, len(read_ids), cache.tokens_seen).size)
    read_chunks(model.get_decoder(), read_ids, cache, cut, mask)
    return new


@dataclass
class _NextTokens:
    """Token by token: the loop for greedy decoding and sampling, as transformers calls it."""

    streamer: Any
    padded: bool

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        """Returns ids [B, T] and the tokens behind them."""
        cache: dict[str, Any] = {PAST: inputs[PAST]}
        pad = generation_config._pad_token_tensor
        going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        handle = handle_of(model)
        left, few = input_ids, _few(handle, cache[PAST].tokens_seen + input_ids.shape[1])
        while not self.padded and 0 < left.shape[1] <= few and goes_on(handle, cache[PAST]):
            logits = model(input_ids=left[:, :1], **cache).logits
            left = left[:, 1:]
            handle.asked += 1
            if handle.graph is None:  # it could not be made
                break
        if left.shape[1]:
            logits = model(left, attention_mask=inputs.get("attention_mask"), **cache, logits_to_keep=1).logits
        rows, positions = cache[PAST].tokens_per_row, None
        if len(set(rows)) > 1:  # rows at the same position are counted by the cache
            positions = torch.tensor(rows, device=input_ids.device)[:, None] - 1
        while True:
            scores = logits_processor(input_ids, logits[:, -1].to(torch.float32, copy=True))
            drawn = generation_config.do_sample
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if drawn else scores.argmax(-1)
            tokens = tokens if pad is None else torch.where(going, tokens, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            going &= ~stopping_criteria(input_ids, None)
            if not going.any():
                break
            if positions is not None:
                cache["position_ids"] = positions = positions + 1
            logits = model(input_ids=tokens[:, None], **cache).logits  # by name: no look at the signature
        if self.streamer is not None:
            self.streamer.end()
        return input_ids


def _few(handle: Handle, total: int) -> int:
    """FEW, or what is left of FEW_AT_FIRST for tokens that end as the `total`-th."""
    first = next((layer for layer in handle.layers if layer.cell is not None), None)
    if first is None or first.cell is None or total <= first.lossless or fla.library.loaded:
        return FEW
    return max(FEW, FEW_AT_FIRST - handle.asked) if first.cell.uses_fla(first.cell.o_proj.weight) else FEW
