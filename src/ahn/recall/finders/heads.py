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
from ahn.memory.head_keys import UNKNOWN
from ahn.recall.finders.base import Finder
from ahn.recall.passages import Passages
from ahn.recall.question import Question

BLOCK = 1 << 15  # groups of keys that are on the device at once


class Heads(Finder):
    """How closely heads look at a passage for the question's tokens, less what they do for one about nothing ("N/A").

    The attention of a head is a softmax over all keys of the archive. A passage gets that of its most attended key,
    averaged over the tokens of the question and added up over heads.
    """

    name: ClassVar[str] = "heads"

    def scores(self, passages: Passages, question: Question) -> np.ndarray:
        if passages.archive.keys is None:
            raise ConfigError("finder 'heads': the archive holds no keys: expected archive='keys', or finder 'bm25'")
        nothing = passages.archive.memo("nothing", lambda: attention(passages, question.nothing))
        found: np.ndarray = (attention(passages, question.queries) - nothing).cpu().numpy()
        return found


def attention(passages: Passages, queries: dict[int, Tensor]) -> Tensor:
    """Attention to each passage, float32 [P]. `queries`: by layer, [N, Q, H] as `Question.queries`."""
    archive = passages.archive
    assert archive.keys is not None
    heads, total = archive.keys.heads, torch.zeros(len(passages))
    for layer, q in queries.items():
        keys, steps = archive.keys.of(layer), heads.scales[layer][1].to(q.device)
        of_group = [head // heads.groups for head in heads.queries(layer)]
        for place, head in enumerate(heads.kept(layer)):
            mine = q[[i for i, found in enumerate(of_group) if found == head]].float()
            scaled = (mine * steps[place] * q.shape[-1] ** -0.5).flatten(0, 1)
            found = by_passage(scaled, keys[:, place], passages.of_groups(heads.pool, len(keys)), len(passages))
            total += len(mine) * found.mean(0).cpu()
    return total


def by_passage(q: Tensor, keys: Tensor, passage: Tensor, count: int) -> Tensor:
    """Softmax of queries [R, H] over keys int8 [G, H]: its largest value in each passage, [R, P].

    Args:
        keys: they come to the device block by block.
        passage: which of `count` passages each key belongs to, [G], -1 for none.
    """
    largest = torch.full((len(q), count), -torch.inf, device=q.device)
    norm = torch.full((len(q),), -torch.inf, device=q.device)
    dtype = torch.bfloat16 if q.device.type == "cuda" else torch.float32  # which holds all int8 values
    for low in range(0, len(keys), BLOCK):
        k, at = (t[low : low + BLOCK].to(q.device, non_blocking=True) for t in (keys, passage))
        scores = (q.to(dtype) @ k.to(dtype).T).float()
        scores = scores.masked_fill((k[:, 0] == UNKNOWN) | (at < 0), -torch.inf)
        largest.scatter_reduce_(1, at.clamp(min=0).expand_as(scores), scores, "amax")
        norm = torch.logaddexp(norm, scores.logsumexp(1))
    return (largest - norm[:, None].clamp(min=-1e30)).exp()
