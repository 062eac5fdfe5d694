"""Trained adapters shipped with the package: one folder each, named BASE-CELL."""

import json
import math
from collections.abc import Callable
from operator import mul
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
ALIKE = 0.9  # cosine of two embeddings of one base, one of them in 2 bits; of two bases it is near 0


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


def recognised(shape: dict[str, int], sample: Callable[[], list[float] | None]) -> str | None:
    """Name of the shipped adapter that is the default of a base with this shape and embedding, or None. Quantised
    weights are alike enough, and so are fine-tuned ones.

    Args:
        shape: `ahn.adapter.base_shape`. sample: gives `ahn.bases.embedding_sample`; asked only where a shape is right.
    """
    alike = [name for name in names() if "embedding" in _settings(name) and _settings(name)["shape"] == shape]
    found = sample() if alike else None
    return next((name for name in alike if found and _cosine(_settings(name)["embedding"], found) > ALIKE), None)


def _cosine(a: list[float], b: list[float]) -> float:
    if len(a) != len(b):
        return 0.0
    product, norms = sum(map(mul, a, b)), math.hypot(*a) * math.hypot(*b)
    return product / norms if norms else 0.0


def made_for(base: str, shape: dict[str, int] | None = None) -> list[str]:
    """Names of the shipped adapters trained for a base, or for one that the last part of its path or hub id names; only
    those of the `shape` of `ahn.adapter.base_shape`, if it is given."""
    called = Path(base).name.lower()
    return [name for name in names() if name.rpartition("-")[0] in called and shape in (None, _settings(name)["shape"])]


def base(name: str) -> str:
    """Name of the base that a shipped adapter was trained for."""
    trained_for: str = _settings(name)["base"]
    return trained_for


def store(name: str) -> str | None:
    """Name of the store that a shipped adapter has, or None."""
    found: str | None = _settings(name)["config"].get("store")
    return found


def with_store(base: str) -> list[str]:
    """Names of those `made_for` a base that have a store."""
    return [name for name in made_for(base) if store(name)]


def _settings(name: str) -> dict[str, Any]:
    return json.loads((_HERE / name / "ahn.json").read_text())
