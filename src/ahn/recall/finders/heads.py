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
            mine = q[[i for i, group in enumerate(of_group) if group == head]].float()
            scaled = (mine * steps[place] * q.shape[-1] ** -0.5).flatten(0, 1)
            total += (
                len(mine) * by_passage(scaled, keys[:, place], passages.groups(heads.pool, len(keys))).mean(0).cpu()
            )
    return total


def by_passage(q: Tensor, keys: Tensor, bounds: Tensor) -> Tensor:
    """Softmax of queries [R, H] over keys int8 [G, H]: its largest value in each of P passages, [R, P].

    Args:
        keys: they come to the device block by block. bounds: passage i has the keys bounds[i] to bounds[i + 1] - 1.
    """
    largest, norm = [], torch.full((len(q),), -torch.inf, device=q.device)
    dtype = torch.bfloat16 if q.device.type == "cuda" else torch.float32  # which holds all int8 values
    width = max(int(bounds.diff().max()), 1)
    step = max(1, BLOCK // width)
    for low in range(0, len(bounds) - 1, step):
        part = bounds[low : low + step + 1]
        k = keys[int(part[0]) : int(part[-1])].to(q.device, non_blocking=True)
        scores = (q.to(dtype) @ k.to(dtype).T).float().masked_fill(k[:, 0] == UNKNOWN, -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)  # for the ends of shorter passages
        places = part[:-1, None] + torch.arange(width)
        places = torch.where(places < part[1:, None], places - part[0], len(k)).to(q.device)
        largest.append(scores[:, places].amax(2))
        norm = torch.logaddexp(norm, scores.logsumexp(1))
    return (torch.cat(largest, 1) - norm[:, None].clamp(min=-1e30)).exp()
