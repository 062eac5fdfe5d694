"""Several safetensors files in one: each is complete in itself, and more can be appended without rewriting the first.

Each segment says in its first bytes how long it is, so a file is walked from its front. A segment that a killed process
left unfinished is not complete, and is ignored.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

HEADER = 100_000_000  # bytes that a header has at most, as in safetensors
ALIGNED = 8  # every segment begins at a multiple of so many bytes
PADDING = "padding"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """Bytes `start` to `end` - 1 of a file; the tensors lie from `data` on, as `index` says."""

    start: int
    data: int
    end: int
    metadata: dict[str, str]
    index: dict[str, Any]


def walk(path: Path) -> list[Segment]:
    """The complete segments of a file, in order. Raises OSError; ValueError if the first one is none."""
    found: list[Segment] = []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        while (start := found[-1].end if found else 0) < size:
            try:
                found.append(_segment(file, start, size))
            except ValueError:
                if not found:
                    raise
                break
    if not found:
        raise ValueError("the file is empty")
    return found


def _segment(file: BinaryIO, start: int, size: int) -> Segment:
    file.seek(start)
    length = int.from_bytes(file.read(8), "little")
    if length > min(HEADER, size - start - 8):
        raise ValueError(f"a header of {length:,} bytes, and {size - start - 8:,} follow")
    try:
        index = json.loads(file.read(length))
        metadata = index.pop("__metadata__", {})
        ends = [info["data_offsets"][1] for info in index.values()]
        if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
            raise ValueError("its metadata are no texts")
        if any(type(end) is not int or end < 0 for end in ends):
            raise ValueError("places of tensors that are no numbers")
        data = start + 8 + length
        segment = Segment(start, data, data + max(ends, default=0), metadata, index)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a header: {error}") from error
    if segment.end > size:
        raise ValueError(f"the file has {size:,} bytes, {segment.end:,} are needed")
    return segment


def read(path: Path, segment: Segment) -> dict[str, Tensor]:
    """Tensors of a segment, mapped into memory: pages come from the disk when they are looked at, and writing to a
    tensor does not change the file. Raises OSError, ValueError."""
    with path.open("rb") as file:
        if file.seek(0, 2) < segment.end:
            raise ValueError("the file is shorter than it was")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found = {}
    try:
        for name, info in segment.index.items():
            dtype, shape, (low, high) = DTYPES[info["dtype"]], info["shape"], info["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, low)) or prod(shape) * dtype.itemsize != high - low:
                raise ValueError(f"{name}: {shape} of {info['dtype']} in bytes {low} to {high}")
            if segment.data + high > segment.end:
                raise ValueError(f"{name}: ends behind its segment")
            flat = (
                torch.frombuffer(mapped, dtype=torch.uint8, count=high - low, offset=segment.data + low)
                if high > low
                else torch.empty(0, dtype=torch.uint8)
            )
            if (segment.data + low) % dtype.itemsize:  # only in files of others
                flat = flat.clone()
            found[name] = flat.view(dtype).reshape(shape)
    except (KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"not tensors: {error}") from error
    found.pop(PADDING, None)
    return found


def append(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, int]:
    """Write a segment at the end of an open file. Returns its first byte and its end. Raises OSError."""
    from safetensors.torch import save

    start = file.seek(0, 2)
    if missing := -sum(tensor.nbytes for tensor in tensors.values()) % ALIGNED:
        tensors = tensors | {PADDING: torch.zeros(missing, dtype=torch.uint8)}
    data = memoryview(save(tensors, metadata))
    while data:
        data = data[file.write(data) :]
    return start, file.tell()
