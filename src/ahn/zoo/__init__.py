"""Trained adapters shipped with the package: one folder each, named BASE-CELL."""

from pathlib import Path

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the shipped adapters."""
    return sorted(folder.parent.name for folder in _HERE.glob("*/ahn.json"))


def path(name: str) -> Path | None:
    """Folder of a shipped adapter, or None."""
    return _HERE / name if name in names() else None
