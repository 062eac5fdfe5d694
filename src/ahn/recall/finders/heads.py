"""Passages that the model's own retrieval heads look at (QRHead, arXiv 2506.09944).

Letters: N query heads of a layer, C their key/value heads, Q tokens of the question, G groups of keys, P passages,
H head size.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ahn.errors import ConfigError
from ahn.recall.finders.base import Finder
from ahn.recall.passages import Passages
from ahn.recall.question import Question

BLOCK = 1 << 15  # groups of keys that are on the device at once


class Heads(Finder):
    """Attention of the question's tokens to each passage, less that of a question about nothing ("N/A").

    Each head's attention is a softmax over all keys of the archive; a passage gets its keys' sum, averaged over the
    tokens of the question and added up over heads.
    """

    name: ClassVar[str] = "heads"

    def scores(self, passages: Passages, question: Question) -> np.ndarray:
        if passages.archive.keys is None:
            raise ConfigError("finder 'heads': the archive holds no keys: expected archive='keys', or finder 'bm25'")
        nothing = passages.archive.memo("nothing", lambda: attention(passages, question.nothing))
        return (attention(passages, question.queries) - nothing).cpu().numpy()


def attention(passages: Passages, queries: dict[int, Tensor]) -> Tensor:
    """Attention by passage, float32 [P]. `queries`: by layer, [N, Q, H] as `Question.queries`."""
    archive = passages.archive
    assert archive.keys is not None
    heads, total = archive.keys.heads, torch.zeros(len(passages))
    for layer, q in queries.items():
        keys, scales = archive.keys.of(layer)
        kept, asked = heads.kept(layer), heads.queries(layer)
        for place, head in enumerate(kept):
            mine = q[[i for i, query in enumerate(asked) if query // heads.groups == head]]
            count = len(mine)
            found = _by_passage(
                mine.flatten(0, 1) * q.shape[-1] ** -0.5,
                keys[:, place],
                scales[:, place],
                passages.of_groups(heads.pool, len(keys)),
                len(passages),
            )
            total += count * found.mean(0).cpu()
    return total


def _by_passage(q: Tensor, keys: Tensor, scales: Tensor, passage: Tensor, count: int) -> Tensor:
    """Softmax of queries [R, H] over keys int8 [G, H] times scales [G], added up by the passage [G] of each: [R, P].

    Keys come to the device block by block. Sums are relative to the largest score so far.
    """
    sums = torch.zeros(len(q), count, device=q.device)
    largest = torch.full((len(q), 1), -torch.inf, device=q.device)
    for low in range(0, len(keys), BLOCK):
        k, scale, at = (t[low : low + BLOCK].to(q.device, non_blocking=True) for t in (keys, scales, passage))
        scores = (q @ k.to(q.dtype).T).float() * scale.float()
        scores = scores.masked_fill((scale == 0) | (at < 0), -torch.inf)
        new = torch.maximum(largest, scores.amax(1, keepdim=True))
        safe = new.clamp(min=-1e30)
        sums = (sums * (largest - safe).exp()).index_add_(1, at.clamp(min=0), (scores - safe).exp())
        largest = new
    return sums / sums.sum(1, keepdim=True).clamp(min=1e-30)
