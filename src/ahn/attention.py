"""Softmax attention over what is kept exactly: sinks and window.

Letters: B batch, N query heads, M key/value heads, C queries, K keys, H head size, S sinks, W window;
R rows of positions: 1 where all of the batch are at the same position, else B.

One predicate says what may be seen (`visible`). Sinks and window are attended apart and merged by their normalisers,
because with clipped sink positions a query meets the two at different angles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahn import kernels
from ahn.errors import ConfigError, UnsupportedModelError

QUERY_BLOCK = 128  # queries attended at once: few enough that little of the band between blocks is masked

ALIGNED = 16  # numbers: rows of what is added to scores begin at multiples of so many

Softmax = tuple[Tensor, Tensor]  # output [B, N, C, H] and log of the normaliser [B, N, C], float32


class Far(NamedTuple):
    """Keys that queries see for a while, whatever the window: sinks and store. Query i sees a key while
    since <= i < until, for the queries of a call counted from 0."""

    keys: Tensor  # [B, M, K, H]
    values: Tensor
    since: Tensor  # [R or B, 1 or M, K]
    until: Tensor
    entering: int  # so many keys at the end come with the last queries, one with each

    @classmethod
    def of_sinks(cls, sinks: tuple[Tensor, Tensor], start: Tensor, queries: int) -> Far:
        """Sinks alone, as `queries` see them from positions `start` [R] on."""
        since = torch.arange(sinks[0].shape[2], device=start.device) - start[:, None, None]
        return cls(*sinks, since, torch.full_like(since, queries), 0)

    def seen(self, low: int, high: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values for queries low .. high of `queries`, and which are seen: bool [R or B, 1 or M, C, K]."""
        count = self.keys.shape[2] - min(self.entering, queries - high)
        i = torch.arange(low, high, device=self.keys.device)[:, None]
        since, until = (t[..., None, :count] for t in (self.since, self.until))
        return self.keys[:, :, :count], self.values[:, :, :count], (since <= i) & (i < until)


def visible(query: Tensor, key: Tensor, sinks: int, window: int) -> Tensor:
    """Which window keys a query sees, by their positions (broadcast): causal, in the window, not a sink."""
    return (key <= query) & (key > query - window) & (key >= sinks)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Softmax:
    """Softmax attention with its normaliser.

    Args:
        q: [B, N, C, H]. k, v: [B, M, K, H], N a multiple of M. mask: bool, true where seen, [R, C, K], or by head
            [R, 1 or M, C, K], or None.
        causal: query i sees keys up to i, of as many as there are queries; then `mask` is None.

    A query that sees nothing gets a finite output and a normaliser near -inf: it vanishes in `merge`.
    """
    batch, heads, queries, size = q.shape
    groups = heads // k.shape[1]
    kernel = kernels.attention(q, _with_gradients(q, k)).name
    fused = kernel != "torch"
    if mask is None and kernel == "cudnn" and (groups == 1 or kernels.groups_heads()):
        out, norm = _fused(kernel, q, k, v, None, scale, causal)
        return out, norm.reshape(batch, heads, queries)
    if causal and fused:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out, norm = _fused(kernel, q, k, v, None, scale, causal)
        return out, norm.reshape(batch, heads, queries)
    if causal:
        mask = torch.ones(1, queries, queries, dtype=torch.bool, device=q.device).tril()
    q = q.reshape(batch, k.shape[1], groups * queries, size)  # heads that share keys become more queries
    bias = None
    if mask is not None:
        bias = _bias(mask if mask.dim() == 4 else mask[:, None], groups, q.dtype)
    if fused:
        out, norm = _fused(kernel, q, k, v, bias, scale, False)
    else:
        scores = (q @ k.transpose(-1, -2)).float() * scale
        scores = scores if bias is None else scores + bias
        norm = scores.logsumexp(-1)
        out = (scores - norm[..., None]).exp().to(v.dtype) @ v
    return out.reshape(batch, heads, queries, size), norm.reshape(batch, heads, queries)


def _with_gradients(q: Tensor, k: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)


