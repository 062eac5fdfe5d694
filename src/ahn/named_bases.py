"""Base models with a short name: official GGUF files of the hub, fetched once and checked."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ahn.errors import BaseModelError
from ahn.room import shortage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedBase:
    """A file of the hub. `size`: its bytes. `parameters`: those of the model, 4 bytes each once it is converted."""

    repository: str
    file: str
    sha256: str
    size: int
    parameters: int

    @property
    def unpacked(self) -> int:
        """Bytes of the weights in float32, on disk and in memory."""
        return self.parameters * 4

    @property
    def needs(self) -> str:
        unpacked = f"{self.unpacked / 1e9:.1f} GB"
        return (
            f"{self.size / 1e9:.2f} GB to fetch, {unpacked} of disk and of memory to unpack it once, then {unpacked} "
            "of memory in float32 and half of that in bfloat16"
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
    """The file of a named base.

    A file of its name in the current folder or in `AHN_CACHE` is taken first, then that in the hub's local cache. Else
    it is fetched, after a log entry that says how much disk and memory it needs. An interrupted download is resumed.

    Raises:
        BaseModelError: the file is not here and the hub cannot be asked; there is too little disk or memory to fetch
            and unpack it; or it is not the official file.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    from ahn.hub import cache_folder, hub_unreachable

    base = NAMED[name]
    for beside in (Path(base.file), cache_folder() / base.file):
        if beside.is_file():
            return _checked(name, beside)
    unreachable = hub_unreachable(base.repository)
    if unreachable is None and not isinstance(try_to_load_from_cache(base.repository, base.file), str):
        logger.info("%s: %s/%s; %s", name, base.repository, base.file, base.needs)
        hub_cache = Path(constants.HF_HUB_CACHE)
        disk = [(hub_cache, base.size - _begun(base, hub_cache)), (cache_folder() / "bases", base.unpacked)]
        if lack := shortage(disk, base.unpacked):
            raise BaseModelError(
                f"{name}: {lack}; expected a smaller base, or other folders in HF_HUB_CACHE and AHN_CACHE"
            )
    try:
        path = hf_hub_download(base.repository, base.file, local_files_only=unreachable is not None)
    except (OSError, ValueError, HTTPError, LocalEntryNotFoundError) as error:  # a lost connection raises HTTPError
        reason = unreachable or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(
            f"{name}: {base.repository}/{base.file} is not in the local hub cache and cannot be fetched ({reason}); "
            f"a copy of the file in the current folder or in {cache_folder()} will do, or --base FILE.gguf"
        ) from error
    return _checked(name, Path(path))


def _begun(base: NamedBase, hub_cache: Path) -> int:
    """Bytes that an interrupted download has left."""
    blobs = hub_cache / f"models--{base.repository.replace('/', '--')}" / "blobs"
    return sum(part.stat().st_size for part in blobs.glob(f"{base.sha256}*.incomplete"))


def _checked(name: str, path: Path) -> Path:
    """Raises BaseModelError unless this is the official file. A mark in the cache folder saves hashing it again."""
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
    except OSError:  # it is hashed again next time
        logger.debug("no mark in %s", os.fspath(mark.parent))
    return path
