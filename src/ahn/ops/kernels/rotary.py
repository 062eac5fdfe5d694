"""Rotary positions of many tokens, in Triton: `ahn.ops.rotary.Rotary` in one kernel. No gradients.

Under TRITON_INTERPRET=1 it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # tokens of one program


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of the first R dimensions of x [B, N, T, H] rotated into each other, computed in float32.

    Args:
        cos, sin: [1 or B, T or 1, R].
    """
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    return _launch(x, cos, sin, cos.shape[-1] // 2, by=False)


def rotate_by(x: Tensor, delta: Tensor, frequencies: Tensor) -> Tensor:
    """The same by `delta` positions [1 or B, T or 1], each of which rotates a pair by its frequency [R / 2] float32."""
    return _launch(x, delta, frequencies[None], len(frequencies), by=True)


def _launch(x: Tensor, first: Tensor, second: Tensor, half: int, by: bool) -> Tensor:
    batch, heads, tokens, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    steps = [(t.stride(0) * (len(t) > 1), t.stride(1) * (t.shape[1] > 1)) for t in (first, second)]
    _rotate[(triton.cdiv(tokens, BLOCK), batch * heads)](
        x, first, second, out, tokens, heads, *x.stride()[:3], *steps[0], *steps[1],
        SIZE=size, HALF=half, WIDTH=triton.next_power_of_2(max(1, half)),
        REST=triton.next_power_of_2(size - 2 * half) if size > 2 * half else 0, BY=by, BLOCK=BLOCK,
    )  # fmt: skip
    return out


# fmt: off
@triton.jit
def _rotate(x, first, second, out, tokens, heads, x_b, x_n, x_t, first_b, first_t, second_b, second_t,
          SIZE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BY: tl.constexpr,
          BLOCK: tl.constexpr):
    """`first` and `second`: cos and sin, or with BY positions and frequencies."""
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    there = (token < tokens) & (channel < HALF)
    x += row * x_b + head * x_n + token * x_t
    first += row * first_b + token * first_t
    out += (tl.program_id(1).to(tl.int64) * tokens + token) * SIZE
    a = tl.load(x + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + HALF + channel, mask=there, other=0.0).to(tl.float32)
    if BY:
        by = tl.load(first, mask=token < tokens, other=0).to(tl.float32)
        by = by * tl.load(second + channel, mask=channel < HALF, other=0.0)
        cos_a, sin_a = tl.cos(by), tl.sin(by)
        cos_b, sin_b = cos_a, sin_a
    else:
        second += row * second_b + token * second_t
        cos_a = tl.load(first + channel, mask=there, other=0.0).to(tl.float32)
        sin_a = tl.load(second + channel, mask=there, other=0.0).to(tl.float32)
        cos_b = tl.load(first + HALF + channel, mask=there, other=0.0).to(tl.float32)
        sin_b = tl.load(second + HALF + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(out + channel, (a * cos_a - b * sin_a).to(out.dtype.element_ty), mask=there)
    tl.store(out + HALF + channel, (b * cos_b + a * sin_b).to(out.dtype.element_ty), mask=there)
    if REST:
        channel = tl.arange(0, REST)[None, :] + 2 * HALF
        there = (token < tokens) & (channel < SIZE)
        tl.store(out + channel, tl.load(x + channel, mask=there, other=0.0), mask=there)
# fmt: on
