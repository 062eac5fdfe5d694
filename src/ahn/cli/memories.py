"""List the memory files of folders, with what they hold, and say which are damaged.

  ahn memories                     those of this folder
  ahn memories books/ notes.ahn
  ahn memories --checksums books/

Headers and sizes are always checked. The exit code is 2 if a file is damaged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", nargs="*", default=["."], metavar="PLACE", help="folders or files (default: this one)")
    parser.add_argument("--checksums", action="store_true", help="read the files whole and compare their checksums too")


def run(args: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ahn.cli._console import console, counted, size
    from ahn.errors import MemoryFileError
    from ahn.memory.archive import kind_of
    from ahn.memory.file_contents import archive_bytes, check

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("file", "base", "adapter", "archive"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("documents", overflow="fold")
    files, damaged = _files(args.place), 0
    for path in files:
        try:
            header = check(path, args.checksums)
        except MemoryFileError as error:
            reason = str(error).removeprefix(f"{path}: ").removeprefix("damaged memory file: ")
            table.add_row(str(path), "", "", "", "", size(path.stat().st_size), f"damaged: {reason}")
            damaged += 1
            continue
        archive = header.get("archive") or {}
        kind = kind_of(header.get("archive"))
        table.add_row(
            str(path),
            Path(str(header.get("base"))).name,
            Path(str(header.get("adapter") or "none")).name,
            f"{kind}, {size(archive_bytes(header))}" if archive else kind,
            f"{header['tokens_seen']:,}",
            size(path.stat().st_size),
            _documents(archive.get("documents")),
        )
    if table.row_count:
        width = None if sys.stdout.isatty() else 10_000  # a line each for programs
        Console(width=width, highlight=False, markup=False, emoji=False).print(table)
    else:
        console.print(f"no memory file in {', '.join(args.place)}; ahn read DOCUMENT -o NAME.ahn makes one")
    if damaged:
        raise MemoryFileError(
            f"{damaged:,} of {counted(len(files), 'memory file')} {'is' if damaged == 1 else 'are'} damaged"
        )


def _files(places: list[str]) -> list[Path]:
    """Memory files by name, those of folders by their ending. Raises MemoryFileError for a place that is not there."""
    from ahn.errors import MemoryFileError

    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise MemoryFileError(f"{place}: no such file or folder; expected memory files, or folders of them")
        found += sorted(place.glob("*.ahn")) if place.is_dir() else [place]
    return found


def _documents(names: Any, most: int = 3) -> str:
    """Names of what was read, without their folders."""
    if not isinstance(names, list):
        return ""
    short = [Path(str(name)).name for name in names]
    return ", ".join(short[:most]) + (f" and {len(short) - most:,} more" if len(short) > most else "")
