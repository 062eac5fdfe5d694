"""Which implementation computes what, and why: chosen here and nowhere else."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Kernel(NamedTuple):
    """`name`: "fla" or "torch"; `reason`: why this one."""

    name: str
    reason: str


def choose(operation: str | None, like: Tensor, gradients: bool = False) -> Kernel:
    """The kernel for a recurrence over many tokens, on the device and in the dtype of `like`."""
    import torch

    if operation is None:
        return Kernel("torch", "the cell names no operation of flash-linear-attention")
    if like.device.type != "cuda":
        return Kernel("torch", f"{like.device.type}: flash-linear-attention needs CUDA")
    if not _has_fla():
        return Kernel("torch", "flash-linear-attention is not installed (pip install ahn[gpu])")
    if like.dtype == torch.float32:
        return Kernel("torch", "float32: flash-linear-attention multiplies in TF32, off by 1e-3")
    if gradients:
        from ahn.kernels import fla

        if broken := fla.backward_problem(operation):
            return Kernel("torch", broken)
    return Kernel("fla", "CUDA, half precision, flash-linear-attention installed")


def report() -> list[tuple[str, str, str]]:
    """(operation, kernel, reason) of every choice on this machine, for `ahn info`."""
    import torch

    from ahn import cells

    device = "cuda" if torch.cuda.is_available() else "cpu"
    like = torch.empty(0, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    rows = [("reading: sinks and window", *attention(device)), ("training: sinks and window", *attention(device, True))]
    rows += [(f"{name}, many tokens", *choose(cells.get(name).fla_operation, like)) for name in cells.names()]
    return [*rows, ("one token", "torch", "every cell: in place, one step")]


def attention(device: str, gradients: bool = False) -> Kernel:
    """The kernel for sinks and window; `gradients`: of a whole sequence without a cache."""
    if device == "cuda" and gradients:
        return Kernel("torch flex", "CUDA, a whole sequence: FlexAttention, compiled once")
    if device == "cpu" and not gradients:
        return Kernel("torch flash", "CPU: torch's fused kernel, which also returns the normaliser")
    return Kernel("torch", f"{device}: plain torch on blocks of queries")


@cache
def _has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None
