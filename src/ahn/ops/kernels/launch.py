"""Kernels that start while the one before them ends: programmatic dependent launch, on Hopper and later.

A kernel that is launched so may begin when all programs of the one before it have called `release`, and must `wait` for
its end before it touches anything that another kernel writes: what is constant, weights, it may load before. Every
kernel that releases waits, in all its programs, so what one of them has waited for is over for those behind it too.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ahn.ops import dispatch


def options(device: str, apart: bool = False) -> dict[str, Any]:
    """How a kernel with the constant PDL is launched on this device. `apart`: beside others, not behind one."""
    overlaps = not apart and dispatch.pick_launches(device).name == "pdl"
    return {"PDL": True, "launch_pdl": True} if overlaps else {"PDL": False}


@triton.jit
def release(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
