"""Picks the implementation of each operation and says why. Nothing else does; the functions compute nothing.

The environment variable AHN_KERNEL restricts the choice: a comma-separated list of the kernels that may be used where
they can (`KERNELS`), or "torch" for plain torch everywhere. Not set, or "auto": all may. Plain torch computes where no
other kernel may be used or none can, and `ahn info` says why.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ahn.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


KERNELS = {
    "fla": "flash-linear-attention: the cell over many tokens",
    "cudnn": "cuDNN's fused attention: reading",
    "flash": "torch's fused attention: reading",
    "flex": "torch's FlexAttention: training",
    "graph": "a CUDA graph of the whole step: one token",
    "inductor": "torch.compile, for the elementwise work between products: in that graph, and reading",
    "gemv": "this package's own, for the linear layers of the base in that graph",
    "triton": "this package's own: attention and cell of one token, a store while reading and in training",
    "pdl": "programmatic launch: each of the own kernels starts while the one before it ends",
}
FLEX_BLOCK = 128
FEW_ROWS = 4
NARROW = 2048  # up to this window, pieces longer than the window are faster where `pick_band` picks one kernel
PLANNED = 4096  # from this number of queries on, cuDNN's plan for it is worth its second, once in each process
SHAPES = 64  # one function is compiled for up to so many lengths or numbers of rows; torch's own limit is 8
LONG = 65536  # from a text of so many tokens on, compiling is worth its seconds


class Kernel(NamedTuple):
    """`name`: one of KERNELS or "torch"; `reason`: why this one."""

    name: str
    reason: str


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Within, kernels are launched on this device: Triton launches on the current one."""
    import torch

    if device.type != "cuda" or torch.compiler.is_compiling() or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def pick_cell(operation: str | None, like: Tensor, gradients: bool = False) -> Kernel:
    """The cell over many tokens, on the device and in the dtype of `like`."""
    import torch

    if operation is None:
        return Kernel("torch", "the cell names no operation of flash-linear-attention")
    if like.device.type != "cuda":
        return Kernel("torch", f"{like.device.type}: flash-linear-attention needs CUDA")
    if not _installed("fla"):
        return Kernel("torch", "flash-linear-attention is not installed (pip install ahn[gpu])")
    if like.dtype == torch.float32:
        return Kernel("torch", "float32: flash-linear-attention multiplies in TF32, off by 1e-3")
    if gradients:
        from ahn.ops import fla

        if broken := fla.backward_problem(operation):
            return Kernel("torch", broken)
    return _allowed("fla", "CUDA, half precision, flash-linear-attention installed")


def pick_whole_sequence(device: str, head_size: int, tokens: int) -> Kernel:
    """Sinks and window of a sequence without a cache, with gradients."""
    if device != "cuda":
        return Kernel("torch", f"{device}: FlexAttention needs CUDA")
    if head_size < 16 or tokens % FLEX_BLOCK:
        # each other length would be compiled anew
        return Kernel("torch", f"heads of {head_size}, {tokens} tokens: FlexAttention has blocks of {FLEX_BLOCK}")
    return _allowed("flex", "CUDA, a whole sequence: FlexAttention, compiled once")


def pick_attention(like: Tensor, gradients: bool = False) -> Kernel:
    """Softmax attention of many queries with its normaliser; `like`: the queries [..., H]."""
    device, size = like.device.type, like.shape[-1]
    if gradients:
        return Kernel("torch", "gradients: plain torch on blocks of queries")
    if device == "cpu":
        return _allowed("flash", "cpu: torch's fused kernel, which also returns the normaliser")
    if device != "cuda":
        return Kernel("torch", f"{device}: plain torch on blocks of queries")
    if like.dtype.itemsize != 2 or size % 8 or size > 256:
        return Kernel("torch", f"{like.dtype}, heads of {size}: fused kernels are for half precision and up to 256")
    kernel = _allowed("cudnn", "Hopper or later: cuDNN's is the fastest there")
    if kernel.name == "cudnn" and size <= 128 and (reason := _cudnn_problem()) is None:
        return kernel
    return _allowed("flash", f"FlashAttention; cuDNN: {reason if kernel.name == 'cudnn' and size <= 128 else 'no'}")


