"""The one place that imports flash-linear-attention, and only its public `fla.ops` names. CUDA only.

Tensors are [B, T, N, H] in half precision, gates [B, T, N] float32, states [B, N, K, H] float32.
"""

from __future__ import annotations

import importlib.util
import re

import torch
from torch import Tensor

HOPPER = 9


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(
        q, k, v, g=log_decay, beta=beta, scale=scale, initial_state=state, output_final_state=True
    )


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(q, k, v, beta.to(q.dtype), scale=scale, initial_state=state, output_final_state=True)


def simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g=log_decay, scale=1.0, initial_state=state, output_final_state=True)


def backward_problem(operation: str) -> str | None:
    """Why fla's gradients of `operation` cannot be trusted here, or None."""
    import triton

    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
    hopper = torch.cuda.get_device_capability()[0] == HOPPER
    if operation == "gated_delta_rule" and importlib.util.find_spec("tilelang"):
        return None  # fla then takes that kernel from it
    if operation != "delta_rule" and hopper and (3, 4) <= version < (3, 7, 1):
        return f"gradients: flash-linear-attention's gated kernels are wrong on Hopper with triton {triton.__version__}"
    return None
