"""A few vectors times matrices, in Triton: the linear layers of one new token a row. No gradients.

Letters: V vectors, K their length, R rows of a matrix, that is outputs.

Such a product takes as long as reading the matrix. So the matrix is read once for all vectors. A program has few rows,
each multiprocessor several programs, each program several loads under way. Small matrices that are multiplied by the
same vectors are read by one kernel, where they lie. The kernel also normalises the vectors before the product, or adds
to its result.

Under TRITON_INTERPRET=1 they run on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ahn.ops.kernels.launch import options, release, wait

PROGRAMS = 512  # at least, if there are as many rows: about four for each of the 132 multiprocessors of an H100
ROWS = 4  # by one program, at most
TILE = 4096  # numbers by one program at a time, 32 for each thread
STAGES, WARPS = 4, 4  # tiles under way


class Norm(NamedTuple):
    """RMSNorm of the vectors: x / sqrt(mean x^2 + epsilon) times weight [K]."""

    weight: Tensor
    epsilon: float


def together(
    x: Tensor,
    layers: Sequence[Any],
    norm: Norm | None = None,
    normed: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """x [..., K], few vectors, through linear layers (`torch.nn.Linear`) of one dtype: [..., R], the
    outputs of all of them side by side.

    Args:
        norm: of x, before. normed: contiguous, as x; is given the normalised x. add: [..., R], to the outputs.
    """
    rows = tuple(layer.weight.shape[0] for layer in layers)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = flat.new_empty(len(flat), sum(rows))
    form = _form(flat, sum(rows))
    weights = tuple(layer.weight for layer in layers)
    biases = tuple(layer.weight if layer.bias is None else layer.bias for layer in layers)  # something to point to
    scale, epsilon = norm if norm is not None else (None, 0.0)
    _together[(sum(triton.cdiv(count, form["ROWS"]) for count in rows),)](
        flat, scale, normed, weights, biases, None if add is None else add.contiguous(), out, epsilon,
        COUNTS=rows, BIASED=tuple(layer.bias is not None for layer in layers), TOTAL=sum(rows), **form,
    )  # fmt: skip
    return out.view(*x.shape[:-1], -1)


def gated(x: Tensor, gate: Any, up: Any, norm: Norm | None = None) -> Tensor:
    """silu(gate x) * (up x), [..., R], of x [..., K], normalised by `norm`, and two linear layers."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    count = len(gate.weight)
    out = flat.new_empty(len(flat), count)
    form = _form(flat, count)
    scale, epsilon = norm if norm is not None else (None, 0.0)
    _gated[(triton.cdiv(count, form["ROWS"]),)](
        flat, scale, gate.weight, up.weight, gate.bias, up.bias, out, epsilon, COUNT=count, **form
    )
    return out.view(*x.shape[:-1], -1)


