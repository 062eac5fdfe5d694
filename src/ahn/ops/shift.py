"""A sequence moved by a number of tokens that only the device knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Shift(torch.autograd.Function):
    """y[t] = x[t - by] along `dim`, with x[0] in front; `by` is a number on the device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(by)
        ctx.dim = dim
        at = torch.arange(x.shape[dim], device=x.device) - by
        return x.index_select(dim, at.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The tokens in front are never written, so their gradient is zero and left out."""
        (gradient,), (by,) = gradients, ctx.saved_tensors
        length = gradient.shape[ctx.dim]
        at = torch.arange(length, device=gradient.device) + by
        shape = [1] * gradient.dim()
        shape[ctx.dim] = -1
        found = gradient.index_select(ctx.dim, at.clamp(max=length - 1))
        return torch.where((at < length).view(shape), found, 0), None, None
