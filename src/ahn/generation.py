"""Reading long inputs in constant memory, and generating after them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn import decoding, fused
from ahn.augmentation import base_of, chunk_ends, chunks, frame_of
from ahn.compat import PAST
from ahn.errors import ConfigError
from ahn.ids import mask_of, rows_of
from ahn.interrupts import deferred
from ahn.memory.cache import AHNCache
from ahn.ops import dispatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int | None], None]

FEW = 32  # new tokens that take longer at once, for which Python launches each kernel, than one by one by a graph
FEW_AT_FIRST = 512  # the same in all questions together, before flash-linear-attention, which takes 5 s, is imported
PLAIN = {  # options with which `generate` uses its own loop
    "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "no_repeat_ngram_size", "pad_token_id", "eos_token_id", "bos_token_id", "use_cache", "streamer", "logits_processor",
    "stopping_criteria",
}  # fmt: skip


@torch.no_grad()
def read(
    model: PreTrainedModel,
    ids: Tensor | Sequence[int] | Iterator[Any],
    cache: AHNCache | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
    attention_mask: Tensor | None = None,
    archive: str = "none",
) -> AHNCache:
    """Read tokens into a memory, chunk by chunk: memory use does not grow with their number.

    Args:
        model: from `ahn.augment` or `ahn.from_pretrained`.
        ids: token ids [T] or [B, T], at least one, or all that a tokenizer returns. An iterator gives pieces [T] of one
            text that are read as they come.
        cache: read on from here; it is changed in place. Default: a new one.
        chunk: tokens at once, default 512, on CUDA 8,192 or more; up to an eighth more in the last one.
        progress: called with (tokens read, tokens in all) after each chunk; None in all for an iterator.
        attention_mask: [B, T], 0 for padding; not for an iterator.
        archive: of a new cache, as `AHNCache`: "text" or "keys" lets `ahn.ask` find passages in what was read.

    Returns:
        the cache, with `last_logits` [B, V]: those after the last token.

    Raises:
        ConfigError: no tokens or some that do not exist, a chunk below 1, or a cache of another model or other weights.
        UnsupportedOperationError: the cache is in use.
        KeyboardInterrupt: after the chunk in progress, so that `cache` can still be used and saved.
    """
    model = base_of(model)
    vocabulary = frame_of(model).vocabulary
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ConfigError(f"chunk={chunk!r}: expected an integer of at least 1")
    if isinstance(ids, Iterator) and attention_mask is not None:
        raise ConfigError("attention_mask: an iterator of ids has no padding")
    rows, own_mask = (None, None) if isinstance(ids, Iterator) else rows_of(ids, vocabulary)
    if cache is not None and archive != "none":
        raise ConfigError(f"archive={archive!r} with a cache: expected AHNCache(model, archive={archive!r})")
    cache = AHNCache(model, archive) if cache is None else _checked(cache)
    with cache.in_use():
        cache.check_weights()
        if rows is None:
            hidden = _read_pieces(
                model,
                (rows_of(piece, vocabulary)[0][0] for piece in ids if not hasattr(piece, "__len__") or len(piece)),
                cache,
                chunk,
                progress,
            )
        else:
            mask = _whole_mask(cache, rows, own_mask if attention_mask is None else attention_mask)
            first, chunk = chunks(model, len(rows), cache.tokens_seen) if chunk is None else (chunk, chunk)
            hidden = read_chunks(model.get_decoder(), rows.to(model.device), cache, chunk, mask, progress, first)
        cache.last_logits = model.get_output_embeddings()(hidden)
    return cache


def _read_pieces(
    model: Any, pieces: Iterator[Tensor], cache: AHNCache, chunk: int | None, progress: Progress | None
) -> Tensor:
    """The last hidden state [1, D] after pieces of one text, read in the chunks of the whole."""
    first, chunk = chunks(model, 1, cache.tokens_seen) if chunk is None else (chunk, chunk)
    done, hidden = 0, None

    def note(read: int, total: int | None) -> None:
        if progress is not None:
            progress(done + read, None)

    with finish_before_interrupt() as interrupted:
        for part in _chunks_of(pieces, first, chunk):
            if interrupted.is_set():
                raise KeyboardInterrupt
            ids, length = part[None].to(model.device), len(part)
            hidden = read_chunks(model.get_decoder(), ids, cache, length, progress=note, known=done + length)
            done += length
        if interrupted.is_set():
            raise KeyboardInterrupt
    if hidden is None:
        raise ConfigError("no ids in the iterator: expected at least one token id")
    return hidden


def _chunks_of(pieces: Iterable[Tensor], first: int, chunk: int) -> Iterator[Tensor]:
    """Pieces [T] of one text as the chunks that `chunk_ends` has for the whole."""
    held, waiting = torch.empty(0, dtype=torch.long), []
    size = first
    for piece in pieces:
        waiting.append(piece)
        if len(held) + sum(map(len, waiting)) < size + chunk // 8:
            continue
        held, waiting = torch.cat([held, *waiting]), []
        while len(held) >= size + chunk // 8 and len(held) > size:
            yield held[:size]
            held, size = held[size:], chunk
    held = torch.cat([held, *waiting])
    for low, high in pairwise([0, *chunk_ends(len(held), size, chunk)]) if len(held) else ():
        yield held[low:high]


@torch.no_grad()
def read_chunks(
    decoder: Any,
    ids: Tensor,
    cache: AHNCache,
    chunk: int,
    mask: Tensor | None = None,
    progress: Progress | None = None,
    first: int | None = None,
    known: int | None = None,
) -> Tensor:
    """`read` below the language-model head: returns the last hidden state [B, D]. `mask` covers the past as well, or
    only `ids` where there is none. `first`: tokens of the first chunk, if not as many as of the others. `known`: tokens
    of the text so far, if `ids` are a part of it."""
    total = ids.shape[1]
    past = 0 if mask is None else mask.shape[1] - total
    hidden: Tensor | None = None
    compiles = dispatch.between_many(ids.device.type, known or total).name == "inductor"
    worth = max(2, min(chunk, dispatch.PLANNED))  # a shorter rest is attended otherwise: all would be compiled again
    with finish_before_interrupt() as interrupted:
        low = 0
        for high in chunk_ends(total, first or chunk, chunk):
            piece = ids[:, low:high]
            seen = None if mask is None else mask[:, : past + low + piece.shape[1]].to(piece.device)
            with fused.compiled_for_reading(decoder) if compiles and piece.shape[1] >= worth else nullcontext():
                states = decoder(piece, attention_mask=seen, **{PAST: cache}, use_cache=True).last_hidden_state
            hidden = _last_real(states, None if seen is None else seen[:, -piece.shape[1] :], hidden)
            low = high
            if progress is not None:
                progress(low, total)
            if interrupted.is_set():
                raise KeyboardInterrupt
    assert hidden is not None
    return hidden


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
    """`model.generate` on new tokens only, going on from what `cache` has seen; `cache` is changed in place.

    Greedy decoding and sampling go through a loop of this package, which gives the same tokens with less Python between
    two of them; with any option that it does not know transformers' own is used. Beam search tries its beams on copies,
    then `cache` reads what was found.

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
        raise ConfigError(f"max_new_tokens={new!r}: expected an integer of at least 1")
    ids, own_mask = rows_of(ids, frame_of(model).vocabulary)
    _checked(cache)
    with deferred(ready=True), cache.in_use():  # the handler of Ctrl-C is set once for all tokens
        cache.check_weights()
        mask = _whole_mask(cache, ids, own_mask if attention_mask is None else attention_mask)
        seen = torch.cat([_past(cache, len(ids)), torch.ones_like(ids).cpu()], 1) if mask is None else mask
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
            options["custom_generate"] = partial(
                _next_tokens, streamer=options.get("streamer"), padded=mask is not None
            )
        return _new(model, ids, cache, seen, options)


