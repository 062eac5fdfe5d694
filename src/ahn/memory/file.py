"""Memory files: a cache written to one file, and read again for the model that it is of."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ahn import files, fingerprint, weights
from ahn.config import AHNConfig
from ahn.errors import MemoryFileError, OutputError, some
from ahn.memory import segments
from ahn.memory.archive import Archive
from ahn.memory.file_format import (
    VERSION,
    WITH_ARCHIVE,
    archive_damage,
    archive_parts,
    check_digest,
    checksum,
    last_memory,
    read_tensors,
    whose,
)
from ahn.memory.handle import handle_of, layers_of
from ahn.memory.transcript import TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ahn.memory.cache import AHNCache

logger = logging.getLogger(__name__)

SIZES = "window", "sinks", "store_size"  # of a memory, which a model takes from the file that it loads


class Home(NamedTuple):
    """The place of an archive in its file: its parts, and the end of the file, where more is appended."""

    path: Path
    inode: int
    end: int
    parts: list[tuple[int, int, str]]
    tokens: int
    memories: int  # bytes of all memories in the file, of which one counts


def save(cache: AHNCache, path: str | Path) -> None:
    """Write `cache` to `path`, whole or not at all: if it fails, an earlier file is still there.

    If the memory was loaded from `path` or saved there before, it is appended, unless outdated memories would then take
    most of the file.

    Raises:
        MemoryFileError: nothing was read yet, or the file cannot be written. The message says why.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if not cache.tokens_seen:
        raise MemoryFileError(f"{path}: the memory is empty, read something first")
    tensors = {f"{i}.{name}": t for i, layer in enumerate(cache.layers) for name, t in layer.tensors.items()}
    if cache.transcript is not None:
        cache.trim_transcript()
        tensors |= {f"{TEXT}.{row}": ids for row, ids in enumerate(cache.transcript.rows)}
    if cache.last_logits is not None:
        tensors["last_logits"] = cache.last_logits
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    header = {"ahn": VERSION, **cache.describe()}
    try:
        if cache.archive is not None:
            _save_with_archive(cache.archive, header, tensors, files.checked(path))
            return
        header["sha256"] = checksum(header, tensors)
        with files.atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"memory": json.dumps(header)})
    except OutputError as error:
        raise MemoryFileError(str(error)) from error


