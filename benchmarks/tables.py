"""The tables of the documentation. Each is one function, made from the result files that its caption names.

The name of a function, with "-" for "_", is the name in the marker that docs.py fills. A cell holds one number.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from cards import table as markdown
from common import RESULTS

CELLS = ("gated_deltanet", "deltanet", "mamba2")
KINDS = {"full": "full attention", "window": "sinks and window"} | {cell: f"+ {cell}" for cell in CELLS}
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
    """The rows of a result file that agree with all that is wanted."""
    return [row for row in result(name)["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def block(head: Sequence[str], body: Iterable[Sequence[str]], about: str, *names: str) -> str:
    """A table, and below it what was measured, on which device, on which day, and the files."""
    caption = textwrap.fill(f"{about} {source(*names)}", 120, break_long_words=False, break_on_hyphens=False)
    return f"{markdown(list(head), [list(line) for line in body])}\n\n{caption}"


def source(*names: str) -> str:
    made = {f"{device_of(name)}, {result(name)['environment']['date'][:10]}" for name in names}
    files = ", ".join(f"`{name}.json`" for name in names)
    return f"({'; '.join(sorted(made))}; {files})"


def device_of(name: str) -> str:
    environment = result(name)["environment"]
    device = re.sub(r"\(R\)|NVIDIA | Processor| 80GB HBM3", "", environment["device"])
    threads = environment.get("threads")
    return device if device.startswith("H") else f"{device}, {threads} thread{'s' * (threads > 1)}"


def numbers(values: Iterable[float | None], form: str = "{:,.0f}") -> list[str]:
    """Each in that form; None stands for what was not run."""
    return ["" if value is None else form.format(value) for value in values]


@table
def cpu() -> str:
    name = "cpu"
    head = ["", "read, tokens/s", "decode, ms a token", "peak, MiB", "cache, MiB"]
    body = []
    for kind in ("full", "window", *CELLS):
        (row,) = rows(name, kind=kind, length=16384)
        keys = ("read_tokens_per_s", "decode_ms", "peak_mib", "cache_mib")
        body.append([KINDS[kind], *numbers(row[key] for key in keys)])
    about = "SmolLM2-135M, float32, 16,384 tokens, 512 of them lossless, one run."
    return block(head, body, about, name)


@table
def gap_smollm2() -> str:
    name = "gap-smollm2-135m"
    sizes = [256, 512, 1024, 2048]
    longer = {448: 256, 704: 512, 1216: 1024, 2240: 2048}

    def line(memory: str, key: str, form: str) -> list[str]:
        found = {longer.get(row["lossless"], row["lossless"]): row[key] for row in rows(name, memory=memory)}
        return numbers((found[size] for size in sizes), form)

    window, clipped, long = "sinks and window, absolute", "sinks and window, clipped", "a longer window, clipped"
    body = [
        [f"{clipped}: no memory", *line(clipped, "closed", "{:.0%}")],
        ["a window longer by the bytes of the state", *line(long, "closed", "{:.0%}")],
    ]
    for cell in ("deltanet", "gated_deltanet", "mamba2"):
        memory = f"smollm2-135m-{cell}"
        body.append([f"`{memory}`", *line(memory, "closed", "{:.0%}")])
        body.append(["the same, memory of another book", *line(memory, "control_closed", "{:.0%}")])
    found = result(name)
    about = (
        f"Share of the gap between `{window}` and full attention that is closed; positions 4,096 to 8,191 of "
        f"{found['books']} held-out books, 64 sinks, bfloat16."
    )
    return block(["lossless tokens", *numbers(sizes)], body, about, name)