def _new(model: Any, ids: Tensor, cache: AHNCache, seen: Tensor, options: dict[str, Any]) -> Tensor:
    out = model.generate(ids, attention_mask=seen, **{PAST: cache}, **options)
    return getattr(out, "sequences", out)[:, ids.shape[1] :]


def _by_beams(model: Any, ids: Tensor, cache: AHNCache, seen: Tensor, options: dict[str, Any]) -> Tensor:
    """Beams are rows, of which the found ones need not be left at the end: `cache` reads these again."""
    new = _new(model, ids, cache.fork(), seen, options)
    copies = len(new) // len(ids)
    read_ids = torch.cat([ids.repeat_interleave(copies, 0), new[:, :-1]], 1)
    mask = torch.cat([seen.repeat_interleave(copies, 0), torch.ones_like(new[:, :-1])], 1)
    if copies > 1 and cache.batch_size > 1:
        cache.batch_repeat_interleave(copies)
    read_chunks(model.get_decoder(), read_ids, cache, chunks(model, len(read_ids), cache.tokens_seen)[1], mask)
    return new


def _checked(cache: Any) -> AHNCache:
    if not isinstance(cache, AHNCache):
        raise ConfigError(f"cache of type {type(cache).__name__}: expected an ahn.AHNCache")
    return cache


