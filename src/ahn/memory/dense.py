"""Reading many tokens into a memory whose buffer is used where it lies: dense attention, merged by normalisers.

Letters: B batch, N query heads, M key/value heads, T tokens, H head size, S sinks, W window.

What a piece of at most W tokens sees, once the window is full, are four sets of keys, and none needs a mask that
fused kernels do not have:

    sinks      all of them, for every query
    old        the tokens that the piece pushes out: query i still sees those after the i-th. Backwards, that is causal
    between    what stays in the window for the whole piece: all of it, for every query
    new        the piece itself: causal

Attention does not care about order, so `between` is read from the ring as it lies, in one slice or two; only `old`,
which the cell is given too, is copied. While the window is not full there are no old ones, and what is in the buffer
is seen by every query. Pieces are cut where the sinks and the first window end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ahn.memory.buffer import LayerMemory
from ahn.memory.span import Span
from ahn.ops.softmax import Softmax, attend

Merge = Callable[[list[Softmax], Softmax | None], Softmax]  # as `ahn.ops.softmax.merge_all`


def pieces(span: Span, sinks: int, window: int | None) -> list[Span]:
    """`span` cut where sinks and first window end, and into at most `window` tokens; made once for all layers."""
    if window is None:
        return [span]
    return span.once("pieces", lambda: _cut(span, sinks, window))


def _cut(span: Span, sinks: int, window: int) -> list[Span]:
    start, end = span.first, span.first + span.length
    cuts = [start, *(cut for cut in (sinks, sinks + window) if start < cut < end)]
    while end - cuts[-1] > window:
        cuts.append(cuts[-1] + window)
    lengths = [high - low for low, high in zip(cuts, [*cuts[1:], end], strict=True)]
    return [Span(torch.tensor([cut]), n, [n]) for cut, n in zip(cuts, lengths, strict=True)]


def attend_piece(
    q: Tensor,
    q_sinks: Tensor,
    new: tuple[Tensor, ...],
    memory: LayerMemory,
    piece: Span,
    scale: float,
    merge: Merge,
) -> tuple[Softmax, tuple[Tensor, ...] | None]:
    """Attend to sinks and window and put a piece of `pieces` into the buffer.

    Args:
        q, q_sinks: [B, N, T, H], as the window and as the sinks meet them.
        new: keys, values [B, M, T, H] and gate inputs [B, T, G * N], if there are any, of the piece.
        merge: makes one attention of several.

    Returns:
        attention, and keys, values and gate inputs of the tokens that the piece pushes out, in order, or None.
    """
    start, count, sinks = piece.first, piece.length, memory.sinks
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
