"""Attention over sinks and window of a whole sequence on CUDA, with gradients: torch's FlexAttention.

Sinks and window are numbers on the device that the mask reads, so that other ones need no new compilation.
Shapes as in `ahn.ops.banded`.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ahn.ops.dispatch import SHAPES
from ahn.ops.softmax import AttentionOutput, merge
from ahn.ops.specs import Queries, Window


def attend_sequence(queries: Queries, k: Tensor, v: Tensor, window: Window) -> AttentionOutput:
    """Attention of T queries to k, v [B, M, T, H], one sequence from its start."""
    q, q_kept, scale = queries
    masks = _masks(q.device, q.shape[2], threading.get_ident())
    masks.set(window)
    if q_kept is q or not window.sinks:
        return _compiled(_flex)(q, k, v, masks.both, scale)
    return _compiled(_apart)((q, q_kept), k, v, masks.sinks_only, masks.window_only, scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_lse=True)


def _apart(
    both: tuple[Tensor, Tensor], k: Tensor, v: Tensor, on_sinks: Any, on_window: Any, scale: float
) -> AttentionOutput:
    """`both`: the queries as the window and as the sinks meet them; a plain tuple, because this is compiled."""
    q, q_sinks = both
    return merge(_flex(q_sinks, k, v, on_sinks, scale), _flex(q, k, v, on_window, scale))


@cache
def _compiled(function: Any) -> Any:
    """Compiled for up to `SHAPES` shapes and modes of gradients: without, FlexAttention keeps all scores."""
    from torch._dynamo import config

    compiled = torch.compile(function, dynamic=False)

    def call(*inputs: Any) -> Any:
        with config.patch(recompile_limit=SHAPES):
            return compiled(*inputs)

    return call


class _Masks:
    """The block masks of one length, made anew when sinks or window change."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        self.device, self.tokens = device, tokens
        self.window: Window | None = None
        window, sinks = (torch.zeros((), dtype=torch.int32, device=device) for _ in range(2))
        self._numbers = window, sinks

        def both(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & ((key > query - window) | (key < sinks))

        def window_only(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key > query - window) & (key >= sinks)

        def sinks_only(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key < sinks)

        self._predicates = both, window_only, sinks_only

    def set(self, new: Window) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        if self.window == new:
            return
        self.window = new
        for number, value in zip(self._numbers, new, strict=True):
            number.fill_(value)
        made = (
            create_block_mask(predicate, None, None, self.tokens, self.tokens, device=self.device)
            for predicate in self._predicates
        )
        self.both, self.window_only, self.sinks_only = made


@cache
def _masks(device: torch.device, tokens: int, thread: int) -> _Masks:
    """Those of one thread: another one may have another window."""
    return _Masks(device, tokens)
