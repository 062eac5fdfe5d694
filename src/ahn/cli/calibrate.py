"""Choose when an adapter says that the text does not answer a question, from results of `ahn eval`.

  ahn calibrate RESULTS --report OTHER_RESULTS --adapter heads -o heads

Signals and threshold are chosen on RESULTS, of tasks and their "-absent" counterparts. --report shows both kinds of
errors on other results: questions with an answer that are refused, and questions without one that are answered.
"""

from __future__ import annotations

import argparse

from ahn.cli import _options


def arguments(parser: argparse.ArgumentParser) -> None:
    shown = "(default: %(default)s)"
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folders of `ahn eval` to choose on")
    parser.add_argument("--report", nargs="+", metavar="RESULTS", required=True, help="folders to report on")
    parser.add_argument("--adapter", metavar="A", help="an adapter with retrieval heads to keep the calibration with")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="the adapter to write; it may be the same")
    parser.add_argument("--summary", metavar="FILE", help="write all candidates and their errors as JSON")
    parser.add_argument("--of", metavar="NAME", help="the adapter of the results, where there are several")
    parser.add_argument("--signals", nargs="+", metavar="NAME", help="choose among these alone (default: all)")
    parser.add_argument("--length", type=_options.at_least(1), default=16_384, metavar="N", help=f"of a text {shown}")
    parser.add_argument("--policy", default="recall", metavar="P", help=shown)
    _options.add_finder(parser, "of the results")


def run(args: argparse.Namespace) -> None:
    import dataclasses
    import json
    from pathlib import Path

    from ahn.adapter_files import read_adapter, write_adapter
    from ahn.errors import ConfigError
    from ahn.eval import calibrate, results
    from ahn.files import atomic, check_writable
    from ahn.recall import support

    if bool(args.adapter) != bool(args.output):
        raise ConfigError("--adapter and -o go together")
    check_writable(args.summary, "--summary")
    adapter = read_adapter(args.adapter) if args.adapter else None
    if adapter is not None and adapter.retrieval is None:
        raise ConfigError(f"{args.adapter}: no retrieval heads, with which a calibration is kept")
    wanted = calibrate.Wanted(args.policy, args.finder, args.length, args.of)
    part, rest = (calibrate.rows(folders, wanted, args.signals) for folders in (args.results, args.report))
    chosen, candidates = calibrate.calibrate(part, rest)
    for one in candidates:
        areas = ", ".join(f"{name} {area:.3f}" for name, area in one["area"].items())
        print(f"{'*' if one['chosen'] else ' '} {' + '.join(one['signals'])}: area under the curve: {areas}")
        for task, numbers in one["report"].items():
            print(f"    {task}: {', '.join(f'{name} {value}' for name, value in numbers.items())}")
    if args.summary:
        about = {"policy": args.policy, "finder": args.finder, "length": args.length, "of": args.of}
        about |= {"refused_at_most": support.REFUSED, "calibration": chosen.to_dict(), "candidates": candidates}
        with atomic(Path(args.summary)) as path:
            path.write_text(json.dumps({"environment": results.stamp(), **about}, indent=1) + "\n", encoding="utf-8")
    if adapter is not None and adapter.retrieval is not None:
        adapter.retrieval = dataclasses.replace(adapter.retrieval, calibration=chosen)
        write_adapter(adapter, args.output)
        print(args.output)
