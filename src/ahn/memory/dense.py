"""Reading many tokens into a memory whose buffer is used where it lies: dense attention, merged by normalisers.

Letters: B batch, N query heads, M key/value heads, T tokens, H head size, S sinks, W window.

Once the window is full, a piece of at most W tokens sees four sets of keys. None needs a mask that fused kernels do
not have:

    sinks      all of them, for every query
    old        the tokens that the piece evicts: query i still sees those after the i-th. Backwards, that is causal
    between    the tokens that stay in the window for the whole piece: all of them, for every query
    new        the piece itself: causal

Attention does not care about order, so `between` is read from the ring as it lies, in one slice or two; only `old`,
which the cell gets too, is copied. While the window is not full nothing is evicted, and every query sees the whole
buffer. Pieces are cut where the sinks and the first window end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ahn.memory.batch import ForwardBatch, LayerBatch
from ahn.memory.buffer import LayerMemory
from ahn.ops.softmax import AttentionOutput, attend

Merge = Callable[[list[AttentionOutput], AttentionOutput | None], AttentionOutput]  # as `ahn.ops.softmax.merge_all`


def cuts(batch: ForwardBatch, sinks: int, window: int | None) -> list[tuple[slice, ForwardBatch]]:
    """`batch` cut where sinks and first window end, and into at most `window` tokens; made once for all layers."""
    if window is None:
        return [(slice(None), batch)]
    return batch.memo("cuts", lambda: _cut(batch, sinks, window))


def _cut(batch: ForwardBatch, sinks: int, window: int) -> list[tuple[slice, ForwardBatch]]:
    start, end = batch.first, batch.first + batch.length
    lows = [start, *(cut for cut in (sinks, sinks + window) if start < cut < end)]
    while end - lows[-1] > window:
        lows.append(lows[-1] + window)
    return [
        (slice(low - start, high - start), ForwardBatch(torch.tensor([low]), high - low, [high - low]))
        for low, high in zip(lows, [*lows[1:], end], strict=True)
    ]


def attend_piece(
    piece: LayerBatch, memory: LayerMemory, merge: Merge
) -> tuple[AttentionOutput, tuple[Tensor, ...] | None]:
    """Attend to sinks and window and put a piece of `cuts` into the buffer.

    Args:
        merge: makes one attention of several.

    Returns:
        attention, and keys, values and gate inputs of the tokens that the piece evicts, in order, or None.
    """
    q, q_sinks, new, scale = piece.q, piece.queries_of_kept, piece.tokens, piece.scale
    start, count, sinks = piece.batch.first, piece.batch.length, memory.sinks
    buffers = tuple(t for t in (memory.keys, memory.values, memory.inputs) if t is not None)
    parts = [attend(q, new[0], new[1], None, scale, causal=True)]
    if memory.window is None or start < sinks + memory.window:
        for buffer, tokens in zip(buffers, new, strict=True):
            _slots(buffer, start, count).copy_(tokens)
        if not start:
            return parts[0], None
        parts.append(attend(q, _slots(buffers[0], 0, start), _slots(buffers[1], 0, start), None, scale))
        return merge(parts, None), None
    window = memory.window
    first = (start - sinks) % window  # of the oldest token, behind the sinks
    wrapped = max(0, first + count - window)
    taken = [(at, length) for at, length in ((first, count - wrapped), (0, wrapped)) if length]
    staying = [(wrapped, first - wrapped), (first + count, window - first - count)]
    old = tuple(
        torch.cat([_slots(buffer, sinks + at, length) for at, length in taken], 1 if buffer.dim() == 3 else 2)
        for buffer in buffers
    )
    for buffer, tokens in zip(buffers, new, strict=True):
        low = 0
        for at, length in taken:
            _slots(buffer, sinks + at, length).copy_(_slots(tokens, low, length))
            low += length
    keys, values = buffers[:2]
    for at, length in staying:
        if length > 0:
            part = attend(q, _slots(keys, sinks + at, length), _slots(values, sinks + at, length), None, scale)
            parts.append(part)
    if sinks:
        parts.append(attend(q_sinks, keys[:, :, :sinks], values[:, :, :sinks], None, scale))
    early = None
    if count > 1:
        query, key, value = (t.flip(2) for t in (q[:, :, :-1], old[0][:, :, 1:], old[1][:, :, 1:]))
        early = attend(query, key, value, None, scale, causal=True)
    return merge(parts, early), old


def _slots(buffer: Tensor, first: int, count: int) -> Tensor:
    """A view of consecutive slots, or tokens: [B, M, T, H] or [B, T, G]."""
    return buffer.narrow(1 if buffer.dim() == 3 else 2, first, max(0, count))
