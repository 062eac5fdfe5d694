"""Softmax attention with its normaliser, and the merging of attention over disjoint sets of keys.

Letters: B batch, N query heads, M key/value heads, C queries, K keys, H head size;
R rows of positions: 1 where all of the batch are at the same position, else B.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ahn.ops import dispatch

ALIGNED = 16  # numbers: rows of what is added to scores begin at multiples of so many
AttentionOutput = tuple[Tensor, Tensor]  # output [B, N, C, H] and log of the normaliser [B, N, C], float32


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> AttentionOutput:
    """Softmax attention with its normaliser.

    Args:
        q: [B, N, C, H]. k, v: [B, M, K, H], N a multiple of M. mask: bool, true where seen, [R, C, K], or by head
            [R, 1 or M, C, K], or None.
        causal: query i sees keys up to i, of as many as there are queries; then `mask` is None.

    A query that sees nothing gets a finite output and a normaliser near -inf: it vanishes in `merge`.
    """
    batch, heads, queries, size = q.shape
    groups = heads // k.shape[1]
    kernel = dispatch.pick_attention(q, with_gradients(q, k)).name
    fused = kernel != "torch"
    if mask is None and kernel == "cudnn" and (groups == 1 or dispatch.groups_heads()):
        out, lse = _fused(kernel, q, k, v, scale, causal)
        return out, lse.reshape(batch, heads, queries)
    if causal and fused:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out, lse = _fused(kernel, q, k, v, scale, causal)
        return out, lse.reshape(batch, heads, queries)
    if causal:
        mask = torch.ones(1, queries, queries, dtype=torch.bool, device=q.device).tril()
    q = q.reshape(batch, k.shape[1], groups * queries, size)  # heads that share keys become more queries
    bias = None
    if mask is not None:
        bias = _bias(mask if mask.dim() == 4 else mask[:, None], groups, q.dtype)
    if fused:
        out, lse = _fused(kernel, q, k, v, scale) if bias is None else _fused_biased(q, k, v, bias, scale)
    else:
        scores = (q @ k.transpose(-1, -2)).float() * scale
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp().to(v.dtype) @ v
    return out.reshape(batch, heads, queries, size), lse.reshape(batch, heads, queries)


def with_gradients(q: Tensor, k: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)


def _bias(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to the scores, [R, 1 or M, G * C, K]. Rows are aligned for fused kernels on CUDA."""
    *rest, queries, keys = mask.shape
    bias = torch.zeros(*rest, groups, queries, -(-keys // ALIGNED) * ALIGNED, dtype=dtype, device=mask.device)
    bias[..., :keys].masked_fill_(~mask[:, :, None], torch.finfo(dtype).min / 2)
    return bias.flatten(2, 3)[..., :keys]


def _fused(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> AttentionOutput:
    """Torch's fused kernels by name, which give the lse too; as many heads of keys as of queries, or for cuDNN
    fewer."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=None, scale=scale)
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def _fused_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> AttentionOutput:
    """`_fused` with a `bias` that is added to the scores; of the kernels that take one."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    bias = bias.expand(*q.shape[:2], -1, -1)
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]


def merge(a: AttentionOutput, b: AttentionOutput) -> AttentionOutput:
    """Attention over the union of two disjoint sets of keys."""
    weight = torch.sigmoid(a[1] - b[1])[..., None].to(a[0].dtype)
    return torch.lerp(b[0], a[0], weight), torch.logaddexp(a[1], b[1])


def merge_all(parts: list[AttentionOutput], early: AttentionOutput | None) -> AttentionOutput:
    """As `merge`, of several at once.

    Args:
        early: one more, backwards, [B, N, C - 1, H]: of the queries from the last but one to the first.
    """
    lses, last = [lse for _, lse in parts], None
    if early is not None:
        last = early[0].flip(2)
        lses.append(F.pad(early[1].flip(2), (0, 1), value=float("-inf")))
    total = torch.stack(lses).logsumexp(0)
    weights = [(lse - total).exp()[..., None].to(parts[0][0].dtype) for lse in lses]
    merged = parts[0][0] * weights[0]
    for (out, _), weight in zip(parts[1:], weights[1:], strict=False):
        merged.addcmul_(out, weight)
    if last is not None:
        merged[:, :, :-1].addcmul_(last, weights[-1][:, :, :-1])
    return merged, total
