"""Finds the checkpoint to resume a run from.

The last file that is written into a checkpoint lists the others with their SHA-256. A checkpoint without that list, or
with other bytes, was cut short: the process was killed, or the disk lost power.
"""

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
KEPT = 2  # whole checkpoints that a run keeps

logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Flush a checkpoint's files to the disk and write the list of them. Raises OSError."""
    digests = {}
    unseal(folder)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            digests[file.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    with atomic(folder / SEAL) as temporary:
        temporary.write_text(json.dumps(digests, indent=1) + "\n")


def unseal(folder: Path) -> None:
    """Remove the list: the checkpoint is about to change, so it is not whole."""
    (folder / SEAL).unlink(missing_ok=True)


def rotate(output: Path) -> None:
    """Delete all whole checkpoints but the newest ones."""
    whole = [folder for folder in found(output) if (folder / SEAL).is_file()]
    for folder in whole[:-KEPT]:
        unseal(folder)  # first: a checkpoint whose deletion stops halfway must not look whole
        shutil.rmtree(folder, ignore_errors=True)


def sweep(output: Path) -> None:
    """Remove the checkpoints that a killed run never finished. Only the run that owns the folder may call this."""
    for folder in found(output):
        if not (folder / SEAL).exists():
            shutil.rmtree(folder, ignore_errors=True)


def latest(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Warns of each newer one that it passes over, and says why."""
    for folder in reversed(found(output)):
        defect = _defect(folder)
        if defect is None:
            return folder
        logger.warning("%s: passed over: %s", folder, defect)
    return None


def found(output: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, the oldest first."""
    folders = [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"\d+", _step(folder))]
    return sorted(folders, key=lambda folder: int(_step(folder)))


def _step(folder: Path) -> str:
    return folder.name.removeprefix("checkpoint-")


def _defect(folder: Path) -> str | None:
    """Why a checkpoint is not whole, in words. None if it is."""
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
    """Whether all numbers of a file of weights, or of the optimiser's state, are finite. True for other files."""
    if file.name == WEIGHTS:
        tensors: list[Any] = list(load_file(file).values())
    elif file.name == OPTIMIZER_NAME:
        states = torch.load(file, map_location="cpu", weights_only=True)["state"]
        tensors = [value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)]
    else:
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
