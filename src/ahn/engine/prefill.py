"""Reading long inputs in constant memory, chunk by chunk.

Letters: B batch, T tokens, D hidden size, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ahn.compat import PAST
from ahn.engine.compile import compiled_for_reading
from ahn.errors import ConfigError
from ahn.ids import mask_of, rows_of
from ahn.interrupts import finish_before_interrupt
from ahn.memory.cache import AHNCache
from ahn.memory.handle import base_of, handle_of
from ahn.ops import dispatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHUNK = 512  # tokens read at once: enough for efficient products, few enough that activations need little memory
GPU_CHUNK = 8192  # tokens of all rows, at least: they keep a GPU busy for longer than Python needs to launch them
GPU_NUMBERS = 1 << 25  # of a chunk's hidden states: a small hidden size allows more tokens
Progress = Callable[[int, int | None], None]


class Chunks(NamedTuple):
    """Where a text is cut into the chunks that are read at once."""

    size: int  # tokens of a chunk
    first: int | None = None  # of the first chunk; None: as many as of the others
    before: int = 0  # tokens of the same text that earlier calls have read

    def ends(self, total: int) -> list[int]:
        """Ends of the chunks of `total` tokens. A last chunk of less than an eighth is joined to the one before it,
        because Python would need as long for it as for any other."""
        ends = [*range(self.first or self.size, total, self.size), total]
        if len(ends) > 1 and total - ends[-2] < self.size // 8:
            del ends[-2]
        return ends


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
    vocabulary = handle_of(model).vocabulary
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ConfigError("{chunk}: expected an integer of at least 1", chunk=chunk)
    if isinstance(ids, Iterator) and attention_mask is not None:
        raise ConfigError("attention_mask: an iterator of ids has no padding")
    rows, own_mask = (None, None) if isinstance(ids, Iterator) else rows_of(ids, vocabulary)
    if cache is not None and archive != "none":
        raise ConfigError("{archive} with a cache: expected AHNCache(model, {archive})", archive=archive)
    cache = AHNCache(model, archive) if cache is None else check_cache(cache)
    cut = chunks(model, 1 if rows is None else len(rows), cache.tokens_seen) if chunk is None else Chunks(chunk)
    with cache.in_use():
        cache.check_weights()
        if rows is None:
            hidden = _read_pieces(
                model,
                (rows_of(piece, vocabulary)[0][0] for piece in ids if not hasattr(piece, "__len__") or len(piece)),
                cache,
                cut,
                progress,
            )
        else:
            mask = whole_mask(cache, rows, own_mask if attention_mask is None else attention_mask)
            hidden = read_chunks(model.get_decoder(), rows.to(model.device), cache, cut, mask, progress)
        cache.last_logits = model.get_output_embeddings()(hidden)
    return cache


def _read_pieces(
    model: Any, pieces: Iterator[Tensor], cache: AHNCache, cut: Chunks, progress: Progress | None
) -> Tensor:
    """The last hidden state [1, D] after pieces of one text, read in the chunks of the whole."""
    done, hidden = 0, None

    def note(read: int, total: int | None) -> None:
        if progress is not None:
            progress(done + read, None)

    with finish_before_interrupt() as interrupted:
        for part in _chunks_of(pieces, cut):
            if interrupted.is_set():
                raise KeyboardInterrupt
            ids, length = part[None].to(model.device), len(part)
            hidden = read_chunks(model.get_decoder(), ids, cache, Chunks(length, before=done), progress=note)
            done += length
        if interrupted.is_set():
            raise KeyboardInterrupt
    if hidden is None:
        raise ConfigError("no ids in the iterator: expected at least one token id")
    return hidden


def _chunks_of(pieces: Iterable[Tensor], cut: Chunks) -> Iterator[Tensor]:
    """The chunks of one text that comes in pieces [T]: the same that `Chunks.ends` gives for the whole text."""
    held, waiting = torch.empty(0, dtype=torch.long), []
    size, rest = cut.first or cut.size, cut.size // 8
    for piece in pieces:
        waiting.append(piece)
        if len(held) + sum(map(len, waiting)) < size + rest:
            continue
        held, waiting = torch.cat([held, *waiting]), []
        while len(held) >= size + rest and len(held) > size:
            yield held[:size]
            held, size = held[size:], cut.size
    held = torch.cat([held, *waiting])
    for low, high in pairwise([0, *Chunks(cut.size, size).ends(len(held))]) if len(held) else ():
        yield held[low:high]


@torch.no_grad()
def read_chunks(
    decoder: Any,
    ids: Tensor,
    cache: AHNCache,
    cut: Chunks,
    mask: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """`read` below the language-model head: returns the last hidden state [B, D]. `mask` covers the past as well, or
    only `ids` where there is none."""
    total = ids.shape[1]
    past = 0 if mask is None else mask.shape[1] - total
    hidden: Tensor | None = None
    compiles = dispatch.pick_between_many(ids.device.type, cut.before + total).name == "inductor"
    worth = max(
        2, min(cut.size, dispatch.PLANNED)
    )  # a shorter rest uses other kernels, and all would be compiled again
    with finish_before_interrupt() as interrupted:
        low = 0
        for high in cut.ends(total):
            piece = ids[:, low:high]
            seen = None if mask is None else mask[:, : past + low + piece.shape[1]].to(piece.device)
            with compiled_for_reading(decoder) if compiles and piece.shape[1] >= worth else nullcontext():
                states = decoder(piece, attention_mask=seen, **{PAST: cache}, use_cache=True).last_hidden_state
            hidden = _last_real(states, None if seen is None else seen[:, -piece.shape[1] :], hidden)
            low = high
            if progress is not None:
                progress(low, total)
            if interrupted.is_set():
                raise KeyboardInterrupt
    assert hidden is not None
    return hidden


def check_cache(cache: Any) -> AHNCache:
    if not isinstance(cache, AHNCache):
        raise ConfigError(f"cache of type {type(cache).__name__}: expected an ahn.AHNCache")
    return cache


def whole_mask(cache: AHNCache, ids: Tensor, mask: Any) -> Tensor | None:
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
        mask = torch.cat([past_mask(cache, batch), mask], 1)
    if mask.shape != (batch, cache.tokens_seen + length):
        raise ConfigError(f"attention_mask of shape {list(mask.shape)}: expected {[batch, length]}")
    return None if mask[:, -length:].all() else mask


def _last_real(states: Tensor, real: Tensor | None, before: Tensor | None) -> Tensor:
    """[B, D] of each row's last real token in `states` [B, T, D]; `before` for rows that have none."""
    if real is None:
        return states[:, -1]
    order = torch.arange(1, states.shape[1] + 1, device=states.device) * real.to(states.device)
    last = order.argmax(1)
    found = states[torch.arange(len(states), device=states.device), last]
    return found if before is None else torch.where(order.any(1)[:, None], found, before)


