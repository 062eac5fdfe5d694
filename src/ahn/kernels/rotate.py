"""Rotary positions of many tokens, in Triton: `ahn.attention.Rotary.turn` in one kernel. No gradients.

Under TRITON_INTERPRET=1 it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # tokens of one program


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of the first R dimensions of x [B, N, T, H] turned into each other, computed in float32.

    Args:
        cos, sin: [1 or B, T or 1, R].
    """
    batch, heads, tokens, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = cos.shape[-1]
    steps = [(t.stride(0) * (len(t) > 1), t.stride(1) * (t.shape[1] > 1)) for t in (cos, sin)]
    _turn[(triton.cdiv(tokens, BLOCK), batch * heads)](
        x, cos, sin, out, tokens, heads, *x.stride()[:3], *steps[0], *steps[1],
        SIZE=size, HALF=width // 2, WIDTH=triton.next_power_of_2(max(1, width // 2)),
        REST=triton.next_power_of_2(size - width) if size > width else 0, BLOCK=BLOCK,
    )  # fmt: skip
    return out


# fmt: off
@triton.jit
def _turn(x, cos, sin, out, tokens, heads, x_b, x_n, x_t, cos_b, cos_t, sin_b, sin_t,
          SIZE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr):
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    there = (token < tokens) & (channel < HALF)
    x += row * x_b + head * x_n + token * x_t
    cos += row * cos_b + token * cos_t
    sin += row * sin_b + token * sin_t
    out += (tl.program_id(1).to(tl.int64) * tokens + token) * SIZE
    first = tl.load(x + channel, mask=there, other=0.0).to(tl.float32)
    second = tl.load(x + HALF + channel, mask=there, other=0.0).to(tl.float32)
    turned = first * tl.load(cos + channel, mask=there, other=0.0).to(tl.float32)
    turned -= second * tl.load(sin + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(out + channel, turned.to(out.dtype.element_ty), mask=there)
    turned = second * tl.load(cos + HALF + channel, mask=there, other=0.0).to(tl.float32)
    turned += first * tl.load(sin + HALF + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(out + HALF + channel, turned.to(out.dtype.element_ty), mask=there)
    if REST:
        channel = tl.arange(0, REST)[None, :] + 2 * HALF
        there = (token < tokens) & (channel < SIZE)
        tl.store(out + channel, tl.load(x + channel, mask=there, other=0.0), mask=there)
# fmt: on
