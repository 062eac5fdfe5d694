"""The next tokens of several answers at once: each by the settings and the random numbers of its own request.

Letters: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ahn.engine.sequence import Request


@dataclass(frozen=True)
class Choice:
    """A token, its logprob if the request asks for it, and the likeliest tokens with theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def generator_of(request: Request) -> torch.Generator:
    """The random numbers of a request, on the host: the same with any device and any neighbours."""
    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    return generator


def choose(logits: Tensor, requests: list[Request], generators: list[torch.Generator]) -> list[Choice]:
    """One token for each row of logits [B, V]."""
    tokens = logits.argmax(-1)
    for row, (request, generator) in enumerate(zip(requests, generators, strict=True)):
        if request.temperature:
            tokens[row] = _draw(logits[row], request, float(torch.rand((), generator=generator, dtype=torch.float64)))
    ids = tokens.tolist()
    return [_choice(token, logits[row], requests[row].logprobs) for row, token in enumerate(ids)]


def _draw(logits: Tensor, request: Request, share: float) -> Tensor:
    """The token up to which the probabilities of `logits` [V] add up to `share` of those that are allowed."""
    chances = ((logits.double() - logits.max()) / request.temperature).softmax(-1)
    order = None
    if request.top_p < 1:
        chances, order = chances.sort(descending=True, stable=True)
        chances = chances.where(chances.cumsum(-1) - chances < request.top_p, 0)
    sums = chances.cumsum(-1)
    at = torch.searchsorted(sums, share * sums[-1:], right=True)[0].clamp(max=len(sums) - 1)
    return at if order is None else order[at]


def _choice(token: int, logits: Tensor, alternatives: int | None) -> Choice:
    if alternatives is None:
        return Choice(token)
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return Choice(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