def window_in_one(like: Tensor, window: int) -> bool:
    """Whether the one kernel of `pick_band` attends to sinks and window faster than dense parts do; `like`: the queries
    [..., T, H]."""
    if pick_band(like).name != "triton":
        return False
    return window <= NARROW or (like.shape[-2] < PLANNED and pick_attention(like).name == "cudnn")


def pick_rotation(device: str, gradients: bool = False) -> Kernel:
    """Rotation of many queries or keys to other positions."""
    if gradients:
        return Kernel("torch", "gradients: plain torch")
    if reason := _no_triton(device):
        return Kernel("torch", reason)
    return _allowed("triton", f"{device}: one kernel")


def pick_eviction(device: str) -> Kernel:
    """Eviction from a store, many tokens at once."""
    if reason := _no_triton(device):
        return Kernel("torch", reason)
    return _allowed("triton", f"{device}: all steps at once, in two kernels")


def pick_band(like: Tensor, gradients: bool = False) -> Kernel:
    """Softmax attention of many queries over sinks, store and a window that moves on; `like`: the queries [..., H]."""
    import torch

    if gradients:
        return Kernel("torch", "gradients: plain torch on blocks of queries")
    if reason := _no_triton(like.device.type):
        return Kernel("torch", reason)
    if like.dtype == torch.float64 or like.shape[-1] > 256:
        return Kernel("torch", f"{like.dtype}, heads of {like.shape[-1]}: the kernel is for up to 256, no float64")
    return _allowed("triton", f"{like.device.type}: one kernel, which reads no key that is not seen")


def dense_at_once(like: Tensor, keys: int) -> int:
    """How many of the kept keys that all queries see cuDNN attends to instead of `pick_band`, or a multiple; 0: none.
    The result takes few values, because cuDNN plans for each. `like`: the queries [..., T, H]."""
    if like.shape[-2] < PLANNED or keys < PLANNED or pick_attention(like).name != "cudnn":
        return 0
    return keys // 16 // 128 * 128


def pick_soft_slots(like: Tensor) -> Kernel:
    """Training the gates of a store: attention with weights on the tokens behind the window; `like`: the queries."""
    import torch

    if reason := _no_triton(like.device.type):
        return Kernel("torch", reason)
    if like.dtype == torch.float64 or like.shape[-1] > 128:
        return Kernel("torch", f"{like.dtype}, heads of {like.shape[-1]}: the kernel is for up to 128, no float64")
    return _allowed("triton", f"{like.device.type}: forward and backward, no score is kept")


def pick_one_token(device: str) -> Kernel:
    """Attention and cell of one new token a row."""
    if reason := _no_triton(device):
        return Kernel("torch", reason)
    interpreted = ", interpreted" if device != "cuda" else ""
    return _allowed("triton", f"{device}{interpreted}: one kernel each")


def pick_decoding(device: str) -> Kernel:
    """All layers for one new token a row."""
    if device != "cuda":
        return Kernel("torch", f"{device}: graphs need CUDA")
    return _allowed("graph", "CUDA: captured once, replayed for each token")


def in_turn(device: str) -> bool:
    """Whether the calls of one model run one after the other, whatever their threads: a graph lends its buffers to one
    cache at a time, and modules are changed while it is captured or a chunk is read."""
    return device == "cuda" or pick_decoding(device).name == "graph"


def pick_between(device: str) -> Kernel:
    """Norms, rotations and gates of the base, between its matrix products, for one new token a row."""
    if pick_decoding(device).name != "graph":
        return Kernel("torch", "only in a graph is it worth compiling")
    return _allowed("inductor", "CUDA: what the kernels of products leave, compiled once")


def pick_between_many(device: str, tokens: int) -> Kernel:
    """The elementwise work of base and memory while a text of `tokens` tokens is read."""
    if device != "cuda":
        return Kernel("torch", f"{device}: nothing is won by compiling")
    if tokens < LONG:
        return Kernel("torch", f"{tokens:,} tokens: compiling takes longer, {LONG:,} are worth it")
    return _allowed("inductor", f"CUDA, from {LONG:,} tokens on: compiled once for chunks of any length")