def _bias(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: [R, 1 or M, G * C, K], its rows aligned as fused kernels on CUDA want them."""
    *rest, queries, keys = mask.shape
    bias = torch.zeros(*rest, groups, queries, -(-keys // ALIGNED) * ALIGNED, dtype=dtype, device=mask.device)
    bias[..., :keys].masked_fill_(~mask[:, :, None], torch.finfo(dtype).min / 2)
    return bias.flatten(2, 3)[..., :keys]


def _fused(kernel: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Softmax:
    """Torch's fused kernels by name, which give the normaliser too; as many heads of keys as of queries, or for cuDNN
    fewer."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if bias is not None:
        bias = bias.expand(*q.shape[:2], -1, -1)
        out, norm = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[:2]
        return out, norm[..., : q.shape[2]]
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def merge(a: Softmax, b: Softmax) -> Softmax:
    """Attention over the union of two disjoint sets of keys."""
    weight = torch.sigmoid(a[1] - b[1])[..., None].to(a[0].dtype)
    return torch.lerp(b[0], a[0], weight), torch.logaddexp(a[1], b[1])


def merge_all(parts: list[Softmax], early: Softmax | None) -> Softmax:
    """As `merge`, of several at once.

    Args:
        early: one more, backwards, [B, N, C - 1, H]: of the queries from the last but one to the first.
    """
    norms, last = [norm for _, norm in parts], None
    if early is not None:
        last = early[0].flip(2)
        norms.append(F.pad(early[1].flip(2), (0, 1), value=float("-inf")))
    total = torch.stack(norms).logsumexp(0)
    weights = [(norm - total).exp()[..., None].to(parts[0][0].dtype) for norm in norms]
    merged = parts[0][0] * weights[0]
    for (out, _), weight in zip(parts[1:], weights[1:], strict=False):
        merged.addcmul_(out, weight)
    if last is not None:
        merged[:, :, :-1].addcmul_(last, weights[-1][:, :, :-1])
    return merged, total


def attend_one(
    q: Tensor,
    q_sinks: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: int,
    last: Tensor | None,
    scale: float,
    in_parts: bool = False,
) -> Any:
    """Attention of one new token over a ring buffer, in any order and without copying it.

    Args:
        q, q_sinks: [B, N, 1, H], as the window and as the sinks meet it. k, v: [B, M, K, H], the sinks first.
        last: [R], position of the new token where slots are not all filled: a slot above it is empty. Or None.
        in_parts: return `ahn.kernels.step.Parts`, where there are Triton kernels.

    Returns: Softmax, unless `in_parts`.
    """
    if kernels.one_token(q.device.type).name == "triton":
        from ahn.kernels import step

        attend = step.attend_parts if in_parts else step.attend
        return attend(q, q_sinks, k, v, sinks, last, scale)
    filled = None if last is None else (torch.arange(k.shape[2], device=k.device) <= last[:, None])[:, None]
    return attend_slots(q, q_sinks, k, v, sinks, filled, scale)


def attend_slots(
    q: Tensor, q_sinks: Tensor, k: Tensor, v: Tensor, sinks: int, filled: Tensor | None, scale: float
) -> Softmax:
    """`attend_one` over any slots, in plain torch.

    Args:
        sinks: how many of the first slots are met as sinks are. filled: bool [R, 1 or M, K], or None for all.
    """
    mask = None if filled is None else filled[:, :, None]
    if q_sinks is q:
        return attend(q, k, v, mask, scale)
    first, rest = (
        attend(query, k[:, :, part], v[:, :, part], None if mask is None else mask[..., part], scale)
        for query, part in ((q_sinks, slice(sinks)), (q, slice(sinks, None)))
    )
    return merge(first, rest)


def attend_window(
    q: Tensor,
    q_sinks: Tensor,
    sinks_kv: tuple[Tensor, Tensor],
    window_kv: tuple[Tensor, Tensor],
    start: Tensor,
    window: int,
    scale: float,
    far: Far | None = None,
    sinks: int | None = None,
) -> Softmax:
    """Attention of consecutive queries over sinks and window, block by block.

    Args:
        q, q_sinks: [B, N, C, H], as the window and as the sinks meet them; query i is at position start + i.
        sinks_kv: [B, M, S, H]. window_kv: [B, M, K, H], the K tokens up to and including the last query, in order.
        start: [R], positions of the first query. far: seen instead of the sinks, of which it
            has `sinks`.
    """
    queries, sinks = q.shape[2], sinks_kv[0].shape[2] if sinks is None else sinks
    if kernels.band(q, _with_gradients(q, window_kv[0])).name == "triton":
        from ahn.kernels import far as triton

        far = far or Far.of_sinks(sinks_kv, start, queries)
        return triton.attend(q, q_sinks, window_kv, start, window, scale, far, sinks)
    before = window_kv[0].shape[2] - queries
    device = q.device
    out: list[Softmax] = []
    for low in range(0, queries, QUERY_BLOCK):
        high = min(low + QUERY_BLOCK, queries)
        first = max(0, before + low - window + 1)
        at = (start[:, None] + torch.arange(low, high, device=device))[..., None]
        keys = start[:, None, None] + torch.arange(first - before, high, device=device)
        k, v = (t[:, :, first : before + high] for t in window_kv)
        part = attend(q[:, :, low:high], k, v, visible(at, keys, sinks, window), scale)
        if far is not None:
            seen = far.seen(low, high, queries)
            if seen[0].shape[2]:
                part = merge(attend(q_sinks[:, :, low:high], *seen, scale), part)
        elif sinks:
            causal = None if low >= sinks else torch.arange(sinks, device=device) <= at
            part = merge(attend(q_sinks[:, :, low:high], *sinks_kv, causal, scale), part)
        out.append(part)
    outs, norms = zip(*out, strict=True)
    return torch.cat(outs, 2), torch.cat(norms, 2)


def heads_of(attention: Any) -> tuple[int, int]:
    """Query heads and head size of an attention module."""
    heads, size = attention.config.num_attention_heads, attention.head_dim
    width = getattr(attention.o_proj, "in_features", heads * size)
    if width != heads * size:
        raise UnsupportedModelError(
            f"o_proj reads {width} numbers, not {heads} heads x {size}: the values' head size differs from the queries'"
        )
    return heads, size


class Rotary:
    """Turns queries that already carry their rotary position to another distance, with the base's own rotation.

    Rotations compose, so turning by the angle of `delta` moves a query from position t to t + delta. The frequencies
    and the layout of the dimensions are the base's: nothing here knows a family.

    Raises:
        ConfigError: the base's rotation cannot be composed.
    """

    def __init__(self, decoder: nn.Module, attention: Any) -> None:
        self.embedding: Any = getattr(decoder, "rotary_emb", None)
        self.apply: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        self.halves = self.apply is not None and turns_halves(self.apply)
        self.simple = self.halves and self._is_simple()
        if self.embedding is None or self.apply is None or not self._composes(attention):
            raise ConfigError(
                "sink_positions='clipped' needs rotary positions that can be turned further, this base's cannot: "
                "use sink_positions='absolute'"
            )

    @property
    def frequencies(self) -> Tensor | None:
        """[R / 2] float32: the halves of R dimensions are turned by as much a position. None: it is not so simple."""
        return self.embedding.inv_freq.float() if self.simple else None

    def angles(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of turning by `delta` positions [R, C], float32, of unit length whatever the base scales by."""
        scaling = getattr(self.embedding, "attention_scaling", 1.0)
        cos, sin = self.embedding(torch.empty(0, dtype=torch.float32, device=delta.device), delta)
        return cos / scaling, sin / scaling

    def turn(self, q: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """q [B, N, C, H] turned by `angles`, computed in float32; with partial rotation the first dimensions turn."""
        if self.halves and self._in_one_kernel(q):
            from ahn.kernels import rotate

            return rotate.turn(q, *angles)
        width = angles[0].shape[-1]
        turning, rest = q[..., :width], q[..., width:]
        turned = self.apply(turning.float(), turning[:, :0].float(), *angles)[0].to(q.dtype)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def turn_by(self, q: Tensor, delta: Tensor) -> Tensor:
        """q [B, N, C, H] turned by `delta` positions [R, C]."""
        if self.simple and self._in_one_kernel(q):
            from ahn.kernels import rotate

            assert self.frequencies is not None
            return rotate.turn_by(q, delta, self.frequencies)
        return self.turn(q, self.angles(delta))

    def _in_one_kernel(self, q: Tensor) -> bool:
        gradients = torch.is_grad_enabled() and q.requires_grad
        return not torch.compiler.is_compiling() and kernels.rotation(q.device.type, gradients).name == "triton"

    def _is_simple(self) -> bool:
        """Whether angles are the positions times `inv_freq`, at all lengths."""
        found = getattr(self.embedding, "inv_freq", None)
        changes = getattr(self.embedding, "rope_type", "default") in ("dynamic", "longrope")
        if not isinstance(found, Tensor) or found.dim() != 1 or changes or found.device.type == "meta":
            return False
        delta = torch.tensor([[0, 1, -37, 5000]], device=found.device)
        try:
            cos, sin = self.angles(delta)
        except (TypeError, ValueError, RuntimeError):
            return False
        by = torch.cat([delta[..., None] * found.float()] * 2, -1)
        return by.shape == cos.shape and torch.allclose(
            torch.stack([cos, sin]), torch.stack([by.cos(), by.sin()]), atol=1e-3
        )

    def _composes(self, attention: Any) -> bool:
        device = attention.o_proj.weight.device
        if device.type == "meta":
            return True
        q = torch.randn(1, 1, 1, attention.head_dim, device=device, generator=torch.Generator(device).manual_seed(0))
        try:
            with kernels.on(device):
                there = self.turn(q, self.angles(torch.tensor([[23]], device=device)))
                back = self.turn(there, self.angles(torch.tensor([[-23]], device=device)))
        except (TypeError, ValueError, RuntimeError):
            return False
        return torch.allclose(back, q, atol=1e-4)


def turns_halves(turn: Callable[..., Any]) -> bool:
    """Whether a base's function turns the halves of a head into each other; tried out."""
    q, k, cos, sin = torch.randn(4, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    try:
        found = turn(q, k, cos[0], sin[0])
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = [t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k)]
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