def _form(x: Tensor, rows: int) -> dict[str, Any]:
    """How the work of `rows` rows is cut, and launched."""
    vectors, length = x.shape
    width = triton.next_power_of_2(vectors)
    most = 1 << max(0, (rows // PROGRAMS).bit_length() - 1)
    part = min(ROWS, most)
    block = max(16, min(triton.next_power_of_2(length), TILE // part // width))
    cut = {"NUMBER": vectors, "WIDTH": width, "LENGTH": length, "ROWS": part, "BLOCK": block, "STAGES": STAGES}
    return cut | {"num_warps": WARPS} | options(x.device.type)


@triton.jit
def _together(
    x, norm, normed, weights, biases, add, out, epsilon,
    COUNTS: tl.constexpr, BIASED: tl.constexpr, TOTAL: tl.constexpr, NUMBER: tl.constexpr, WIDTH: tl.constexpr,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some rows of one of the matrices; and some tiles of the normalised vectors."""
    release(PDL)
    program = tl.program_id(0)
    weight, bias = weights[0], biases[0]
    count, biased = COUNTS[0], BIASED[0]
    first, column = 0, 0  # program of this matrix, column of the output
    programs, columns = tl.cdiv(COUNTS[0], ROWS), COUNTS[0]
    for i in tl.static_range(1, len(COUNTS)):
        if program >= programs:
            weight, bias = weights[i], biases[i]
            count, biased = COUNTS[i], BIASED[i]
            first, column = programs, columns
        programs += tl.cdiv(COUNTS[i], ROWS)
        columns += COUNTS[i]
    row = (program - first) * ROWS + tl.arange(0, ROWS)
    sums, length = _sums(x, norm, weight, row, row < count, epsilon, NUMBER, WIDTH, LENGTH, ROWS, BLOCK, STAGES, PDL)
    sums *= length
    sums += tl.load(bias + row, mask=(row < count) & biased, other=0.0).to(tl.float32)[None, :]
    vector = tl.arange(0, WIDTH)[:, None]
    place = vector * TOTAL + column + row[None, :]
    inside = (vector < NUMBER) & (row < count)[None, :]
    if add is not None:
        sums += tl.load(add + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)
    if normed is not None:
        for start in range(program * BLOCK, LENGTH, programs * BLOCK):
            channel = (start + tl.arange(0, BLOCK))[None, :]
            there = (vector < NUMBER) & (channel < LENGTH)
            tile = tl.load(x + vector * LENGTH + channel, mask=there, other=0.0).to(tl.float32) * length
            tile = tile.to(x.dtype.element_ty).to(tl.float32)
            tile *= tl.load(norm + channel, mask=channel < LENGTH, other=0.0).to(tl.float32)
            tl.store(normed + vector * LENGTH + channel, tile.to(normed.dtype.element_ty), mask=there)


@triton.jit
def _gated(
    x, norm, gate, up, gate_bias, up_bias, out, epsilon,
    COUNT: tl.constexpr, NUMBER: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some rows of both matrices."""
    release(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < COUNT
    opening, length = _sums(x, norm, gate, row, inside, epsilon, NUMBER, WIDTH, LENGTH, ROWS, BLOCK, STAGES, PDL)
    sums, _ = _sums(x, norm, up, row, inside, epsilon, NUMBER, WIDTH, LENGTH, ROWS, BLOCK, STAGES, False)
    opening *= length
    sums *= length
    if gate_bias is not None:
        opening += tl.load(gate_bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    if up_bias is not None:
        sums += tl.load(up_bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums *= opening * tl.sigmoid(opening)
    vector = tl.arange(0, WIDTH)[:, None]
    place = out + vector * COUNT + row[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(vector < NUMBER) & inside[None, :])


@triton.jit
def _sums(
    x, norm, weight, row, inside, epsilon, NUMBER: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products [WIDTH, ROWS] of the vectors and some rows of one matrix, summed over threads at the end; and what they
    are to be multiplied by for the norm, [WIDTH, 1]. The first tile of the matrix is under way before others are
    waited for."""
    vector = tl.arange(0, WIDTH)[:, None, None]
    lines = weight + row.to(tl.int64)[None, :, None] * LENGTH
    column = tl.arange(0, BLOCK)[None, None, :]
    early = tl.load(lines + column, mask=inside[None, :, None] & (column < LENGTH), other=0.0)
    wait(PDL)
    total = tl.zeros([WIDTH, ROWS, BLOCK], tl.float32)
    squares = tl.zeros([WIDTH, 1, BLOCK], tl.float32)
    for start in tl.range(BLOCK, LENGTH, BLOCK, num_stages=STAGES):
        column = (start + tl.arange(0, BLOCK))[None, None, :]
        part = tl.load(lines + column, mask=inside[None, :, None] & (column < LENGTH), other=0.0)
        vectors = tl.load(x + vector * LENGTH + column, mask=(vector < NUMBER) & (column < LENGTH), other=0.0)
        vectors = vectors.to(tl.float32)
        if norm is not None:
            squares += vectors * vectors
            vectors *= tl.load(norm + column, mask=column < LENGTH, other=0.0).to(tl.float32)
        total += part.to(tl.float32) * vectors
    column = tl.arange(0, BLOCK)[None, None, :]
    vectors = tl.load(x + vector * LENGTH + column, mask=(vector < NUMBER) & (column < LENGTH), other=0.0)
    vectors = vectors.to(tl.float32)
    if norm is not None:
        squares += vectors * vectors
        vectors *= tl.load(norm + column, mask=column < LENGTH, other=0.0).to(tl.float32)
    total += early.to(tl.float32) * vectors
    scale = tl.full([WIDTH, 1], 1.0, tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares, 2) / LENGTH + epsilon)
    return tl.sum(total, 2), scale
