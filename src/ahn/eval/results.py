"""A folder of results: `config.json`, and `predictions.jsonl` with a line for each example.

Each process appends lines to a part file of its own, so that nothing is lost when it is killed. At the end the parts
are merged in the order of the examples. A line that was half written when a process was killed is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ahn.errors import ConfigError
from ahn.files import atomic, checked

CONFIG, PREDICTIONS = "config.json", "predictions.jsonl"
VERSION = 1
PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention", "numpy")
KEYS = {"task": str, "suite": str, "kind": str, "policy": str, "base": str, "settings": dict, "cost": dict}
"""The keys that every config has and that are never null."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The results of one policy on one task at one length."""

    folder: Path
    config: dict[str, Any]
    rows: dict[str, Row]  # by id of the example, in the order of the examples


def identity(identifying: dict[str, Any]) -> str:
    """A digest of the keys that the numbers depend on."""
    return hashlib.sha256(json.dumps(identifying, sort_keys=True).encode()).hexdigest()[:10]


def folder_of(output: Path, identifying: dict[str, Any]) -> Path:
    """OUTPUT/suite/set/length/policy-base-identity."""
    name = f"{identifying['policy']}-{identifying['base']}-{identity(identifying)}"
    return output / identifying["task"] / str(identifying["length"] or "natural") / name.replace("/", "_")


def load(folder: Path) -> Result:
    """The results in a folder. Raises ConfigError if there are none, or if they are damaged or of another version."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder}: no results: {error}") from error
    version = config.get("version") if isinstance(config, dict) else None
    if version != VERSION:
        raise ConfigError(f"{folder}: results of version {version!r}: this ahn reads version {VERSION}")
    for key, kind in KEYS.items():
        if not isinstance(config.get(key), kind):
            raise ConfigError(f"{folder / CONFIG}: {key!r} is {config.get(key)!r}: expected what `ahn eval` wrote")
    return Result(folder, config, read_rows(folder))


def find(paths: Iterable[str | Path]) -> list[Result]:
    """All results in these folders and below. Raises ConfigError where there are none."""
    found: dict[Path, Result] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder; expected what `ahn eval --output` wrote")
        here = sorted(file.parent for file in path.rglob(CONFIG) if list(file.parent.glob("predictions*.jsonl")))
        if not here:
            raise ConfigError(f"{path}: no results in this folder; expected what `ahn eval --output` wrote")
        found |= {folder.resolve(): load(folder) for folder in here}
    return list(found.values())


def read_rows(folder: Path) -> dict[str, Row]:
    """The examples done so far, by id: the merged ones in their order, then those of unfinished runs.

    Raises:
        ConfigError: a line is damaged that is not the last of its file.
    """
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob("predictions*.jsonl"), key=lambda path: (path.name != PREDICTIONS, path.name)):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines[:-1], 1):  # the text behind the last line end is a line half written
            try:
                row = json.loads(line)
                rows[row["id"]] = row
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: damaged; delete the line to have it done again") from error
    return rows


def append(folder: Path, rank: int, row: Row) -> None:
    """Add a line to the part file of this process; it is on the disk when this returns."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with open(checked(folder / f"predictions.{rank}.jsonl"), "a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def merge(folder: Path, order: Iterable[str]) -> None:
    """Put all lines into one file, in the order of these ids. Other lines, from runs with other limits, follow."""
    rows = read_rows(folder)
    if not rows:
        return
    ids = [id for id in dict.fromkeys([*order, *rows]) if id in rows]
    with atomic(folder / PREDICTIONS) as path:
        path.write_text("".join(json.dumps(rows[id], ensure_ascii=False) + "\n" for id in ids), encoding="utf-8")
    for part in folder.glob("predictions.*.jsonl"):
        part.unlink()


def write_config(folder: Path, config: dict[str, Any]) -> None:
    with atomic(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@cache
def environment() -> dict[str, Any]:
    """The versions, the commit and the machine that produce the numbers."""
    import torch

    return {
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def stamp() -> dict[str, Any]:
    """The environment as one level of keys with the date, for files that keep numbers of several runs."""
    made = dict(environment())
    versions = made.pop("versions")
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), **made, **versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the package's own repository, with "+changes" if files differ from it. None if it was installed."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()

    try:
        tracked = git("ls-files", Path(__file__).name)
        return (
            (git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "..") else "")) if tracked else None
        )
    except OSError:  # git is not installed
        return None
