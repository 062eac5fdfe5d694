"""A comparison as a YAML file: `ahn eval --suite FILE.yaml`.

The keys are the options of `ahn eval`, and four of the suite's own:

output    folder of the results
summary   a JSON file with a row for each result, written after each run
note      kept in the summary
runs      a list of keys that differ from those above, one entry a run (default: one run with the keys above)

`tasks`, `policies` and `length` take lists, as the options do. A list for any other key stands for one run with each of
its values. `lossless: 1/8` keeps an eighth of each length. A key on the command line replaces the
file's, in all runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ahn import yaml_file
from ahn.errors import ConfigError
from ahn.eval import results
from ahn.eval.results import Result
from ahn.eval.statistics import interval
from ahn.files import atomic

LISTS = ("tasks", "policies", "length")
DEPTHS = 5


@dataclass(frozen=True)
class Suite:
    """A suite that was read.

    Args:
        runs: keys and values of each run. Only the keys in `LISTS` have lists.
    """

    runs: list[dict[str, Any]]
    output: Path | None
    summary: Path | None
    note: str | None

    def titles(self) -> list[str]:
        """A line for each run: its number, and the keys that are not the same in all runs."""
        words = [{f"{key}={_shown(value)}": None for key, value in run.items() if key != "share"} for run in self.runs]
        differ = [" ".join(word for word in one if not all(word in other for other in words)) for one in words]
        return [f"run {n} of {len(words)}{text and ': '}{text}" for n, text in enumerate(differ, 1)]


def load(path: str | Path, changes: Sequence[str] = ()) -> Suite:
    """Read a suite. Raises ConfigError.

    Args:
        changes: "key=value" each. They replace the file's values, also those of single runs.
    """
    values = yaml_file.read(path, "suite", changes)
    changed = {change.partition("=")[0] for change in changes}
    own = {key: values.pop(key, None) for key in ("output", "summary", "note")}
    for key, value in own.items():
        if not isinstance(value, str | None):
            raise ConfigError(f"{path}: {key}: {value!r}: expected text")
    runs = values.pop("runs", [{}])
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{path}: runs: {runs!r}: expected a list of runs, each with keys and values")
    folder, summary = (own[key] and Path(own[key]).expanduser() for key in ("output", "summary"))
    whole = [values | {key: value for key, value in run.items() if key not in changed} for run in runs]
    expanded = [one for run in whole for one in _expanded(run, path)]
    different = [run for number, run in enumerate(expanded) if run not in expanded[:number]]
    return Suite(different, folder, summary, own["note"])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        if len(value) == 1:
            return str(value[0])
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)


def _expanded(run: dict[str, Any], path: str | Path) -> Iterator[dict[str, Any]]:
    several = [key for key, value in run.items() if isinstance(value, list) and key not in LISTS]
    for chosen in product(*(run[key] for key in several)):
        one = run | dict(zip(several, chosen, strict=True))
        share = re.fullmatch(r"1/([1-9]\d*)", str(one.get("lossless")))
        if share is None:
            yield one
            continue
        lengths = one.get("length")
        for length in lengths if isinstance(lengths, list) else [lengths]:
            if type(length) is not int:
                raise ConfigError(f"{path}: lossless: {share[0]} of length {length!r}: expected a number of tokens")
            yield one | {"length": length, "lossless": max(1, length // int(share[1])), "share": int(share[1])}


def write_summary(suite: Suite, found: Sequence[Result]) -> None:
    """Write the summary, with a row for each result that has examples. Values that all rows share stand above the rows.
    A suite without `summary` writes none."""
    if suite.summary is None:
        return
    rows = [row_of(result) for result in found if result.rows]
    about: dict[str, Any] = {} if suite.note is None else {"note": suite.note}
    for name, key in {"base": "base", "adapter": "adapter", "tokens": "length", "lossless": "lossless"}.items():
        if len(values := {row[key] for row in rows} - {None}) == 1:
            about[name] = values.pop()
    content = {"environment": results.stamp(), **about, "settings": suite.runs, "rows": rows}
    suite.summary.parent.mkdir(parents=True, exist_ok=True)
    with atomic(suite.summary) as path:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def row_of(result: Result) -> dict[str, Any]:
    """A result as a row: the mean score with its 95% interval, and the mean score by the fifth of the text that holds
    the evidence. Losses are in nats, other scores 0 to 1."""
    config, rows = result.config, list(result.rows.values())
    mean = interval([row["score"] for row in rows])
    by_depth: list[list[float]] = [[] for _ in range(DEPTHS)]
    for row in rows:
        if row.get("depth") is not None:
            by_depth[min(DEPTHS - 1, int(row["depth"] * DEPTHS))].append(row["score"])
    exact = config["window"] is not None
    return {
        **{key: config[key] for key in ("task", "length", "policy", "base")},
        "adapter": config["adapter"],
        "lossless": config["window"] + config["sinks"] if exact else None,
        "store": config["settings"].get("store"),
        "recall": config["settings"].get("recall"),
        "seed": config["seed"],
        "n": mean.count,
        "score": mean.mean,
        "low": mean.low if mean.count > 1 else None,
        "high": mean.high if mean.count > 1 else None,
        "by_depth": [sum(part) / len(part) if part else None for part in by_depth],
        "cache_bytes": config["cost"]["cache_bytes"],
    }
