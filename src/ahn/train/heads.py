"""Chooses the retrieval heads of a base: the heads that look at the passage which answers a question.

As QRHead (arXiv 2506.09944) does, heads are ranked on questions whose evidence is known, by the share of their
attention that falls on it. Here keys and queries have no positions (`ahn.memory.head_keys`), so a head must find the
passage by its content.

Letters: N query heads, M key/value heads, T tokens, H head size, P passages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ahn.adapter_files import base_shape
from ahn.engine.prefill import read
from ahn.errors import ConfigError
from ahn.memory.archive import KEY_BYTES
from ahn.memory.cache import AHNCache
from ahn.memory.handle import layers_of
from ahn.memory.head_keys import RetrievalHeads
from ahn.recall.passages import cut_text
from ahn.recall.question import NOTHING, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ahn.eval.prompts import Prompt
    from ahn.eval.tasks.base import Example

DISTANCE = 512
EACH = 16  # questions about a text
LEAST = 0.3  # of the best head's score: heads below it are not chosen
MOST = 24  # query heads

Work = tuple["Prompt", "Example"]


@torch.no_grad()
def choose_heads(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Work],
    budget: int = KEY_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> RetrievalHeads:
    """The best heads whose keys take at most `budget` bytes a token.

    Args:
        model: from `ahn.augment`. It reads the texts through its window, as it will later.
        questions: prompts with `asks` and `needs`. Questions about one text must follow each other.
        progress: called with (questions done, questions in all).

    Raises:
        ConfigError: no question has evidence behind the window, or the budget is below one head's keys.
    """
    config = model.config.get_text_config()
    heads, size = config.num_attention_heads, base_shape(config)["head_dim"]
    groups = heads // config.num_key_value_heads
    if budget < size:
        raise ConfigError(f"budget={budget}: expected at least the {size} bytes of one head's keys")
    share = torch.zeros(len(layers_of(model)), heads)
    every = {layer: range(heads) for layer in range(len(share))}
    asked, spread = 0, _Spread()
    text: Any = None
    for done, (prompt, example) in enumerate(questions):
        if prompt.text != text:
            text = prompt.text
            keys, memory = _read(model, text)
            spread.add(keys)
        passages = cut_text(np.asarray(text, np.int32), tokenizer)
        passages = passages[passages <= len(text) - model.ahn_config.window]
        gold = _evidence(passages, prompt)
        if gold.any():
            asks = [
                Question(asked_for, model, tokenizer, memory).queries_of(every, DISTANCE)
                for asked_for in (example.question, NOTHING)
            ]
            share += _share(asks, keys, passages, gold, groups)
            asked += 1
        if progress is not None:
            progress(done + 1, len(questions))
    if not asked:
        raise ConfigError(
            f"{len(questions)} questions: none has evidence behind the window of {model.ahn_config.window}"
        )
    chosen = best_heads(share / asked, groups, budget // size)
    layers = sorted({layer for layer, _ in chosen})
    kept = {layer: sorted({head // groups for at, head in chosen if at == layer}) for layer in layers}
    scales = {layer: spread.scales(layer)[:, kept[layer]].clone() for layer in layers}
    return RetrievalHeads(tuple(chosen), groups, scales, 1, DISTANCE)


def best_heads(share: Tensor, groups: int, most: int) -> list[tuple[int, int]]:
    """The query heads with the largest share [layers, N], best first. They use at most `most` key/value heads."""
    kept: set[tuple[int, int]] = set()
    chosen: list[tuple[int, int]] = []
    for index in share.flatten().argsort(descending=True).tolist():
        layer, head = divmod(index, share.shape[1])
        if share[layer, head] < LEAST * share.max() or len(chosen) == MOST:
            break
        key = layer, head // groups
        if key in kept or len(kept) < most:
            kept.add(key)
            chosen.append((layer, head))
    return chosen


def few_texts(examples: Iterable[Example], count: int, each: int, seed: int) -> list[Example]:
    """At most `count` questions, `each` about one text, from as few texts as suffice: reading them takes longest."""
    chance = random.Random(seed)
    found: list[Example] = []
    for _, of_text in groupby(examples, key=lambda example: example.prompt[: example.asks]):
        asked = list(of_text)
        kept = sorted(chance.sample(range(len(asked)), min(each, len(asked), count - len(found))))
        found += [asked[i] for i in kept]
        if len(found) >= count:
            break
    return found


class _Spread:
    """Mean and largest deviation of each channel of the keys, over all texts."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.count = 0
        self.largest: list[Tensor] = []

    def add(self, keys: list[Tensor]) -> None:
        if not self.sums:
            self.sums = [torch.zeros(k.shape[0], k.shape[2]) for k in keys]
            self.largest = [torch.zeros(k.shape[0], k.shape[2]) for k in keys]
        self.count += keys[0].shape[1]
        for layer, k in enumerate(keys):
            self.sums[layer] += k.sum(1, dtype=torch.float32).cpu()
            centre = self.sums[layer] / self.count
            deviation = (k - centre.to(k)[:, None]).abs().amax(1).float().cpu()
            self.largest[layer] = torch.maximum(self.largest[layer], deviation)

    def scales(self, layer: int) -> Tensor:
        """[2, M, H], as `RetrievalHeads.scales`."""
        return torch.stack([self.sums[layer] / self.count, (self.largest[layer] / 127).clamp(min=1e-6)])


def _read(model: PreTrainedModel, text: Any) -> tuple[list[Tensor], AHNCache]:
    """Read a text. Returns the keys [M, T, H] of each layer, without positions, and the memory."""
    cache = AHNCache(model)
    pieces: list[list[Tensor]] = [[] for _ in layers_of(model)]

    def observe(index: int, layer: Any, q: Tensor, k: Tensor, span: Any) -> None:
        pieces[index].append(layer.without_positions(k, span.positions(k.device))[0])

    for index, layer in enumerate(cache.layers):
        layer.observer = partial(observe, index)
    read(model, torch.tensor([list(text)]), cache)
    cache.set_archive(None)  # its forks observe nothing
    return [torch.cat(found, 1) for found in pieces], cache


def _share(queries: Sequence[dict[int, Tensor]], keys: list[Tensor], passages: Any, gold: Any, groups: int) -> Tensor:
    """How much of each head's attention to passages falls on those with evidence, [layers, N].

    The share for a question about nothing is subtracted.
    """
    device, end = keys[0].device, int(passages[-1])
    places = passages[:-1, None] + np.arange(np.diff(passages).max())
    places = torch.as_tensor(
        np.where(places < passages[1:, None], places, end), device=device
    )  # `end`: a place without a key
    wanted = torch.as_tensor(gold, device=device)
    found = []
    for layer, k in enumerate(keys):
        k = k[:, :end].repeat_interleave(groups, 0)
        shares = []
        for q in (queries[0][layer], queries[1][layer]):
            weights = (q.to(k.dtype) @ k.transpose(1, 2) * q.shape[-1] ** -0.5).float().softmax(-1)
            most = torch.nn.functional.pad(weights, (0, 1))[:, :, places].amax(3).mean(1)
            shares.append(most[:, wanted].sum(1) / most.sum(1))
        found.append((shares[0] - shares[1]).cpu())
    return torch.stack(found)


def _evidence(passages: Any, prompt: Prompt) -> Any:
    """Mask of the passages that hold evidence, bool [P]."""
    gold = np.zeros(max(len(passages) - 1, 0), bool)
    for one in prompt.needs:
        for start, _ in one:
            at = int(np.searchsorted(passages, start, side="right")) - 1
            if 0 <= at < len(gold):
                gold[at] = True
    return gold
