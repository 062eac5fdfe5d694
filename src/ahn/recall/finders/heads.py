"""Passages that the model's own retrieval heads look at (QRHead, arXiv 2506.09944).

Letters: N query heads of a layer, C their key/value heads, Q tokens of the question, G groups of keys, P passages,
H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ahn.errors import ConfigError
from ahn.memory.head_keys import UNKNOWN
from ahn.recall.finders.base import Finder
from ahn.recall.passages import Passages
from ahn.recall.question import Question

BLOCK = 1 << 15  # groups of keys that are on the device at once
SCORES = 1 << 22  # products with them, at once: fewer keys where a question has many tokens
LOWEST = -1e30  # in place of -inf where a difference is taken


class Heads(Finder):
    """Attention of retrieval heads from the question to a passage, less that from a question about nothing ("N/A").

    The attention of a head is a softmax over all keys of the archive. A passage gets that of its most attended key,
    averaged over the tokens of the question and added up over heads.
    """

    name: ClassVar[str] = "heads"

    def scores(self, passages: Passages, question: Question) -> np.ndarray:
        if passages.archive.keys is None:
            raise ConfigError(
                "{finder}: the archive holds no keys: expected {archive}, or the finder 'bm25'",
                finder="heads",
                archive="keys",
            )
        found: np.ndarray = (looked_at(passages, question) - nothing(passages, question)).numpy()
        return found


def looked_at(passages: Passages, question: Question) -> Tensor:
    """Attention to each passage for a question, float32 [P]."""
    found: Tensor = question.memo("attention", lambda: attention(passages, question.queries))
    return found


def nothing(passages: Passages, question: Question) -> Tensor:
    """Attention to each passage for a question about nothing, float32 [P]."""
    found: Tensor = passages.archive.memo("nothing", lambda: attention(passages, question.nothing))
    return found


def attention(passages: Passages, queries: dict[int, Tensor]) -> Tensor:
    """Attention to each passage, float32 [P] on the host. `queries`: by layer, [N, Q, H] as `Question.queries`."""
    archive = passages.archive
    assert archive.keys is not None
    heads, found = archive.keys.heads, []
    for layer, q in queries.items():
        keys, steps = archive.keys.of(layer), heads.scales[layer][1].to(q.device)
        bounds = passages.groups(heads.pool, len(keys))
        of_group = [head // heads.groups for head in heads.queries(layer)]
        for place, head in enumerate(heads.kept(layer)):
            mine = q[[i for i, group in enumerate(of_group) if group == head]].float()
            scaled = (mine * steps[place] * q.shape[-1] ** -0.5).flatten(0, 1)
            found.append(len(mine) * by_passage(scaled, keys[:, place], bounds).mean(0))
    return sum(found[1:], found[0]).cpu()


def by_passage(q: Tensor, keys: Tensor, bounds: Tensor) -> Tensor:
    """Softmax of queries [R, H] over keys int8 [G, H]: its largest value in each of P passages, [R, P].

    Args:
        keys: on the host; they come to the device of `q` block by block.
        bounds: on the host; passage i has the keys bounds[i] to bounds[i + 1] - 1.
    """
    largest, norm, products = [], torch.full((len(q),), -torch.inf, device=q.device), products_with(q)
    groups = min(BLOCK, SCORES // len(q))
    step = max(1, groups // max(int(bounds.diff().max()), 1))
    parts = [bounds[low : low + step + 1] for low in range(0, len(bounds) - 1, step)]
    blocks = on_device([keys[int(part[0]) : int(part[-1])] for part in parts], q.device)
    for part, k in zip(parts, blocks, strict=True):
        scores, unknown = products(k), k[:, 0] == UNKNOWN
        if unknown.is_cuda or unknown.any():  # a GPU would have to be waited for
            scores.masked_fill_(unknown, -torch.inf)
        tops = largest_of(scores, part - part[0])
        largest.append(tops)
        top = tops.amax(1, keepdim=True).clamp(min=LOWEST)
        norm = torch.logaddexp(norm, scores.sub_(top).exp_().sum(1).log() + top[:, 0])
    return (torch.cat(largest, 1) - norm[:, None].clamp(min=LOWEST)).exp()


def on_device(blocks: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Blocks of keys [G, H], each in turn on the device, and no longer than until the next.

    Two page-locked buffers lie between the host's memory and a GPU: the host fills one while the GPU works on the
    other.
    """
    if device.type != "cuda":
        yield from blocks
        return
    shape = max(map(len, blocks)), blocks[0].shape[1]
    buffers = [torch.empty(shape, dtype=blocks[0].dtype, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers]
    stream = torch.cuda.current_stream(device)
    for index, block in enumerate(blocks):
        buffer, event = buffers[index % 2], copied[index % 2]
        event.synchronize()
        held = buffer[: len(block)].copy_(block).to(device, non_blocking=True)
        event.record(stream)
        yield held


def products_with(q: Tensor) -> Callable[[Tensor], Tensor]:
    """Products of queries [R, H] with keys int8 [G, H], float32 [R, G].

    A CPU multiplies int8 with int8 three times as fast as bfloat16, so there each query is rounded to 127 steps either
    way. A GPU takes float16, which holds all int8 values and more digits of the scores than bfloat16.
    """
    if q.device.type == "cpu" and torch.backends.mkldnn.is_available():
        step = q.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        rounded = (q / step).round().to(torch.int8)
        return lambda k: torch._int_mm(rounded, k.contiguous().T) * step
    dtype = torch.float16 if q.device.type == "cuda" else torch.float32
    return lambda k: (q.to(dtype) @ k.to(dtype).T).float()


def largest_of(scores: Tensor, bounds: Tensor) -> Tensor:
    """Largest of scores [R, G] in each passage, [R, P]; -inf in one without keys. `bounds` [P + 1]: from 0 to G."""
    if scores.device.type != "cpu":
        return gathered(scores, bounds)
    starts, filled = bounds[:-1].numpy(), (bounds[:-1] < bounds[1:]).numpy()
    found = np.full((len(scores), len(starts)), -np.inf, np.float32)
    if filled.any():  # ten times as fast as `gathered`
        found[:, filled] = np.maximum.reduceat(scores.numpy(), starts[filled], axis=1)
    return torch.from_numpy(found)


def gathered(scores: Tensor, bounds: Tensor) -> Tensor:
    """`largest_of` for a GPU: every passage is read as if it were as long as the longest, and the excess is masked."""
    width = int(bounds.diff().max())
    ends = bounds.to(scores.device, non_blocking=True)
    places = ends[:-1, None] + torch.arange(width, device=scores.device)
    found = scores[:, places.clamp(max=scores.shape[1] - 1)]
    return found.masked_fill_(places >= ends[1:, None], -torch.inf).amax(2)
