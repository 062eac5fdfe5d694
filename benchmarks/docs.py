"""Writes the numbers of the documentation from the result files: tables, model cards and plots.

    python benchmarks/docs.py [--check] [--no-plots]

A table of README.md or docs/*.md stands between two markers, `<!-- table: NAME -->` and `<!-- end -->`. NAME is a
function in a file of pages/, with "-" instead of "_". The text between the markers is replaced. With --check nothing is
written, and the exit code is 1 if a table, a card or a plot was made from other numbers than the result files hold.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ahn import zoo
from pages import (  # noqa: F401  all but cards and drawn fill tables.TABLES
    articles,
    cards,
    drawn,
    goals,
    losses,
    needles,
    readme,
    recall,
    reports,
    speed,
    tables,
)

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- table: (?P<name>.*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def rewritten(text: str) -> str:
    """The text with every marked table made again. Raises KeyError for a table that does not exist."""

    def filled(found: re.Match[str]) -> str:
        return f"<!-- table: {found['name']} -->\n{tables.make(found['name'])}\n<!-- end -->"

    return MARKED.sub(filled, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def generated() -> Iterator[tuple[Path, str]]:
    """Each file that has numbers, and its whole text as it should be."""
    for path in pages():
        yield path, rewritten(path.read_text(encoding="utf-8"))
    for name in zoo.names():
        yield ROOT / "src" / "ahn" / "zoo" / name / "README.md", cards.card(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are out of date")
    parser.add_argument("--no-plots", action="store_true", help="leave the plots, which need matplotlib")
    options = parser.parse_args()
    outdated = [(path, text) for path, text in generated() if path.read_text(encoding="utf-8") != text]
    for path, text in outdated:
        if not options.check:
            path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT), "is out of date" if options.check else "written")
    if options.check:
        stale = drawn.outdated(ROOT / "docs")
        for path in stale:
            print(path.relative_to(ROOT), "is out of date")
        sys.exit(bool(outdated or stale))
    if not options.no_plots:
        from pages import plots

        plots.draw_all(ROOT / "docs")


if __name__ == "__main__":
    main()
