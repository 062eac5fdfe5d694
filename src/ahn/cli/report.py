"""Tables and plots of what `ahn eval` wrote.

ahn report results                    tables as markdown, to standard output
ahn report results -o report.html     one page with tables and plots
ahn report results -o report.json     tables, and numbers of what recall has found
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folders that `ahn eval --output` wrote")
    parser.add_argument("-o", "--output", metavar="FILE", help=".html for tables and plots, .md or .json for tables")


def run(args: argparse.Namespace) -> None:
    from ahn.errors import AHNError, ConfigError
    from ahn.eval import report, results
    from ahn.files import atomic, check_writable

    check_writable(args.output)
    if args.output is not None and Path(args.output).suffix not in (".html", ".md", ".json"):
        raise ConfigError(f"-o {args.output}: expected a name that ends in .html, .md or .json")
    found = results.find(args.results)
    forms = {".html": report.page, ".json": report.as_json}
    try:
        text = forms.get(Path(args.output or "").suffix, report.markdown)(found)
    except AHNError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # whatever a changed file leads to
        where = ", ".join(args.results)
        raise ConfigError(f"{where}: not as `ahn eval` wrote it: {type(error).__name__}: {error}") from error
    if args.output is None:
        print(text)
        return
    with atomic(Path(args.output)) as path:
        path.write_text(text, encoding="utf-8")
    print(args.output)
