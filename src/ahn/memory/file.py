"""Memory files: one safetensors file with every layer's tensors, and a header that says whose memory it is.

With an archive (`ahn.memory.archive`) there are several such files one behind the other in one (`ahn.memory.segments`):
parts of the archive, and behind them the memory, of which the last one counts. So more text can be appended without
rewriting what was there.

Header keys: `ahn` (file version), `package` (version that wrote it), `config`, `fingerprint` (`ahn.fingerprint`),
`dtype`, `tokens_seen`, `seen` (real tokens by row), `batch`, `texts` (`AHNCache.texts`), `base` and `adapter` (names,
for people and the command line), `sha256` over all of these and over every tensor: since version 2 over the checksums
of its pieces, which are computed side by side. With an archive also `archive`: what it
holds, and its parts as [first byte, end, checksum].
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ahn import files, fingerprint, weights
from ahn.config import AHNConfig
from ahn.errors import ConfigError, MemoryFileError, OutputError, some
from ahn.memory import segments
from ahn.memory.archive import Archive
from ahn.memory.handle import layers_of
from ahn.memory.transcript import TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ahn.memory.cache import AHNCache

logger = logging.getLogger(__name__)

VERSION = 2  # 1: one checksum over all bytes in a row
WITH_ARCHIVE = 3
MOST = 1 << 32  # tokens: positions have so many values in a rank (`ahn.ops.ranks`)
PIECE = 1 << 24  # bytes of a tensor that are checked at once


class Home(NamedTuple):
    """Where an archive lies: its parts, and the end of the file, which is where more is appended."""

    path: Path
    inode: int
    end: int
    parts: list[tuple[int, int, str]]
    tokens: int
    memories: int  # bytes of all memories in the file, of which one counts


def save(cache: AHNCache, path: str | Path) -> None:
    """Write `cache` to `path`: whole or not at all, an earlier file survives a failure.

    A memory that was loaded from `path` or saved there, and has read more since, is appended, unless most of the file
    would be memories that do not count any more.

    Raises:
        MemoryFileError: nothing was read yet, or the file cannot be written; says why.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if not cache.tokens_seen:
        raise MemoryFileError(f"{path}: the memory is empty, read something first")
    tensors = {f"{i}.{name}": t for i, layer in enumerate(cache.layers) for name, t in layer.tensors.items()}
    if cache.transcript is not None:
        cache.settle_transcript()
        tensors |= {f"{TEXT}.{row}": ids for row, ids in enumerate(cache.transcript.rows)}
    if cache.last_logits is not None:
        tensors["last_logits"] = cache.last_logits
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    header = {"ahn": VERSION, **cache.describe()}
    try:
        if cache.archive is not None:
            _save_with_archive(cache.archive, header, tensors, files.checked(path))
            return
        header["sha256"] = _digest(header, tensors)
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
        digest = _digest({"ahn": WITH_ARCHIVE, "archive": first}, more)
        parts.append((*segments.append(file, more, {"archive": str(first)}), digest))
    header["archive"] = {**archive.describe(), "parts": parts}
    header["sha256"] = _digest(header, tensors)
    start, end = segments.append(file, tensors, {"memory": json.dumps(header)})
    inode = os.fstat(file.fileno()).st_ino
    return Home(path, inode, end, parts, len(archive), memories + end - start)


def load(path: str | Path, model: PreTrainedModel, empty: Callable[[PreTrainedModel], AHNCache]) -> AHNCache:
    """Read a file written by `save` into a cache for `model`, which `empty` makes.

    Raises:
        MemoryFileError: not a memory file, damaged, of another version, base, adapter, dtype or config.
    """
    header, memory = _last(Path(path))
    if (size := Path(path).stat().st_size) > memory.end:
        logger.warning(
            "%s: its last %s bytes are of a memory that was not written to its end; the one before is used",
            path,
            f"{size - memory.end:,}",
        )
    cache = empty(model)
    config = AHNConfig.from_dict(header["config"])
    if config != cache.config:
        pairs = zip(config.to_dict().items(), cache.config.to_dict().values(), strict=True)
        differing = ", ".join(f"{name}={theirs!r}, not {ours!r}" for (name, theirs), ours in pairs if theirs != ours)
        raise MemoryFileError(f"{path}: memory of another model ({_whose(header)}; {differing})")
    ours = cache.describe()
    for key in ("dtype", "fingerprint"):
        if header[key] != ours[key] and not (key == "fingerprint" and header[key] in _earlier_fingerprints(model)):
            raise MemoryFileError(
                f"{path}: memory of another model ({_whose(header)}; {key} {header[key]}, not {ours[key]})"
            )
    tensors = _tensors(Path(path), memory)
    homes = {str(i): layer.self_attn.o_proj.weight.device for i, layer in enumerate(model.get_decoder().layers)}
    with ThreadPoolExecutor(1) as aside:
        digest = aside.submit(_digest, header, tensors)
        moved = {name: t.to(homes.get(name.partition(".")[0], model.device)) for name, t in tensors.items()}
    _check_digest(path, header, digest.result())
    _check_tensors(path, header, tensors, cache, model)
    cache.restore(header, moved)
    if header.get("archive") is not None:
        cache.set_archive(_archive(Path(path), header, model))
    return cache


