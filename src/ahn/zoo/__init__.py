"""Trained adapters shipped with the package: one folder each, named BASE-CELL."""

import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the shipped adapters."""
    return sorted(folder.parent.name for folder in _HERE.glob("*/ahn.json"))


def path(name: str) -> Path | None:
    """Folder of a shipped adapter, or None."""
    return _HERE / name if name in names() else None


def default_for(base: str) -> str | None:
    """Name of the shipped adapter that is used with a base when none is asked for (`default_for` in its `ahn.json`), or
    None. `base`: as given to `ahn.from_pretrained`."""
    for name in names():
        if base in _settings(name).get("default_for", ()):
            return name
    return None


def made_for(base: str, shape: dict[str, int] | None = None) -> list[str]:
    """Names of the shipped adapters trained for a base, or for one that the last part of its path or hub id names; only
    those of the `shape` of `ahn.adapter.base_shape`, if it is given."""
    called = Path(base).name.lower()
    return [name for name in names() if name.rpartition("-")[0] in called and shape in (None, _settings(name)["shape"])]


def store(name: str) -> str | None:
    """Name of the store that a shipped adapter has, or None."""
    found: str | None = _settings(name)["config"].get("store")
    return found


def with_store(base: str) -> list[str]:
    """Names of those `made_for` a base that have a store."""
    return [name for name in made_for(base) if store(name)]


def _settings(name: str) -> dict[str, Any]:
    return json.loads((_HERE / name / "ahn.json").read_text())
