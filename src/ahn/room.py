"""Compares the free disk and memory of this machine with the need of a task, before the task begins."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def shortage(disk: Iterable[tuple[Path, int]] = (), memory: int = 0) -> str | None:
    """The lack of disk or memory, as the end of a message. None if there is enough.

    Args:
        disk: folders, which may not exist yet, with the bytes that will be written to each.
        memory: bytes that will be held at once.
    """
    needed: Counter[int] = Counter()
    folders: dict[int, Path] = {}
    for folder, size in disk:
        there = _existing(folder)
        device = there.stat().st_dev
        needed[device] += size
        folders.setdefault(device, there)
    for device, size in needed.items():
        if (free := shutil.disk_usage(folders[device]).free) < size:
            return f"needs {_gb(size)} of disk in {folders[device]}, {_gb(free)} are free"
    if (free := free_memory()) < memory:
        return f"needs {_gb(memory)} of memory, {_gb(free)} are free"
    return None


def free_memory() -> int:
    """Bytes of free memory and swap. On macOS, where swap grows as needed, bytes of the whole memory."""
    import psutil

    memory = psutil.virtual_memory()
    free = memory.total if sys.platform == "darwin" else memory.available + psutil.swap_memory().free
    return int(free)


def _existing(folder: Path) -> Path:
    folder = Path(os.path.abspath(folder))
    return next((one for one in (folder, *folder.parents) if one.exists()), folder)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
