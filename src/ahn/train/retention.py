"""Trains the gates of a store (`ahn.stores.learned`) to find the tokens that will be attended to from far away.

Letters: B rows, T tokens, D hidden size, N query heads, M key/value heads, H head size, Q blocks of queries.

The teacher is the base with full attention. At a time t, whoever must choose among the tokens behind the window wants
those that queries from t on attend to. So the label of a token is the log of the largest (or the mean) attention it
gets from there, and the gate is to order the tokens of one row and head by it: its output, less its mean, is fitted
to the labels, less theirs. Labels never exist for more than one layer, and are found for one row at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ahn.augmentation import full_attention
from ahn.errors import ConfigError
from ahn.train.data import Rows
from ahn.train.recipe import GATE_LABELS

BLOCKS = 16  # of queries in a row: times to choose at
FLOOR = -12.0  # log of an attention that is as good as none


class Found(NamedTuple):
    """How well the scores of one layer order its tokens: means over rows, heads and times."""

    correlation: float  # of ranks (Spearman), -1 to 1
    recall: float  # share of the tokens that are attended to most that are among as many of the highest scores
    chance: float  # the recall of scores drawn at random


def received(q: Tensor, k: Tensor, counts: Tensor, window: int, scale: float, label: str = "max") -> Tensor:
    """Log of the attention that each token gets from each block of queries that see it from further than the window.

    Args:
        q: [B, N, T, H]. k: [B, M, T, H]. counts: bool [B, T], which queries count. window: W.
        label: the "max" over queries and heads of a group, or the "mean".

    Returns:
        [B, M, Q, T] float32, not below FLOOR; block i has the queries from T i / Q to T (i + 1) / Q.
    """
    batch, _, tokens, _ = q.shape
    kv_heads, positions = k.shape[1], torch.arange(tokens, device=k.device)
    size = -(-tokens // BLOCKS)
    found = torch.full((batch, kv_heads, BLOCKS, tokens), 0.0, device=k.device)
    for row in range(batch):
        queries = q[row].unflatten(0, (kv_heads, -1))
        for block, low in enumerate(range(0, tokens, size)):
            at = positions[low : low + size][counts[row, low : low + size]]
            if not len(at):
                continue
            scores = (queries[:, :, at] @ k[row, :, None].transpose(-1, -2)).float() * scale
            weights = scores.masked_fill_(positions > at[:, None], -torch.inf).softmax(-1)
            weights *= positions <= at[:, None] - window
            found[row, :, block] = weights.amax((1, 2)) if label == "max" else weights.mean((1, 2))
    return found.clamp_(min=math.exp(FLOOR)).log_()


def future(labels: Tensor) -> Tensor:
    """From labels of blocks those of all blocks from each on: [B, M, Q, T]."""
    return labels.flip(2).cummax(2).values.flip(2)


def gate_loss(layer: Any, x: Tensor, labels: Tensor, window: int) -> Tensor:
    """Mean squared difference of scores and labels, both less their means over the tokens there are to choose from.

    Args:
        x: [B, T, D]. labels: of `future`.
    """
    total, count = x.new_zeros((), dtype=torch.float32), 0
    scores = scores_of(layer, x)
    for time, wanted in _choices(labels, window):
        mine = scores[..., :time]
        difference = (mine - mine.mean(-1, keepdim=True)) - (wanted - wanted.mean(-1, keepdim=True))
        total, count = total + difference.square().mean(), count + 1
    return total / max(count, 1)


def scores_of(layer: Any, x: Tensor) -> Tensor:
    """What the store of a layer gives the tokens of whole sequences x [B, T, D], [B, M, T]."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    return layer.store.score(x, positions, _no_state)


def _no_state() -> Tensor:
    raise ConfigError("a store that is trained cannot also ask the cell's state")


