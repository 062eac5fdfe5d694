"""Arguments that travel together through `ahn.ops` and its kernels: plain tuples, which need no Triton.

Letters: B batch, N query heads, M key/value heads, C queries, K keys, H head size, S sinks, P parts;
R rows of positions: 1 where all of the batch are at the same position, else B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Queries(NamedTuple):
    """Queries of attention over the window and over what is kept behind it."""

    q: Tensor  # [B, N, C, H], as the window meets them
    q_kept: Tensor  # as sinks and store meet them: the same tensor where nothing is rotated
    scale: float  # of the scores


class Window(NamedTuple):
    """The tokens that each query sees: the last `size`, itself included, and the first `sinks` of the text."""

    size: int
    sinks: int


class Write(NamedTuple):
    """The token of each row that a cell takes in one step."""

    k: Tensor  # [B, N or M, 1, K]
    v: Tensor  # [B, M, 1, H]
    inputs: Tensor  # gate inputs [B, 1, gates * N]
    rows: Tensor | None  # bool [R, 1], whether the row has such a token; None: all have


class Form(NamedTuple):
    """A cell as the kernels know it: S <- a S + w k (v - [delta] a S^T k)^T, read scale * S^T q.

    With `decay`, dt = softplus(last gate input + dt_bias) and log a = -exp(A_log) dt. The strength w of a write is the
    sigmoid of the first gate input, or dt without `delta`.
    """

    delta: bool
    decay: tuple[Tensor, Tensor] | None  # A_log, dt_bias [N]
    scale: float
    inputs: tuple[Any, ...]  # linear layers of x; side by side they are the gate inputs
    gate: Any  # x [B, 1, D] -> [B, 1, N]; its silu multiplies what was read
    norm: Tensor  # weight [H]: RMSNorm per head, then the gate; [N * H]: the gate, then RMSNorm over all heads


class Gate(NamedTuple):
    """A store's gate: outer(silu(inner(x / rms x))), and softplus(decay) of each head for every `unit` positions."""

    inner: Any  # linear layers with a bias, float32 or rounded
    outer: Any
    decay: Tensor  # [M]
    unit: int
    epsilon: float  # on the mean square of x


class StoredRotation(NamedTuple):
    """How keys are rotated where they enter a store and where they leave it: the halves of the first of their
    dimensions into each other, by a number of positions times `frequencies`."""

    frequencies: Tensor | None  # [half of the rotated dimensions], None: keys are not rotated
    enters: bool  # to position S, from their own
    by_position: int  # a key that leaves is rotated by this times its own position ...
    by_sinks: int  # ... and times S


class Parts(NamedTuple):
    """Attention over parts of the slots, to be merged."""

    outs: Tensor  # [B, N, P, H] float32
    lses: Tensor  # of each part, [B, N, P] float32
    out: Tensor  # what they are merged into, [B, N, 1, H]
    lse: Tensor  # [B, N, 1] float32


class KeptKeys(NamedTuple):
    """Keys that queries see for a while, whatever the window: sinks and store. Query i sees a key while
    since <= i < until, for the queries of a call counted from 0."""

    keys: Tensor  # [B, M, K, H]
    values: Tensor
    since: Tensor  # [R or B, 1 or M, K]
    until: Tensor
    entering: int  # so many keys at the end come with the last queries, one with each

    @classmethod
    def of_sinks(cls, sinks: tuple[Tensor, Tensor], start: Tensor, queries: int) -> KeptKeys:
        """Sinks alone, as `queries` see them from positions `start` [R] on."""
        since = torch.arange(sinks[0].shape[2], device=start.device) - start[:, None, None]
        return cls(*sinks, since, torch.full_like(since, queries), 0)

    def seen(self, low: int, high: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values for queries low .. high of `queries`, and which are seen: bool [R or B, 1 or M, C, K]."""
        count = self.keys.shape[2] - min(self.entering, queries - high)
        i = torch.arange(low, high, device=self.keys.device)[:, None]
        since, until = (t[..., None, :count] for t in (self.since, self.until))
        return self.keys[:, :, :count], self.values[:, :, :count], (since <= i) & (i < until)
