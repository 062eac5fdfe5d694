"""Settings of LongBench and LV-Eval: prompts, lengths of answers, metrics, stop words."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def benchmark(name: str) -> dict[str, Any]:
    """`name`.json; keys that begin with an underscore say something about all sets."""
    return json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