def _save_with_archive(archive: Archive, header: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    header["ahn"], home, size = WITH_ARCHIVE, archive.home, sum(tensor.nbytes for tensor in tensors.values())
    worth = home is not None and home.memories + size <= sum(end - start for start, end, _ in home.parts)
    if worth and home.path == path and path.exists():
        with files.appending(path, home.end, home.inode) as appended:
            if appended is not None:
                archive.home = _append(appended, path, archive, header, tensors, home)
                return
    with files.atomic(path) as temporary, temporary.open("r+b") as file:
        written = _append(file, path, archive, header, tensors, None)
    archive.home = written._replace(inode=path.stat().st_ino)


def _append(
    file: BinaryIO, path: Path, archive: Archive, header: dict[str, Any], tensors: dict[str, Tensor], home: Home | None
) -> Home:
    first, parts, memories = (home.tokens, list(home.parts), home.memories) if home else (0, [], 0)
    if len(archive) > first or not parts:
        more = {name: tensor.contiguous() for name, tensor in archive.tensors(first).items()}
        digest = checksum({"ahn": WITH_ARCHIVE, "archive": first}, more)
        parts.append((*segments.append(file, more, {"archive": str(first)}), digest))
    header["archive"] = {**archive.describe(), "parts": parts}
    header["sha256"] = checksum(header, tensors)
    start, end = segments.append(file, tensors, {"memory": json.dumps(header)})
    inode = os.fstat(file.fileno()).st_ino
    return Home(path, inode, end, parts, len(archive), memories + end - start)


def load(path: str | Path, model: PreTrainedModel, empty: Callable[[PreTrainedModel], AHNCache]) -> AHNCache:
    """Read a file written by `save` into a cache for `model`, which `empty` makes. The model takes window, sinks and
    store size from the file; if loading fails it keeps its own.

    Raises:
        MemoryFileError: not a memory file, damaged, of another version, base, adapter, dtype or config.
    """
    handle = handle_of(model)
    before = handle.config
    try:
        return _loaded(path, model, empty)
    except BaseException:
        handle.resize(*(getattr(before, name) for name in SIZES))
        raise


def _loaded(path: str | Path, model: PreTrainedModel, empty: Callable[[PreTrainedModel], AHNCache]) -> AHNCache:
    header, memory = last_memory(Path(path))
    if (size := Path(path).stat().st_size) > memory.end:
        logger.warning(
            "%s: its last %s bytes are an unfinished memory; the one before it is used",
            path,
            f"{size - memory.end:,}",
        )
    config, handle = AHNConfig.from_dict(header["config"]), handle_of(model)
    pairs = zip(config.to_dict().items(), handle.config.to_dict().values(), strict=True)
    different = {name: (theirs, ours) for (name, theirs), ours in pairs if theirs != ours}
    if different.keys() - set(SIZES):
        differing = ", ".join(f"{name}={theirs!r}, not {ours!r}" for name, (theirs, ours) in different.items())
        raise MemoryFileError(f"{path}: memory of another model ({whose(header)}; {differing})")
    if different:
        handle.resize(*(getattr(config, name) for name in SIZES))
    cache = empty(model)
    ours = cache.describe()
    for key in ("dtype", "fingerprint"):
        if header[key] != ours[key] and not (key == "fingerprint" and header[key] in _earlier_fingerprints(model)):
            raise MemoryFileError(
                f"{path}: memory of another model ({whose(header)}; {key} {header[key]}, not {ours[key]})"
            )
    tensors = read_tensors(Path(path), memory)
    homes = {str(i): layer.self_attn.o_proj.weight.device for i, layer in enumerate(model.get_decoder().layers)}
    with ThreadPoolExecutor(1) as aside:
        digest = aside.submit(checksum, header, tensors)
        moved = {name: t.to(homes.get(name.partition(".")[0], model.device)) for name, t in tensors.items()}
    check_digest(path, header, digest.result())
    _check_tensors(path, header, tensors, cache, model)
    cache.restore(header, moved)
    if header.get("archive") is not None:
        cache.set_archive(_archive(Path(path), header, model))
    return cache


def _earlier_fingerprints(model: PreTrainedModel) -> list[str]:
    """Fingerprints of this model as earlier versions computed them."""
    found = [fingerprint.sampled(model)]
    return [*found, fingerprint.fingerprint(model, adapters=False)] if weights.adapters(model) else found


def _archive(path: Path, header: dict[str, Any], model: PreTrainedModel) -> Archive:
    """The archive of a memory file, mapped into memory. Raises MemoryFileError."""
    about = header["archive"]
    heads = model.ahn_retrieval if about.get("heads") is not None else None
    if about.get("heads") != (heads and heads.digest):
        raise MemoryFileError(f"{path}: its archive has keys of other retrieval heads than those of the adapter")
    with archive_damage(path):
        chain = {segment.start: segment for segment in segments.walk(path)}
        archive = Archive.restored(about, archive_parts(path, about, chain), heads)
        words = model.get_input_embeddings().num_embeddings
        if len(archive) and not 0 <= archive.ids.min() <= archive.ids.max() < words:
            raise ValueError(f"token ids: expected 0 to {words - 1}")
    if archive.kind == "text" and len(archive) > max(header["seen"]):
        raise MemoryFileError(f"{path}: damaged archive: of more tokens than were read")
    end = max(segment.end for segment in chain.values())
    memories = sum(segment.end - segment.start for segment in chain.values() if "memory" in segment.metadata)
    real = Path(os.path.realpath(path))
    archive.home = Home(real, real.stat().st_ino, end, [tuple(part) for part in about["parts"]], len(archive), memories)
    return archive


def _check_tensors(
    path: str | Path, header: dict[str, Any], tensors: dict[str, Tensor], cache: AHNCache, model: PreTrainedModel
) -> None:
    """Raises MemoryFileError unless these are the tensors of a memory of this model after so many tokens."""
    text, batch, tokens = model.config.get_text_config(), header["batch"], max(header["seen"])
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    expected: dict[str, tuple[list[int], torch.dtype]] = {}
    for i, (layer, attention) in enumerate(zip(layers_of(model), model.get_decoder().layers, strict=True)):
        keys = tensors.get(f"{i}.keys")
        if keys is None or not _is_like(keys, [batch, kv_heads, None, attention.self_attn.head_dim]):
            raise MemoryFileError(f"{path}: damaged memory file: no keys of layer {i} that fit the model")
        room = keys.shape[2] if layer.window is None else min(keys.shape[2], layer.sinks + layer.window)
        memory = layer.memory()
        memory.reserve(max(tokens, room), keys[:, :, :0].to("meta"), layer.state_shape)
        expected |= {f"{i}.{name}": (list(t.shape), t.dtype) for name, t in memory.tensors.items()}
    rows = [name for name in tensors if name.startswith(f"{TEXT}.")] if cache.transcript is not None else []
    for row in range(len(rows) if len(rows) in (1, batch) else 0):
        ids = tensors.get(f"{TEXT}.{row}")
        expected[f"{TEXT}.{row}"] = [2, 0 if ids is None or not ids.dim() else ids.shape[-1]], torch.int64
    logits = tensors.get("last_logits")
    if logits is not None and _is_like(logits, [batch, text.vocab_size]):
        expected["last_logits"] = list(logits.shape), logits.dtype
    found = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if wrong := sorted(repr(name) for name in expected.keys() | found if expected.get(name) != found.get(name)):
        raise MemoryFileError(f"{path}: damaged memory file: not as in a memory of this model: {some(wrong)}")


def _is_like(tensor: Tensor, shape: list[int | None]) -> bool:
    """Whether the tensor holds floating-point numbers in this shape. None in the shape: any size of at least 1."""
    if tensor.dim() != len(shape) or not tensor.is_floating_point():
        return False
    return all(n == size or (size is None and n) for n, size in zip(tensor.shape, shape, strict=True))
