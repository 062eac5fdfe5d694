"""Which checkpoint of a run to go on from. A checkpoint is whole when a list of its files, written last, says so: a
process that was killed, or a disk that lost power, leaves one without it, or with files shorter than it says."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

from ahn.memory_file import atomic

SEAL = "complete.json"

logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Bring a checkpoint's files to the disk, and list them with their sizes. Raises OSError, MemoryFileError."""
    sizes = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    with atomic(folder / SEAL) as temporary:
        temporary.write_text(json.dumps(sizes, indent=1) + "\n")


def unseal(folder: Path) -> None:
    """A checkpoint that is about to be written again is not whole."""
    (folder / SEAL).unlink(missing_ok=True)


def latest(output: Path) -> Path | None:
    """The newest whole checkpoint of a run; says which newer ones it passes over."""
    for folder in reversed(found(output)):
        defect = _defect(folder)
        if defect is None:
            return folder
        logger.warning("%s: passed over: %s", folder, defect)
    return None


def found(output: Path) -> list[Path]:
    """All checkpoints of a run, oldest first, whole or not."""
    folders = [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"\d+", _step(folder))]
    return sorted(folders, key=lambda folder: int(_step(folder)))


def _step(folder: Path) -> str:
    return folder.name.removeprefix("checkpoint-")


def _defect(folder: Path) -> str | None:
    try:
        sizes = json.loads((folder / SEAL).read_text())
        for name, size in sizes.items():
            if (is_now := (folder / name).stat().st_size) != size:
                return f"{name} has {is_now} bytes, not {size}"
    except FileNotFoundError as error:
        return f"it was never finished: no {Path(error.filename).name}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{SEAL} cannot be read: {error}"
    return None