def _earlier_fingerprints(model: PreTrainedModel) -> list[str]:
    """Those that earlier versions would have written."""
    found = [fingerprint.sampled(model)]
    return [*found, fingerprint.fingerprint(model, adapters=False)] if weights.adapters(model) else found


def _archive(path: Path, header: dict[str, Any], model: PreTrainedModel) -> Archive:
    """The archive of a memory file, mapped into memory. Raises MemoryFileError."""
    about = header["archive"]
    heads = model.ahn_retrieval if about.get("heads") is not None else None
    if about.get("heads") != (heads and heads.digest):
        raise MemoryFileError(f"{path}: its archive has keys of other retrieval heads than those of the adapter")
    with _damage(path):
        chain = {segment.start: segment for segment in segments.walk(path)}
        archive = Archive.restored(about, _parts(path, about, chain), heads)
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


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Within, what goes wrong is the fault of the archive of a file."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise MemoryFileError(f"{path}: damaged archive: {error}") from error


def _parts(path: Path, about: dict[str, Any], chain: dict[int, segments.Segment]) -> list[dict[str, Tensor]]:
    """The tensors of an archive, mapped into memory, by part. Raises ValueError if a checksum does not match."""
    parts = []
    for start, end, digest in about["parts"]:
        segment = chain[start]
        tensors = segments.read(path, segment)
        header = {"ahn": WITH_ARCHIVE, "archive": int(segment.metadata["archive"])}
        if segment.end != end or digest != _digest(header, tensors):
            raise ValueError("its checksum does not match")
        parts.append(tensors)
    return parts


@dataclass(frozen=True)
class Held:
    """What a memory file holds, in bytes.

    Attributes:
        memory: of the memory that counts, which stay as many whatever is read.
        archive: of its parts, which grow with the text. ids, places, keys: what they are of, in the main.
        heads: key/value heads whose keys are kept, by layer.
        documents: (name, tokens, pages) of each, in order; pages is 0 where a document has none.
    """

    memory: int
    archive: int = 0
    ids: int = 0
    places: int = 0
    keys: int = 0
    heads: dict[int, int] = field(default_factory=dict)
    documents: list[tuple[str, int, int]] = field(default_factory=list)


def archive_bytes(header: dict[str, Any]) -> int:
    """Of the archive in a memory file, by the header of `peek`."""
    about = header.get("archive") or {"parts": []}
    return sum(end - start for start, end, _ in about["parts"])


def held(path: str | Path) -> Held:
    """What a memory file holds, without a model. Every checksum is compared. Raises MemoryFileError."""
    path = Path(path)
    header, memory = _last(path)
    tensors = _tensors(path, memory)
    _check_digest(path, header, _digest(header, tensors))
    constant = sum(tensor.nbytes for tensor in tensors.values())
    if header.get("archive") is None:
        return Held(constant)
    with _damage(path):
        parts = _parts(path, header["archive"], {segment.start: segment for segment in segments.walk(path)})
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


def peek(path: str | Path) -> dict[str, Any]:
    """The header of a memory file, without its tensors. Raises MemoryFileError."""
    return _last(Path(path))[0]


def _last(path: Path) -> tuple[dict[str, Any], segments.Segment]:
    """The header of the memory that counts, and where its tensors are."""
    if not path.is_file():
        raise MemoryFileError(f"{path}: no such memory file")
    try:
        memory = next(segment for segment in reversed(segments.walk(path)) if "memory" in segment.metadata)
        header = json.loads(memory.metadata["memory"])
    except StopIteration:
        raise MemoryFileError(f"{path}: not a memory file") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MemoryFileError(f"{path}: not a memory file, or a truncated one: {error}") from error
    if not isinstance(header, dict) or "ahn" not in header:
        raise MemoryFileError(f"{path}: not a memory file")
    if header["ahn"] not in range(1, WITH_ARCHIVE + 1):
        raise MemoryFileError(f"{path}: memory file of version {header['ahn']!r}: this ahn reads 1 to {WITH_ARCHIVE}")
    missing = {"config", "dtype", "fingerprint", "sha256", "tokens_seen", "seen", "batch"} - header.keys()
    if missing:
        raise MemoryFileError(f"{path}: damaged memory file: no {', '.join(sorted(missing))}")
    try:
        AHNConfig.from_dict(header["config"])
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise MemoryFileError(f"{path}: {error}") from error
    batch, seen, tokens = (header[name] for name in ("batch", "seen", "tokens_seen"))
    counts = [batch, tokens, *(seen if isinstance(seen, list) else [None])]
    if any(type(count) is not int or not 0 <= count < MOST for count in counts):
        raise MemoryFileError(f"{path}: damaged memory file: expected numbers of rows and of tokens read")
    if not batch or len(seen) not in (1, batch) or not tokens or max(seen) > tokens:
        raise MemoryFileError(f"{path}: damaged memory file: its numbers of rows and of tokens contradict each other")
    if any(not isinstance(header.get(name), str | None) for name in ("base", "adapter")):
        raise MemoryFileError(f"{path}: damaged memory file: expected names of base and adapter")
    texts = header.get("texts", [])
    if not isinstance(texts, list) or not all(_is_text(text) for text in texts):
        raise MemoryFileError(f"{path}: damaged memory file: texts={str(texts)[:80]!r}")
    if not isinstance(header.get("archive"), dict | None):
        raise MemoryFileError(f"{path}: damaged memory file: expected a description of its archive")
    return header, memory


