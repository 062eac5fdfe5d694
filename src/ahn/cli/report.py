"""Tables and plots of what `ahn eval` wrote.

ahn report results                    tables as markdown, to standard output
ahn report results -o report.html     one page with tables and plots
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folders that `ahn eval --output` wrote")
    parser.add_argument("-o", "--output", metavar="FILE", help=".html for tables and plots, .md for tables")


def run(args: argparse.Namespace) -> None:
    from ahn.errors import ConfigError
    from ahn.eval import report, results
    from ahn.files import atomic, check_writable

    check_writable(args.output)
    if args.output is not None and Path(args.output).suffix not in (".html", ".md"):
        raise ConfigError(f"-o {args.output}: expected a name that ends in .html or .md")
    found = results.find(args.results)
    if args.output is None:
        print(report.markdown(found))
        return
    text = report.page(found) if args.output.endswith(".html") else report.markdown(found)
    with atomic(Path(args.output)) as path:
        path.write_text(text, encoding="utf-8")
    print(args.output)