def _whole_mask(cache: AHNCache, ids: Tensor, mask: Any) -> Tensor | None:
    """The attention mask [B, tokens seen + T] of `ids` [B, T] after `cache`; None if nothing is padding.
    Raises ConfigError if the sizes do not fit."""
    batch, length = ids.shape
    rows = max(cache.batch_size, 1)
    if rows not in (1, batch):
        raise ConfigError(f"batch of {batch} on a cache of {rows} rows: expected {rows}")
    if mask is None:
        return None
    mask = mask_of(mask).cpu()
    if mask.shape == (batch, length):
        mask = torch.cat([_past(cache, batch), mask], 1)
    if mask.shape != (batch, cache.tokens_seen + length):
        raise ConfigError(f"attention_mask of shape {list(mask.shape)}: expected {[batch, length]}")
    return None if mask[:, -length:].all() else mask


def _next_tokens(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    padded: bool = False,
    **inputs: Any,
) -> Tensor:
    """Token by token, as transformers' loop for greedy decoding and sampling calls it: ids [B, T] with those behind."""
    cache: dict[str, Any] = {PAST: inputs[PAST]}
    pad = generation_config._pad_token_tensor
    going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    left, few = input_ids, _few(model, cache[PAST].tokens_seen + input_ids.shape[1])
    while not padded and 0 < left.shape[1] <= few and decoding.goes_on(model, cache[PAST]):
        logits = model(input_ids=left[:, :1], **cache).logits
        left = left[:, 1:]
        model._ahn_frame.asked += 1
        if model._ahn_frame.graph is None:  # it could not be made
            break
    if left.shape[1]:
        logits = model(left, attention_mask=inputs.get("attention_mask"), **cache, logits_to_keep=1).logits
    rows, places = cache[PAST].tokens_per_row, None
    if len(set(rows)) > 1:  # rows at the same position are counted by the cache
        places = torch.tensor(rows, device=input_ids.device)[:, None] - 1
    while True:
        scores = logits_processor(input_ids, logits[:, -1].to(torch.float32, copy=True))
        drawn = generation_config.do_sample
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if drawn else scores.argmax(-1)
        tokens = tokens if pad is None else torch.where(going, tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], 1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        going &= ~stopping_criteria(input_ids, None)
        if not going.any():
            break
        if places is not None:
            cache["position_ids"] = places = places + 1
        logits = model(input_ids=tokens[:, None], **cache).logits  # by name: no look at the signature
    if streamer is not None:
        streamer.end()
    return input_ids


def _few(model: Any, total: int) -> int:
    """FEW, or what is left of FEW_AT_FIRST for tokens that end as the `total`-th."""
    layers = (layer.self_attn.ahn for layer in model.get_decoder().layers)
    first = next((layer for layer in layers if layer.cell is not None), None)
    if first is None or total <= first.lossless or "fla" in sys.modules:
        return FEW
    return max(FEW, FEW_AT_FIRST - model._ahn_frame.asked) if first.cell.uses_fla(first.cell.o_proj.weight) else FEW


def _last_real(states: Tensor, real: Tensor | None, before: Tensor | None) -> Tensor:
    """[B, D] of each row's last real token in `states` [B, T, D]; `before` for rows that have none."""
    if real is None:
        return states[:, -1]
    places = torch.arange(1, states.shape[1] + 1, device=states.device) * real.to(states.device)
    last = places.argmax(1)
    found = states[torch.arange(len(states), device=states.device), last]
    return found if before is None else torch.where(places.any(1)[:, None], found, before)


def _past(cache: AHNCache, batch: int) -> Tensor:
    """An attention mask [B, tokens seen] with as many ones in each row as it has real tokens behind it."""
    rows = torch.tensor(cache.tokens_per_row)
    rows = rows.expand(batch) if len(rows) == 1 else rows
    return (torch.arange(cache.tokens_seen) >= cache.tokens_seen - rows[:, None]).long()


@contextmanager
def finish_before_interrupt() -> Iterator[threading.Event]:
    """Within, Ctrl-C sets the event instead of breaking a chunk half-way; a second one breaks at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
