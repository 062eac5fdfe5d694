"""The cells of the table of a GPU: which shape, memory, task, batch and length are measured, in order of importance."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

K = 1024


class Cell(NamedTuple):
    """One cell of the table.

    Attributes:
        cell: "full" for full attention; a memory's cell by name, or "name+store" for one with a store.
        what: "decode", "read", "load" or "ask".
        length: tokens that are read, or that were read before.
    """

    shape: str
    cell: str
    what: str
    batch: int
    length: int

    def __str__(self) -> str:
        return ":".join(map(str, self))


def coder() -> Any:
    """The shape of Qwen2.5-Coder-0.5B, which is not in the paper."""
    from ahn.cost import Shape

    return Shape(24, 896, 14, 2, 64, 4864, 151936, tied=True)


def cells_of_table(options: argparse.Namespace) -> list[Cell]:
    """The cells to measure, the most important first. Ends the program if `--only` leaves none."""
    main, gdn, full, stored = "qwen2.5-3b", "gated_deltanet", "full", "gated_deltanet+learned"
    if options.base:
        name, lengths = Path(options.base).name, (300, 500) if options.tiny else (16 * K, 128 * K)
        table = [Cell(name, options.cell or "default", "ask", 1, length) for length in lengths]
    elif options.tiny:
        whats = ("decode", 1, 300), ("decode", 2, 300), ("read", 1, 500)
        names = gdn, full, "deltanet", "mamba2", stored
        table = [Cell("tiny", cell, *what) for cell in names for what in whats]
        table.append(Cell("tiny", gdn, "load", 1, 500))
    else:
        table = [Cell(main, gdn, "decode", 1, 128 * K)]
        table += [Cell(main, gdn, "read", 1, length) for length in (64 * K, 128 * K)]
        table += [Cell(main, full, "decode", 1, length) for length in (64 * K, 128 * K)]
        table += [Cell(main, full, "read", 1, length) for length in (64 * K, 128 * K)]
        table += [Cell(main, gdn, "load", 1, 1024 * K), Cell(main, gdn, "read", 1, 1024 * K)]
        table += [Cell(main, gdn, "decode", batch, 128 * K) for batch in (8, 32)]
        table += [Cell(main, gdn, "decode", 1, length) for length in (16 * K, 1024 * K)]
        table += [Cell(main, cell, what, 1, 128 * K) for what in ("decode", "read") for cell in ("deltanet", "mamba2")]
        table += [Cell(main, stored, what, 1, 128 * K) for what in ("decode", "read")]
        for cell in (gdn, stored):
            whats = ("decode", 128 * K), ("read", 16 * K), ("read", 128 * K)
            table += [Cell("qwen2.5-coder-0.5b", cell, what, 1, length) for what, length in whats]
        for shape in ("qwen2.5-7b", "qwen2.5-14b"):
            table += [Cell(shape, cell, what, 1, 128 * K) for cell in (gdn, full) for what in ("decode", "read")]
            table += [Cell(shape, gdn, "decode", 8, 128 * K)]
            others = ((cell, what) for cell in ("deltanet", "mamba2") for what in ("decode", "read"))
            table += [Cell(shape, *other, 1, 128 * K) for other in others]
    wanted = [set(words.split(":")) for words in options.only or [""]]
    found = [cell for cell in table if any(words - {""} <= set(map(str, cell)) for words in wanted)]
    if not found:
        sys.exit(
            f"--only {' '.join(options.only)}: nothing of that; expected parts of {', '.join(map(str, table[:3]))}, ..."
        )
    return found


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""

    def shown(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    cell = [row.get(name, "") for name in Cell._fields]
    head = "{:<20} {:<15} {:<7} {:>2} {:>9}".format(*cell)
    rest = (f"{name} {shown(value):<8}" for name, value in row.items() if name not in Cell._fields)
    return f"{head}  {' '.join(rest)}".rstrip()
