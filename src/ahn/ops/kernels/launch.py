"""Kernels that start while the one before them ends: programmatic dependent launch, on Hopper and later.

Such a kernel may begin when all programs of the kernel before it have called `release`. It may load weights at once,
because they are constant, but must `wait` for the end of that kernel before it touches anything that another kernel
writes. Every kernel that releases also waits, in all its programs. So a kernel that has waited knows that all kernels
before it have ended.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ahn.ops import dispatch


def options(device: str, apart: bool = False) -> dict[str, Any]:
    """Options to launch a kernel with the constant PDL. `apart`: it runs beside other kernels, not behind one."""
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