def retained(path: str | Path, base: PreTrainedConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What the store of a memory file keeps of its first text, without a model: `base` is the config of one that has
    the tokenizer.

    Returns:
        positions [n] and token ids [n] of the words that are known, ascending, and the ranks [L, M, P] of the store in
        each layer that has one (`ahn.ops.ranks`).

    Raises:
        MemoryFileError: no memory file, a damaged one, one without a store or of another base, of so short a text that
            nothing has left the window, or of embeddings.
    """
    header, memory = _last(Path(path))
    if not header["config"].get("store"):
        raise MemoryFileError(
            f"{path}: was read without a store: expected a memory file that `ahn read` wrote with one (--store NAME)"
        )
    tensors = _tensors(Path(path), memory)
    _check_digest(path, header, _digest(header, tensors))
    layers = sorted({int(i) for name in tensors if (i := name.partition(".")[0]).isdecimal()})
    found = [tensors[name] for i in layers if (name := f"{i}.ranks") in tensors]
    if not found:
        raise MemoryFileError(f"{path}: nothing has left the window yet, so nothing is stored")
    if any(t.dtype != torch.int64 or t.dim() != 3 or t.shape != found[0].shape or not len(t) for t in found):
        raise MemoryFileError(f"{path}: damaged memory file: no ranks of a store")
    ranks = torch.stack([of_layer[0] for of_layer in found])
    text, logits = base.get_text_config(), tensors.get("last_logits")
    kept = [
        ("layers", 1 + layers[-1], text.num_hidden_layers),
        ("key/value heads", ranks.shape[1], text.num_key_value_heads),
    ]
    if logits is not None:
        kept.append(("words in the vocabulary", logits.shape[-1] if logits.dim() else 0, text.vocab_size))
    if different := [f"{theirs:,} {what}, not {ours:,}" for what, theirs, ours in kept if theirs != ours]:
        raise MemoryFileError(f"{path}: memory of another model ({_whose(header)}; {'; '.join(different)})")
    if f"{TEXT}.0" not in tensors:
        raise MemoryFileError(f"{path}: was read from embeddings, so no words are known: expected one of a text")
    words = tensors[f"{TEXT}.0"]
    if words.dtype != torch.int64 or words.dim() != 2 or len(words) != 2:
        raise MemoryFileError(f"{path}: damaged memory file: no positions and ids of words")
    return (*words, ranks)


def _tensors(path: Path, segment: segments.Segment) -> dict[str, Tensor]:
    try:
        return segments.read(path, segment)
    except (OSError, ValueError) as error:
        raise MemoryFileError(f"{path}: damaged memory file: {error}") from error


def _check_digest(path: str | Path, header: dict[str, Any], digest: str) -> None:
    if digest != header["sha256"]:
        raise MemoryFileError(f"{path}: damaged memory file: its checksum does not match")


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
    """Whether it holds floating-point numbers in this shape; None: any size of at least 1."""
    if tensor.dim() != len(shape) or not tensor.is_floating_point():
        return False
    return all(n == size or (size is None and n) for n, size in zip(tensor.shape, shape, strict=True))


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "sha256"}, sort_keys=True).encode())
    contents = [_bytes(tensors[name]) for name in sorted(tensors)]
    pieces = [content[low : low + PIECE] for content in contents for low in range(0, len(content), PIECE)]
    for name, content in zip(sorted(tensors), contents, strict=True):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        if header["ahn"] == 1:
            digest.update(content)
    if header["ahn"] > 1:
        with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
            for found in pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces):
                digest.update(found)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _is_text(text: Any) -> bool:
    kinds = {"tokens": int, "sha256": str, "complete": bool}
    return isinstance(text, dict) and all(isinstance(text.get(name), kind) for name, kind in kinds.items())


def _whose(header: dict[str, Any]) -> str:
    return f"base {header.get('base')}, adapter {header.get('adapter')}"
