"""The registry of the documentation's tables, and the functions that they share. The other files here hold the tables.

A table is one function. It reads the result files that its caption names. The marker that docs.py fills has the
function's name with "-" instead of "_". A cell holds one number.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from common import RESULTS

TABLES: dict[str, Callable[[], str]] = {}

Row = dict[str, Any]


def table(function: Callable[[], str]) -> Callable[[], str]:
    TABLES[function.__name__.replace("_", "-")] = function
    return function


def make(name: str) -> str:
    """The table of that name and its caption, as markdown. Raises KeyError for a name that does not exist."""
    return TABLES[name]()


@cache
def result(name: str) -> Row:
    found: Row = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def rows(name: str, **wanted: Any) -> list[Row]:
    """The rows of a result file that have these values."""
    return [row for row in result(name)["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block(head: Sequence[str], body: Iterable[Sequence[str]], about: str, *names: str) -> str:
    """A table with its caption: `about`, the device, the day, and the result files."""
    return f"{markdown(head, body)}\n\n{wrapped(f'{about} {source(*names)}')}"


def wrapped(text: str, indent: str = "") -> str:
    """The text in lines of at most 120 characters. All but the first begin with `indent`."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def source(*names: str) -> str:
    made = {f"{device_of(name)}, {days_of(name)}" for name in names}
    files = ", ".join(f"`{name}.json`" for name in names)
    return f"({'; '.join(sorted(made))}; {files})"


def days_of(name: str) -> str:
    """The days of the measurement, without the times of day."""
    return " and ".join(re.findall(r"\d{4}-\d\d-\d\d", result(name)["environment"]["date"]))


def device_of(name: str) -> str:
    environment = result(name)["environment"]
    device = re.sub(r"\(R\)|NVIDIA | Processor| 80GB HBM3", "", environment["device"])
    threads = environment.get("threads")
    return device if device.startswith("H") else f"{device}, {threads} thread{'s' * (threads > 1)}"


def numbers(values: Iterable[float | None], form: str = "{:,.0f}") -> list[str]:
    """Each value in that form. None, for a run that was not done, is an empty cell."""
    return ["" if value is None else form.format(value) for value in values]


def percent(values: Iterable[float | None]) -> list[str]:
    return numbers(values, "{:.0%}")


def one(name: str, **wanted: Any) -> Row:
    """The newest row of a result file that has these values. Files grow at their end."""
    return rows(name, **wanted)[-1]


def at_least(label: str, limit: float, value: float, form: str, device: str) -> list[str]:
    return goal(label, f"at least {form.format(limit)}", form.format(value), device, value >= limit)


def at_most(label: str, limit: float, value: float, form: str, device: str) -> list[str]:
    return goal(label, f"at most {form.format(limit)}", form.format(value), device, value <= limit)


def goal(label: str, limit: str, value: str, device: str, met: bool) -> list[str]:
    return [label, device, limit, value, "met" if met else "**missed**"]


def recalled(results: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The rows of a result on needles at its main size, by task, policy, and span of the learned store or 0."""
    return {
        (row["task"], row["policy"], (row["store"] or {"span": 0})["span"]): row
        for row in results["rows"]
        if row["seed"] == 1
        and row["lossless"] in (None, results["lossless"])
        and (row["store"] is None or row["store"]["name"] == "learned")
    }