def _choices(labels: Tensor, window: int) -> Iterator[tuple[int, Tensor]]:
    """The times to choose at: how many tokens lie behind the window then, and their labels [B, M, n]."""
    tokens = labels.shape[-1]
    size = -(-tokens // BLOCKS)
    for block in range(BLOCKS):
        behind = block * size - window
        # rows without a query that counts from then on say nothing, but their labels are all the floor
        if behind >= 2 and bool((labels[:, :, block] > FLOOR).any()):
            yield behind, labels[:, :, block, :behind]


Progress = Callable[[list[float]], None]  # called after each step with the losses so far


def fit(
    model: Any,
    rows: Rows,
    steps: int,
    batch: int = 8,
    lr: float = 1e-3,
    label: str = "max",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train the gates of all layers, from what the model is given as its window; returns the loss of each step.

    The base and the cells stay as they are. Rows are drawn with `seed`, each once before any again.

    Raises:
        ConfigError: the store of the model is not one that is trained, or `label` is unknown.
    """
    if label not in GATE_LABELS:
        raise ConfigError(f"label={label!r}: expected one of {', '.join(GATE_LABELS)}")

    def step(ids: Tensor, counts: Tensor, done: float) -> Tensor:
        values: list[Tensor] = []

        def observe(attention: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, scale: float, full: Tensor) -> None:
            layer = attention.ahn
            if layer.store is None:
                return
            labels = future(received(q, k, counts, layer.reach, scale, label))
            with torch.enable_grad():
                value = gate_loss(layer, x.detach(), labels, layer.reach)
                if value.requires_grad:
                    value.backward()
            values.append(value.detach())

        with torch.no_grad(), full_attention(model, observe):
            model.get_decoder()(ids, use_cache=False)
        return torch.stack(values).mean()

    return train_gates(model, rows, steps, batch, lr, seed, step, progress)


def train_gates(
    model: Any,
    rows: Rows,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    step: Callable[[Tensor, Tensor, float], Tensor],
    progress: Progress | None = None,
) -> list[float]:
    """AdamW on the gates of all layers; returns the loss of each step. Rows are drawn with `seed`, each once before any
    again.

    Args:
        step: from ids [B, T], which tokens count, and the share of the steps done, 0 to 1: makes the gradients, and
            returns the loss.

    Raises:
        ConfigError: the store of the model is not one that is trained.
    """
    parameters = gates(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=max(steps, 2), pct_start=0.1)
    wanted = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    losses: list[float] = []
    try:
        for chosen in draw(len(rows), batch, steps, seed):
            optimizer.zero_grad()
            loss = step(*batch_of(rows, chosen, model.device), len(losses) / max(steps - 1, 1))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if progress is not None:
                progress(losses)
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None
    return losses


@torch.no_grad()
def measure(model: Any, rows: Rows, places: int, batch: int = 4, label: str = "max") -> list[Found]:
    """How well the scores of each layer's store find what is attended to later, layer by layer.

    Args:
        places: how many tokens are to be found, fewer where fewer than twice as many are there.

    The store may be any that scores tokens by themselves, not by the state or by attention.
    """
    found: dict[int, list[tuple[float, float, float]]] = {}
    for low in range(0, len(rows), batch):
        ids, counts = batch_of(rows, list(range(low, min(low + batch, len(rows)))), model.device)

        def observe(attention: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, scale: float, full: Tensor) -> None:
            layer = attention.ahn
            if layer.store is None:
                return
            labels = future(received(q, k, counts, layer.reach, scale, label))  # noqa: B023 - called at once
            scores = scores_of(layer, x).expand(*labels.shape[:2], -1)
            for behind, wanted in _choices(labels, layer.reach):
                mine, few = scores[..., :behind], min(places, behind // 2)
                best, true = mine.topk(few).indices, wanted.topk(few).indices
                hit = torch.zeros_like(mine, dtype=torch.bool).scatter_(-1, best, True).gather(-1, true)
                row = _spearman(mine, wanted), hit.float().mean().item(), few / behind
                found.setdefault(layer.store.layer, []).append(row)

        with full_attention(model, observe):
            model.get_decoder()(ids, use_cache=False)
    means = (torch.tensor(found[layer]).mean(0).tolist() for layer in sorted(found))
    return [Found(*row) for row in means]


def gates(model: Any) -> list[torch.nn.Parameter]:
    """The weights of all stores. Raises ConfigError if there are none."""
    from ahn.augmentation import layers_of

    found = [p for layer in layers_of(model) if layer.store is not None for p in layer.store.parameters()]
    if not found:
        raise ConfigError(f"store={model.ahn_config.store!r}: has nothing to train")
    return found


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = [x.argsort(-1).argsort(-1).float() for x in (a, b)]
    x, y = (r - r.mean(-1, keepdim=True) for r in ranks)
    return ((x * y).mean(-1) / (x.square().mean(-1) * y.square().mean(-1)).sqrt().clamp(min=1e-9)).mean().item()


def draw(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of each step: all of them in some order before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:batch]
        order = order[batch:]


def batch_of(rows: Rows, chosen: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and which tokens count."""
    items = [rows[i] for i in chosen]
    return tuple(torch.stack([item[key] for item in items]).to(device) for key in ("input_ids", "counts"))  # type: ignore[return-value]
