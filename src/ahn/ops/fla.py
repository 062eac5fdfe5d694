"""The one place that imports flash-linear-attention, and only its public `fla.ops` names. CUDA only.

Tensors are [B, T, N, H] in half precision, gates [B, T, N] float32, states [B, N, K, H] float32.

The library compiles many forms of each kernel and keeps the form that was fastest on the first tensors it met. That
takes half a minute for a new shape, and with few tokens the choice is chance. On Hopper, version 0.6 reads the forms in
`hopper/` instead, files in its own format. They are the fastest for 16,320 tokens in heads of 64 and 128 channels, with
three stages: four would be 8% faster with 128 channels but do not fit heads of 256. The library still chooses by itself
for other kernels, if it was imported earlier, and if the environment says something else. The whole process gets these
forms.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

HOPPER = 9


@dataclass
class Library:
    """The state of flash-linear-attention in this process; `ahn info` shows it."""

    loaded: bool = False  # by this package: importing it takes 5 s
    forms: str = "it chooses the forms of its kernels"

    def load(self) -> None:
        """Call this before each import from the library. The library takes forms from the environment only, which it
        reads when it is imported and when it meets a kernel for the first time."""
        if self.loaded:
            return
        chosen = {"FLA_CACHE_MODE", "FLA_CONFIG_DIR"} & os.environ.keys()
        if _hopper() and not chosen and _version().startswith("0.6."):
            forms = str(Path(__file__).parent / "hopper")
            os.environ["FLA_CACHE_MODE"], os.environ["FLA_CONFIG_DIR"] = "default", forms
            self.forms = "the forms of its kernels are those of ops/hopper"
        self.loaded = True


library = Library()


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`ahn.ops.chunked.gated_delta_rule` in the library's layout: returns o [B, T, N, H] and the state after the last
    token.

    Args:
        q, k: [B, T, N, K], of unit length. v: [B, T, N, H].
        beta: [B, T, N] in 0..1. log_decay: [B, T, N], log a <= 0.
        state: [B, N, K, H] (key, value). scale: of what is read.
    """
    library.load()
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(
        q, k, v, g=log_decay, beta=beta, scale=scale, initial_state=state, output_final_state=True
    )


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():  # the same where nothing is forgotten, as fast, and one set of kernels to compile
        return gated_delta_rule(q, k, v, beta, torch.zeros_like(beta), state, scale)
    library.load()
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(q, k, v, beta.to(q.dtype), scale=scale, initial_state=state, output_final_state=True)


def simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    library.load()
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g=log_decay, scale=1.0, initial_state=state, output_final_state=True)


def _hopper() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] == HOPPER


def _version() -> str:
    """Of the library, or nothing if it does not say."""
    try:
        return metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        return ""


def backward_problem(operation: str) -> str | None:
    """Why fla's gradients of `operation` cannot be trusted here, or None."""
    import triton

    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
    if operation == "gated_delta_rule" and importlib.util.find_spec("tilelang"):
        return None  # fla then takes that kernel from it
    if operation != "delta_rule" and _hopper() and (3, 4) <= version < (3, 7, 1):
        return f"gradients: flash-linear-attention's gated kernels are wrong on Hopper with triton {triton.__version__}"
    return None
