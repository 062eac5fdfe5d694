"""Which checkpoint of a run to go on from. A checkpoint is whole when a list of its files, written last, says so: a
process that was killed, or a disk that lost power, leaves one without it, or with other bytes than it says."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.trainer import OPTIMIZER_NAME

from ahn.adapter_files import WEIGHTS
from ahn.files import atomic

SEAL = "complete.json"
KEPT = 2  # checkpoints of a run

logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Bring a checkpoint's files to the disk, and list them with their SHA-256. Raises OSError."""
    digests = {}
    unseal(folder)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            digests[file.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    with atomic(folder / SEAL) as temporary:
        temporary.write_text(json.dumps(digests, indent=1) + "\n")


def unseal(folder: Path) -> None:
    """A checkpoint that is about to be written again is not whole."""
    (folder / SEAL).unlink(missing_ok=True)


def rotate(output: Path) -> None:
    """Keep the newest whole checkpoints only."""
    whole = [folder for folder in found(output) if (folder / SEAL).is_file()]
    for folder in whole[:-KEPT]:
        unseal(folder)  # first, so that a deletion that stops halfway leaves none that looks whole
        shutil.rmtree(folder, ignore_errors=True)


def sweep(output: Path) -> None:
    """Remove the checkpoints that a killed run never finished. Only the run that owns the folder may call this."""
    for folder in found(output):
        if not (folder / SEAL).exists():
            shutil.rmtree(folder, ignore_errors=True)


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
        digests = json.loads((folder / SEAL).read_text())
        for name, digest in digests.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is damaged"
        if spoilt := [name for name in digests if not _finite(folder / name)]:
            return f"{spoilt[0]} holds NaN or infinite numbers"
    except FileNotFoundError as error:
        return f"it was never finished: no {Path(error.filename).name}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read: {error}"
    return None


def _finite(file: Path) -> bool:
    """Whether the weights, or the optimiser's state, are numbers that can be gone on from."""
    if file.name == WEIGHTS:
        tensors: list[Any] = list(load_file(file).values())
    elif file.name == OPTIMIZER_NAME:
        states = torch.load(file, map_location="cpu", weights_only=True)["state"]
        tensors = [value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)]
    else:
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
