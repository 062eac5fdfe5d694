"""The result files of each plot, and a digest of them that its SVG carries. Works without matplotlib.

`make docs` writes the digest into the SVG's metadata; `docs.py --check` compares it with that of the result files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from common import RESULTS

NEEDLES = "recall-qwen2.5-coder-0.5b-default"
SOURCES = {
    "answers": (NEEDLES, "qa-qwen2.5-coder-1.5b"),
    "loss-by-position": ("positions-smollm2-135m",),
    "cost-by-length": ("lengths-smollm2-135m-cpu",),
    "facts-found": (NEEDLES,),
    "facts-by-depth": (NEEDLES,),
    "facts-by-budget": (NEEDLES, "recall-qwen2.5-coder-0.5b-rules", "recall-qwen2.5-coder-0.5b-curve"),
    "facts-by-budget-smollm2": ("recall-smollm2-135m", "recall-smollm2-135m-curve"),
}


def digest(plot: str, results: Path = RESULTS) -> str:
    """The digest of a plot's result files. It does not depend on spaces, line ends or the order of keys."""
    numbers = [json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in SOURCES[plot]]
    return "sha256:" + hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def outdated(docs: Path, results: Path = RESULTS) -> list[Path]:
    """The plots in a folder that are missing or were drawn from other numbers."""
    paths = {plot: docs / f"{plot}.svg" for plot in SOURCES}
    return [
        path
        for plot, path in paths.items()
        if not path.is_file() or digest(plot, results) not in path.read_text(encoding="utf-8")
    ]
