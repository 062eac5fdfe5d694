"""Trained adapters shipped with the package: one folder each, named BASE-CELL."""

import json
from pathlib import Path

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the shipped adapters."""
    return sorted(folder.parent.name for folder in _HERE.glob("*/ahn.json"))


def path(name: str) -> Path | None:
    """Folder of a shipped adapter, or None."""
    return _HERE / name if name in names() else None


def default_for(base: str) -> str | None:
    """Name of the shipped adapter that is used with a base when none is asked for, or None.

    `base`: as given to `ahn.from_pretrained`; a shipped adapter names the bases it was trained for.
    """
    for name in names():
        if base in json.loads((_HERE / name / "ahn.json").read_text()).get("default_for", ()):
            return name
    return None
