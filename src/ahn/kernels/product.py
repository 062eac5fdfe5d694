"""A few vectors times matrices, in Triton: the linear layers of one new token a row. No gradients.

Letters: V vectors, K their length, R rows of a matrix, that is outputs.

Such a product is as fast as the matrix is read. So it is read once for all vectors, by programs of few rows, of which
there are several for each multiprocessor and each has several loads under way; and small matrices that are multiplied
by the same vectors are read by one kernel, where they lie.

Under TRITON_INTERPRET=1 they run on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # at least, if there are as many rows: about four for each of the 132 multiprocessors of an H100
ROWS = 8  # by one program, at most
TILE = 4096  # numbers by one program at a time, 32 for each thread
STAGES = 4  # tiles under way


def together(x: Tensor, layers: Sequence[Any]) -> Tensor:
    """x [..., K], few vectors, through linear layers (`torch.nn.Linear`) of one dtype: [..., R], the
    outputs of all of them side by side."""
    rows = tuple(layer.weight.shape[0] for layer in layers)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = flat.new_empty(len(flat), sum(rows))
    form = _form(flat, sum(rows))
    weights = tuple(layer.weight for layer in layers)
    biases = tuple(layer.weight if layer.bias is None else layer.bias for layer in layers)  # a place to point to
    _together[(sum(triton.cdiv(count, form["ROWS"]) for count in rows),)](
        flat, weights, biases, out,
        COUNTS=rows, BIASED=tuple(layer.bias is not None for layer in layers), TOTAL=sum(rows), **form,
    )  # fmt: skip
    return out.view(*x.shape[:-1], -1)


def gated(x: Tensor, gate: Any, up: Any) -> Tensor:
    """silu(gate x) * (up x), [..., R], of x [..., K] and two linear layers."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    count = len(gate.weight)
    out = flat.new_empty(len(flat), count)
    form = _form(flat, count)
    _gated[(triton.cdiv(count, form["ROWS"]),)](
        flat, gate.weight, up.weight, gate.bias, up.bias, out, COUNT=count, **form
    )
    return out.view(*x.shape[:-1], -1)


def _form(x: Tensor, rows: int) -> dict[str, int]:
    """How the work of `rows` rows is cut."""
    vectors, length = x.shape
    width = triton.next_power_of_2(vectors)
    most = 1 << max(0, (rows // PROGRAMS).bit_length() - 1)
    part = min(ROWS, most)
    block = max(16, min(triton.next_power_of_2(length), TILE // part // width))
    return {"NUMBER": vectors, "WIDTH": width, "LENGTH": length, "ROWS": part, "BLOCK": block, "STAGES": STAGES}


@triton.jit
def _together(
    x, weights, biases, out,
    COUNTS: tl.constexpr, BIASED: tl.constexpr, TOTAL: tl.constexpr, NUMBER: tl.constexpr, WIDTH: tl.constexpr,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some rows of one of the matrices."""
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
    sums = _sums(x, weight, row, row < count, NUMBER, WIDTH, LENGTH, ROWS, BLOCK, STAGES)
    sums += tl.load(bias + row, mask=(row < count) & biased, other=0.0).to(tl.float32)[None, :]
    vector = tl.arange(0, WIDTH)[:, None]
    place = out + vector * TOTAL + column + row[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(vector < NUMBER) & (row < count)[None, :])


@triton.jit
def _gated(
    x, gate, up, gate_bias, up_bias, out,
    COUNT: tl.constexpr, NUMBER: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some rows of both matrices."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < COUNT
    opening = _sums(x, gate, row, inside, NUMBER, WIDTH, LENGTH, ROWS, BLOCK, STAGES)
    sums = _sums(x, up, row, inside, NUMBER, WIDTH, LENGTH, ROWS, BLOCK, STAGES)
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
    x, weight, row, inside, NUMBER: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products [WIDTH, ROWS] of the vectors and some rows of one matrix, summed over threads at the end."""
    vector = tl.arange(0, WIDTH)[:, None, None]
    lines = weight + row.to(tl.int64)[None, :, None] * LENGTH
    total = tl.zeros([WIDTH, ROWS, BLOCK], tl.float32)
    for start in tl.range(0, LENGTH, BLOCK, num_stages=STAGES):
        column = (start + tl.arange(0, BLOCK))[None, None, :]
        part = tl.load(lines + column, mask=inside[None, :, None] & (column < LENGTH), other=0.0)
        vectors = tl.load(x + vector * LENGTH + column, mask=(vector < NUMBER) & (column < LENGTH), other=0.0)
        total += part.to(tl.float32) * vectors.to(tl.float32)
    return tl.sum(total, 2)