def pick_products(device: str, rows: int) -> Kernel:
    """Linear layers of the base and of the cell for one new token in each of `rows` rows."""
    if pick_decoding(device).name != "graph":
        return Kernel("torch", "only in a graph are they worth launching")
    if reason := _no_triton(device):
        return Kernel("torch", reason)
    if rows > FEW_ROWS:
        return Kernel("torch", f"{rows} rows: tensor cores are faster")
    return _allowed("gemv", f"CUDA, up to {FEW_ROWS} rows: each weight is read once, those of one input by one kernel")


def pick_launches(device: str) -> Kernel:
    """How kernels of this package follow each other."""
    if reason := _no_triton(device):
        return Kernel("torch", reason)
    if device != "cuda":
        return Kernel("torch", f"{device}: nothing is launched")
    if reason := _no_programmatic_launch():
        return Kernel("torch", reason)
    return _allowed("pdl", "Hopper or later: a kernel starts, and reads its weights, while the one before it ends")


def check_setting() -> None:
    """Raises ConfigError if AHN_KERNEL names a kernel that does not exist."""
    _names(os.environ.get("AHN_KERNEL", "auto"))


def _allowed(name: str, reason: str) -> Kernel:
    setting = os.environ.get("AHN_KERNEL", "auto")
    return Kernel(name, reason) if name in _names(setting) else Kernel("torch", f"AHN_KERNEL={setting}")


@cache
def _names(setting: str) -> frozenset[str]:
    """The kernels that AHN_KERNEL names. Raises ConfigError for one that does not exist."""
    names = {name.strip() for name in setting.split(",")} - {""}
    if not names or names == {"auto"}:
        return frozenset(KERNELS)
    if names != {"torch"} and (unknown := ", ".join(sorted(names - KERNELS.keys()))):
        raise ConfigError(
            f"AHN_KERNEL={setting}: no kernel {unknown}; expected auto or torch alone, or some of {', '.join(KERNELS)}"
        )
    return frozenset(names)


@cache
def _cudnn_problem() -> str | None:
    """Why cuDNN's attention cannot be used, or None: tried once on a small case, its normaliser included."""
    import torch

    if torch.cuda.get_device_capability()[0] < 9:
        return "slower than FlashAttention before Hopper"
    q, k, v = _some(3, 1, 1, 128, 64).unbind()
    try:
        lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, scale=0.125)[1]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    expected = (q.float() @ k.float().transpose(-1, -2) * 0.125).logsumexp(-1)
    return None if torch.allclose(lse.reshape(1, 1, 128), expected, atol=1e-2) else "its normaliser is another"


@cache
def groups_heads() -> bool:
    """Whether cuDNN's attention lets query heads share heads of keys by itself: tried once on a small case."""
    import torch

    q, k, v = _some(1, 8, 128, 64).split([4, 2, 2], 1)
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    try:
        found = attend(q, k, v, None, True, 0.0, True, scale=0.125)[:2]
    except RuntimeError:
        return False
    expected = attend(q, *(t.repeat_interleave(2, 1) for t in (k, v)), None, True, 0.0, True, scale=0.125)[:2]
    return all(bool((a - b).norm() < 0.01 * b.norm()) for a, b in zip(found, expected, strict=True))


def _some(*shape: int) -> Tensor:
    """Numbers to try a kernel with, without a change of the random state of the process."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)


def _no_triton(device: str) -> str | None:
    """Why this package's own kernels cannot run, or None."""
    if not _installed("triton"):
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"{device}: Triton kernels need CUDA"
    return None


@cache
def _no_programmatic_launch() -> str | None:
    """Why kernels start one after the other, or None."""
    import torch
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.language.extra import cuda

    if torch.version.hip or torch.cuda.get_device_capability()[0] < 9:
        return "programmatic launch is for Hopper and later"
    if not hasattr(cuda, "gdc_wait") or not hasattr(CUDAOptions, "launch_pdl"):
        return "this version of triton has no programmatic launch"
    return None


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
