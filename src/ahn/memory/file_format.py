"""Memory files: one safetensors file with every layer's tensors, and a header that says whose memory it is.

With an archive (`ahn.memory.archive`) the file is a row of such files (`ahn.memory.segments`): parts of the archive and
memories. The last memory counts. So more text can be appended without rewriting the rest.

Header keys: `ahn` (file version), `package` (version that wrote it), `config`, `fingerprint` (`ahn.fingerprint`),
`dtype`, `tokens_seen`, `seen` (real tokens by row), `batch`, `texts` (`AHNCache.texts`), `base` and `adapter` (names,
for people and the command line), `sha256` over all of these and over every tensor. Since version 2 it is over the
checksums of the tensors' pieces, which threads compute in parallel. With an archive also `archive`: its description,
and its parts as [first byte, end, checksum].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.config import AHNConfig
from ahn.errors import ConfigError, MemoryFileError
from ahn.memory import segments

if TYPE_CHECKING:
    pass

VERSION = 2  # 1: one checksum over all bytes in a row
WITH_ARCHIVE = 3
MOST = 1 << 32  # tokens: positions in a rank are smaller (`ahn.ops.ranks`)
PIECE = 1 << 24  # bytes of a tensor that are checked at once


def peek(path: str | Path) -> dict[str, Any]:
    """The header of a memory file, without its tensors. Raises MemoryFileError."""
    return last_memory(Path(path))[0]


def last_memory(path: Path) -> tuple[dict[str, Any], segments.Segment]:
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


def read_tensors(path: Path, segment: segments.Segment) -> dict[str, Tensor]:
    try:
        return segments.read(path, segment)
    except (OSError, ValueError) as error:
        raise MemoryFileError(f"{path}: damaged memory file: {error}") from error


def check_digest(path: str | Path, header: dict[str, Any], digest: str) -> None:
    if digest != header["sha256"]:
        raise MemoryFileError(f"{path}: damaged memory file: its checksum does not match")


def checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
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
    if not isinstance(text, dict) or not all(isinstance(text.get(name), kind) for name, kind in kinds.items()):
        return False
    documents = text.get("documents", [])  # names and digests; files of earlier versions have none
    return isinstance(documents, list) and all(
        isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in documents
    )


def whose(header: dict[str, Any]) -> str:
    return f"base {header.get('base')}, adapter {header.get('adapter')}"


@contextmanager
def archive_damage(path: Path) -> Iterator[None]:
    """Within, errors become MemoryFileError: damaged archive."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise MemoryFileError(f"{path}: damaged archive: {error}") from error


def archive_parts(
    path: Path, about: dict[str, Any], chain: dict[int, segments.Segment], checksums: bool = True
) -> list[dict[str, Tensor]]:
    """The tensors of an archive, mapped into memory, by part. Raises ValueError if a part or, where they are compared,
    a checksum does not match."""
    parts = []
    for start, end, digest in about["parts"]:
        segment = chain[start]
        tensors = segments.read(path, segment)
        header = {"ahn": WITH_ARCHIVE, "archive": int(segment.metadata["archive"])}
        if segment.end != end or (checksums and digest != checksum(header, tensors)):
            raise ValueError("its checksum does not match")
        parts.append(tensors)
    return parts