def past_mask(cache: AHNCache, batch: int) -> Tensor:
    """An attention mask [B, tokens seen] with as many ones in each row as it has real tokens behind it."""
    rows = torch.tensor(cache.tokens_per_row)
    rows = rows.expand(batch) if len(rows) == 1 else rows
    return (torch.arange(cache.tokens_seen) >= cache.tokens_seen - rows[:, None]).long()


def chunks(model: PreTrainedModel, rows: int, seen: int) -> Chunks:
    """The chunks of texts in `rows` rows after `seen` tokens.

    On CUDA a wide window is a whole number of chunks and begins with one, so that attention has few shapes: cuDNN plans
    for each. Attention over a narrow window or with a store uses our own kernel, which takes any shape.
    """
    if model.device.type != "cuda":
        return Chunks(CHUNK)
    config = handle_of(model).config
    most = max(GPU_CHUNK, GPU_NUMBERS // model.get_decoder().config.hidden_size)
    most = max(CHUNK, most // rows // CHUNK * CHUNK)
    narrow = config.window <= dispatch.NARROW and dispatch.pick_eviction("cuda").name == "triton"
    if narrow or config.store is not None or config.window < CHUNK:
        return Chunks(most)
    size = config.window // -(-config.window // most)
    return Chunks(size, first=size + (config.sinks - seen) % size)
