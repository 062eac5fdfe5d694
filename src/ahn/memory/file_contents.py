"""Reads the contents of a memory file without a model: sizes, documents, stored words, damage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.errors import MemoryFileError
from ahn.memory import segments
from ahn.memory.archive import Archive
from ahn.memory.file_format import (
    archive_damage,
    archive_parts,
    check_digest,
    checksum,
    last_memory,
    read_tensors,
    whose,
)
from ahn.memory.transcript import TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Held:
    """The contents of a memory file, sizes in bytes.

    Attributes:
        memory: of the current memory, the same however much is read.
        archive: of the archive, which grows with the text. ids, places, keys: its three kinds of tensors.
        heads: number of key/value heads whose keys are kept, by layer.
        documents: (name, tokens, pages) of each, in order; pages is 0 where a document has none.
    """

    memory: int
    archive: int = 0
    ids: int = 0
    places: int = 0
    keys: int = 0
    heads: dict[int, int] = field(default_factory=dict)
    documents: list[tuple[str, int, int]] = field(default_factory=list)


def check(path: str | Path, checksums: bool = False) -> dict[str, Any]:
    """The header of a memory file, if header, tensors and archive are there in full and agree in their sizes. No
    tensors are read. `checksums`: read all of the file and compare its checksums too. Raises MemoryFileError."""
    path = Path(path)
    header, memory = last_memory(path)
    tensors = read_tensors(path, memory)
    if header.get("archive") is not None:
        with archive_damage(path):
            chain = {segment.start: segment for segment in segments.walk(path)}
            Archive.restored(header["archive"], archive_parts(path, header["archive"], chain, checksums), None)
    if checksums:
        check_digest(path, header, checksum(header, tensors))
    if path.stat().st_size > memory.end:
        raise MemoryFileError(f"{path}: the end is damaged; loading it gives the memory before what was appended last")
    return header


def archive_bytes(header: dict[str, Any]) -> int:
    """Bytes of the archive in a memory file. `header`: of `peek`."""
    about = header.get("archive") or {"parts": []}
    return sum(end - start for start, end, _ in about["parts"])


def held(path: str | Path) -> Held:
    """Measure a memory file. Compares every checksum. Raises MemoryFileError."""
    path = Path(path)
    header, memory = last_memory(path)
    tensors = read_tensors(path, memory)
    check_digest(path, header, checksum(header, tensors))
    constant = sum(tensor.nbytes for tensor in tensors.values())
    if header.get("archive") is None:
        return Held(constant)
    with archive_damage(path):
        parts = archive_parts(path, header["archive"], {segment.start: segment for segment in segments.walk(path)})
        archive = Archive.restored(header["archive"], parts, None)
        named = [(name, tensor) for part in parts for name, tensor in part.items()]
        keys = {name: tensor for name, tensor in named if name.startswith("keys.")}
        return Held(
            memory=constant,
            archive=archive_bytes(header),
            ids=sum(tensor.nbytes for name, tensor in named if name == "ids"),
            places=sum(tensor.nbytes for name, tensor in named if name == "marks"),
            keys=sum(tensor.nbytes for name, tensor in named if name.startswith(("keys.", "tail."))),
            heads={int(name.partition(".")[2]): tensor.shape[1] for name, tensor in keys.items()},
            documents=archive.contents(),
        )


def retained(path: str | Path, base: PreTrainedConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that the store of a memory file keeps, of its first row. `base`: config of the base that it is of.

    Returns:
        positions [n] and token ids [n] of the words that are known, ascending, and the ranks [L, M, P] of the store in
        each layer that has one (`ahn.ops.ranks`).

    Raises:
        MemoryFileError: not a memory file, damaged, without a store, of another base, of a text so short that nothing
            has left the window, or of embeddings.
    """
    header, memory = last_memory(Path(path))
    if not header["config"].get("store"):
        raise MemoryFileError(
            f"{path}: was read without a store: expected a memory file that `ahn read` wrote with one (--store NAME)"
        )
    tensors = read_tensors(Path(path), memory)
    check_digest(path, header, checksum(header, tensors))
    layers = sorted({int(i) for name in tensors if (i := name.partition(".")[0]).isdecimal()})
    found = [tensors[name] for i in layers if (name := f"{i}.ranks") in tensors]
    if not found:
        raise MemoryFileError(f"{path}: nothing has left the window yet, so nothing is stored")
    if any(t.dtype != torch.int64 or t.dim() != 3 or t.shape != found[0].shape or not len(t) for t in found):
        raise MemoryFileError(f"{path}: damaged memory file: no ranks of a store")
    ranks = torch.stack([of_layer[0] for of_layer in found])
    _check_base(path, header, memory, base)
    if f"{TEXT}.0" not in tensors:
        raise MemoryFileError(f"{path}: was read from embeddings, so no words are known: expected one of a text")
    words = tensors[f"{TEXT}.0"]
    if words.dtype != torch.int64 or words.dim() != 2 or len(words) != 2:
        raise MemoryFileError(f"{path}: damaged memory file: no positions and ids of words")
    return (*words, ranks)


def check_base(path: str | Path, base: PreTrainedConfig) -> None:
    """Raises MemoryFileError if the memory cannot be one of a base with this config; no weights are needed."""
    _check_base(path, *last_memory(Path(path)), base)


def _check_base(path: str | Path, header: dict[str, Any], memory: segments.Segment, base: PreTrainedConfig) -> None:
    shapes = {name: tensor.shape for name, tensor in read_tensors(Path(path), memory).items()}
    text = base.get_text_config()
    layers = {int(i) for name in shapes if (i := name.partition(".")[0]).isdecimal()}
    heads = {shape[1] for name, shape in shapes.items() if name.endswith(".keys") and len(shape) == 4}
    words = {shape[-1] for name, shape in shapes.items() if name == "last_logits" and shape}
    kept = [
        ("layers", {1 + max(layers, default=-1)}, text.num_hidden_layers),
        ("key/value heads", heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        (
            "words in the vocabulary",
            words,
            text.vocab_size,
        ),
    ]
    if different := [f"{n:,} {what}, not {ours:,}" for what, theirs, ours in kept for n in theirs if n != ours]:
        raise MemoryFileError(f"{path}: memory of another model ({whose(header)}; {'; '.join(different)})")
