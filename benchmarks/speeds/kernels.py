"""The kernels of one token on a GPU, one by one, and with other constants: microseconds, and the bandwidth of what has
to be read. And those of a layer one after the other, with and without programmatic launch.

    python benchmarks/speed.py kernels                # everything, minutes: each choice of constants is compiled
    python benchmarks/speed.py kernels --products     # the layer, and the products with fewer choices, under a minute

The shape is that of a layer of Qwen2.5-3B, behind 131,072 tokens. Each is launched many times in one CUDA graph, on
copies that together are larger than the cache of the device.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import ahn
from ahn.ops import dispatch, specs
from common import now

try:
    from ahn.ops.kernels import decode, gemv, moves
except ModuleNotFoundError:  # no Triton, and so no GPU: `run` says so
    decode = gemv = moves = None

HIDDEN, INNER, HEADS, KV_HEADS, SIZE, SLOTS, SINKS = 2048, 11008, 16, 2, 128, 32768, 128
READERS = (HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE, HEADS, HEADS, HEADS)  # rows: q, k, v, gates
NAME, TINY = None, "--products"  # printed, not written
CACHE = 2e8  # bytes, more than any device caches
CUDA = torch.device("cuda")


def microseconds(make: Callable[[], Callable[[], Any]], size: float) -> float:
    """Of one launch of what `make` returns, which reads `size` bytes of its own."""
    calls = [make() for _ in range(min(100, max(2, int(CACHE / size))))]
    for call in calls:
        call()
    repeats = max(1, 64 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    start = now(CUDA)
    for _ in range(20):
        graph.replay()
    return 1e6 * (now(CUDA) - start) / (20 * repeats * len(calls))


def layers(*rows: int, length: int = HIDDEN) -> list[nn.Linear]:
    return [nn.Linear(length, count, bias=False, dtype=torch.bfloat16, device=CUDA) for count in rows]


def normed(length: int) -> Any:
    return gemv.Norm(torch.ones(length, dtype=torch.bfloat16, device=CUDA), 1e-6)


def readers(*rows: int) -> Callable[[], Callable[[], Any]]:
    x = torch.randn(1, 1, HIDDEN, dtype=torch.bfloat16, device=CUDA)

    def make() -> Callable[[], Any]:
        some, norm, place = layers(*rows), normed(HIDDEN), torch.empty_like(x)
        return lambda: gemv.together(x, some, norm, place)

    return make


def last(length: int) -> Callable[[], Callable[[], Any]]:
    x, add = (torch.randn(1, 1, size, dtype=torch.bfloat16, device=CUDA) for size in (length, HIDDEN))

    def make() -> Callable[[], Any]:
        some = layers(HIDDEN, length=length)
        return lambda: gemv.together(x, some, add=add)

    return make


def gated() -> Callable[[], Any]:
    x = torch.randn(1, 1, HIDDEN, dtype=torch.bfloat16, device=CUDA)
    (gate, up), norm = layers(INNER, INNER), normed(HIDDEN)
    return lambda: gemv.gated(x, gate, up, norm)


def rotate() -> Callable[[], Any]:
    q, k = (torch.randn(1, heads, 1, SIZE, dtype=torch.bfloat16, device=CUDA) for heads in (HEADS, KV_HEADS))
    angles, further = (
        torch.randn(2, 1, 1, SIZE, dtype=torch.bfloat16, device=CUDA),
        torch.randn(2, 1, 1, SIZE, device=CUDA),
    )
    return lambda: moves.rotate(q, k, tuple(angles), tuple(further))


def attend(merged: bool = True) -> Callable[[], Any]:
    q = torch.randn(1, HEADS, 1, SIZE, dtype=torch.bfloat16, device=CUDA)
    k, v = torch.randn(2, 1, KV_HEADS, SLOTS, SIZE, dtype=torch.bfloat16, device=CUDA)
    newest = torch.tensor([131072], device=CUDA)
    kernel = decode.attend if merged else decode.attend_parts
    return lambda: kernel(specs.Queries(q, q, SIZE**-0.5), k, v, SINKS, newest)


def cell() -> Callable[..., Any]:
    module = ahn.cells.get("gated_deltanet")(HIDDEN, HEADS, SIZE, torch.bfloat16, CUDA)
    form = module.step_form()
    q, out = torch.randn(2, 1, HEADS, 1, SIZE, dtype=torch.bfloat16, device=CUDA)
    k, v = torch.randn(2, 1, KV_HEADS, 1, SIZE, dtype=torch.bfloat16, device=CUDA)
    inputs, gate = (torch.randn(1, 1, n * HEADS, dtype=torch.bfloat16, device=CUDA) for n in (2, 1))
    state = torch.randn(1, HEADS, SIZE, SIZE, device=CUDA)

    def call(parts: specs.Parts | None = None) -> None:
        read = decode.recur(form, q, specs.Write(k, v, inputs, None), state, True, parts)
        decode.add_read(form, out.transpose(1, 2), read, gate, module.o_proj.weight, None)

    return call


def show(name: str, make: Callable[[], Callable[[], Any]], size: float, module: Any, **choices: Iterable[int]) -> None:
    """One line with the constants of `module` as they are, one for each other combination, and the best of them."""
    best: tuple[float, Any] = (float("inf"), None)
    usual = tuple(getattr(module, constant) for constant in choices)
    for values in [usual, *(some for some in itertools.product(*choices.values()) if some != usual)]:
        for constant, value in zip(choices, values, strict=True):
            setattr(module, constant, value)
        try:
            spent = microseconds(make, size)
            best = min(best, (spent, values), key=lambda pair: pair[0])
            found = f"{spent:6.2f} us  {size / spent / 1e6:5.2f} TB/s"
        except Exception as error:  # more registers or shared memory than there are
            found = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"{name:<24} {found}  {dict(zip(choices, values, strict=True))}", flush=True)
    for constant, value in zip(choices, usual, strict=True):
        setattr(module, constant, value)
    if choices and best[1] is not None:
        print(f"{name + ', best':<24} {best[0]:6.2f} us  {dict(zip(choices, best[1], strict=True))}", flush=True)


def layer() -> Callable[[], Any]:
    """All kernels of a layer but the exchange in the ring, in their order."""
    before, after = [readers(*READERS)(), rotate()], [last(HIDDEN)(), gated(), last(INNER)()]
    attention, memory = attend(merged=False), cell()

    def call() -> None:
        for kernel in before:
            kernel()
        memory(attention())
        for kernel in after:
            kernel()

    return call


def show_layer() -> None:
    size = 2 * HIDDEN * (sum(READERS) + HIDDEN + 3 * INNER) + 4 * KV_HEADS * SLOTS * SIZE
    for allowed in ("auto", ",".join(name for name in dispatch.KERNELS if name != "pdl")):
        os.environ["AHN_KERNEL"] = allowed
        spent = microseconds(layer, size)
        print(f"{'a layer':<24} {spent:6.2f} us  {size / spent / 1e6:5.2f} TB/s  AHN_KERNEL={allowed}", flush=True)
    del os.environ["AHN_KERNEL"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--products", action="store_true", help="these alone, with fewer choices of constants")


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.exit("no GPU here: these are kernels of CUDA")
    quick = options.products
    show_layer()
    tiles = {"ROWS": (4, 8, 16), "TILE": (4096, 8192), "STAGES": (2, 4), "WARPS": (4, 8)}
    small = {"PROGRAMS": (256, 512, 1024), "TILE": (2048, 4096, 8192), "STAGES": (2, 4), "WARPS": (4, 8)}
    if quick:
        tiles |= {"TILE": (4096,), "STAGES": (4,)}
        small |= {"PROGRAMS": (256, 512), "TILE": (4096,), "STAGES": (4,)}
    show("gate, up", gated, 4 * HIDDEN * INNER, gemv, **tiles)
    show("down", last(INNER), 2 * HIDDEN * INNER, gemv, **small)
    show("q, k, v, gates", readers(*READERS), 2 * HIDDEN * sum(READERS), gemv, **small)
    show("o", last(HIDDEN), 2 * HIDDEN**2, gemv, **small)
    if quick:
        return
    ring = {"BLOCK": (32, 64, 128), "WARPS": (4, 8), "STAGES": (2, 3, 4), "PROGRAMS": (264, 528)}
    show("attention, merge", attend, 4 * KV_HEADS * SLOTS * SIZE, decode, **ring)
    show("recurrence, output", cell, 10 * HEADS * SIZE**2, decode, COLUMNS=(8, 16, 32))
    show("rotation", rotate, 4 * SIZE * (2 * HEADS + KV_HEADS), moves)
