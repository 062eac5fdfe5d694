"""Base models by a short name: official GGUF files of the hub, fetched once and checked."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ahn.errors import BaseModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedBase:
    """A file of the hub. `size`: its bytes. `parameters`: of the model, 4 bytes each once it is converted."""

    repository: str
    file: str
    sha256: str
    size: int
    parameters: int

    @property
    def needs(self) -> str:
        unpacked = self.parameters * 4 / 1e9
        return (
            f"{self.size / 1e9:.2f} GB to fetch unless the hub cache has it, {unpacked:.1f} GB of disk once it is "
            f"unpacked, {unpacked:.1f} GB of memory in float32 and half of that in bfloat16"
        )


NAMED = {
    "qwen2.5-coder-0.5b": NamedBase(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
        630_167_424,
    ),
    "qwen2.5-coder-1.5b": NamedBase(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
        1_777_088_000,
    ),
}


def fetched(name: str) -> Path:
    """The file of a named base: one of that name in the current folder or in that of `AHN_CACHE`, else that of the
    hub, fetched if need be and gone on with if it was interrupted. What it needs is said before.

    Raises:
        BaseModelError: it is not there and the hub cannot be asked, or it is another file than the one expected.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    from ahn.hub import cache_folder, hub_unreachable

    base = NAMED[name]
    for beside in (Path(base.file), cache_folder() / base.file):
        if beside.is_file():
            return _checked(name, beside)
    unreachable = hub_unreachable(base.repository)
    if unreachable is None:
        logger.info("%s: %s/%s; %s", name, base.repository, base.file, base.needs)
    try:
        path = hf_hub_download(base.repository, base.file, local_files_only=unreachable is not None)
    except (OSError, ValueError, HTTPError, LocalEntryNotFoundError) as error:  # a cut connection is no OSError
        reason = unreachable or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(
            f"{name}: {base.repository}/{base.file} is not in the local hub cache and cannot be fetched ({reason}); "
            f"a copy of the file in the current folder or in {cache_folder()} will do, or --base FILE.gguf"
        ) from error
    return _checked(name, Path(path))


def _checked(name: str, path: Path) -> Path:
    """Raises BaseModelError if the file is another one. A mark beside the cache says which files were compared."""
    from ahn.hub import cache_folder

    base, found = NAMED[name], path.resolve()
    size = found.stat().st_size
    if size != base.size:
        raise BaseModelError(f"{path}: has {size:,} bytes, {name} has {base.size:,}: expected the official {base.file}")
    mark = cache_folder() / "checked" / f"{base.sha256[:16]}-{size}-{found.stat().st_mtime_ns}"
    if mark.exists():
        return path
    with found.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != base.sha256:
        raise BaseModelError(f"{path}: its SHA-256 is {digest[:16]}..., that of the official {base.file} is other")
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:  # compared again next time
        logger.debug("no mark in %s", os.fspath(mark.parent))
    return path
