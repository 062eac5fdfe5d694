"""How well signals of support tell questions that a text answers from those that it does not (`ahn.recall.support`).

    python benchmarks/support.py articles squad-train.jsonl.xz part.jsonl.xz [--count 40]
    python benchmarks/support.py calibrate RESULTS ... --report RESULTS ... [--of ADAPTER] [--policy recall]
        [--signals said] [--finder fused] [--length 16384] [--name support] [--adapter ADAPTER --output ADAPTER]

`articles` writes the last articles of a file: few enough that a text gets several questions, and not those that
retrieval heads are chosen on. `calibrate` takes folders of `ahn eval` with tasks and their "-absent" counterparts,
chooses signals and a threshold on the first, and reports on the others both error rates of every candidate: questions
with an answer that are refused, and questions without one that are answered. `--of` names the adapter that the results
are of, where there are several. `--adapter` is copied to `--output` with the calibration in it; both can be the same.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import records, write, write_records

ABSENT = "-absent"  # at the end of the name of a task
Rows = dict[str, list[dict[str, Any]]]  # by task


def rows(folders: Sequence[str], options: argparse.Namespace) -> Rows:
    """Rows with signals, by task."""
    from ahn.errors import ConfigError
    from ahn.eval import results

    found: dict[str, results.Result] = {}
    for result in results.find(folders):
        config = result.config
        recall = config["settings"].get("recall", {})
        given = config["policy"], config["length"] or options.length, recall.get("finder"), recall.get("rounds")
        wanted = options.policy, options.length, options.finder, 1
        if given != wanted or options.of not in (None, config["adapter"]):
            continue
        if not all("support" in row for row in result.rows.values()):
            print(f"{result.folder}: left out: no signals of support, it is of an earlier version")
            continue
        if (other := found.setdefault(config["task"], result)) is not result:
            raise ConfigError(f"{other.folder} and {result.folder}: expected one result, choose by --of")
    if not found:
        raise ConfigError(f"{', '.join(folders)}: no results with signals of {options.policy}, {options.finder}")
    return {task: [_only(row, options.signals) for row in result.rows.values()] for task, result in found.items()}


def _only(row: dict[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """A row with these signals alone; None: with all."""
    return row | {"support": {name: value for name, value in row["support"].items() if names is None or name in names}}


def answered(task: str) -> bool:
    """Whether the text answers the questions of a task."""
    return not task.endswith(ABSENT)


def signals(kept: Rows, answerable: bool) -> list[list[dict[str, float]]]:
    """Of each task of this kind that has rows."""
    return [[row["support"] for row in one] for task, one in kept.items() if one and answered(task) == answerable]


def errors(calibration: Any, task: str, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """What a calibration does to the questions of a task; scores are percentages."""
    margins = [calibration.margin(row["support"]) for row in kept]
    refused = [margin is not None and margin < 0 for margin in margins]
    pairs = list(zip(kept, refused, strict=True))
    said: dict[str, Any] = {"questions": len(kept), "unknown": sum(margin is None for margin in margins)}
    if not answered(task):
        return said | {"answered": share([not no for no in refused])}
    before, after = [row["score"] for row in kept], [0.0 if no else row["score"] for row, no in pairs]
    with_evidence = [no for row, no in pairs if row.get("found") == 1 or row.get("inside")]
    return said | {
        "refused": share(refused),
        "refused_with_evidence": share(with_evidence),
        "with_evidence": len(with_evidence),
        "score": share(before),
        "score_with_refusals": share(after),
    }


def share(values: Sequence[float]) -> float | None:
    return round(100 * sum(values) / len(values), 2) if values else None


def calibrate(options: argparse.Namespace) -> None:
    from ahn.adapter_files import read_adapter, write_adapter
    from ahn.errors import ConfigError
    from ahn.recall import support

    part, rest = (rows(folders, options) for folders in (options.folders, options.report))
    answerable, absent = signals(part, True), [row for one in signals(part, False) for row in one]
    chosen = support.calibrate(answerable, absent)
    others = [[row for one in signals(rest, kind) for row in one] for kind in (True, False)]
    found = []
    for one in support.candidates(answerable, absent):
        areas = {"calibrate": support.area(one, [row for group in answerable for row in group], absent)}
        if all(others):
            areas["report"] = support.area(one, *others)
        by_part = {
            name: {task: errors(one, task, kept) for task, kept in of.items()}
            for name, of in (("calibrate", part), ("report", rest))
        }
        found.append({**one.to_dict(), "chosen": one == chosen, "area": areas, **by_part})
        print(f"{'*' if one == chosen else ' '} {' + '.join(one.signals)}: {areas}")
        for task, numbers in by_part["report"].items():
            print(f"    {task}: {numbers}")
    path = write(
        options.name, policy=options.policy, finder=options.finder, length=options.length, of=options.of,
        refused_at_most=support.REFUSED, calibration=chosen.to_dict(), candidates=found,
    )  # fmt: skip
    print(path)
    if options.adapter:
        adapter = read_adapter(options.adapter)
        if adapter.retrieval is None:
            raise ConfigError(f"{options.adapter}: no retrieval heads, with which a calibration is kept")
        adapter.retrieval = dataclasses.replace(adapter.retrieval, calibration=chosen)
        write_adapter(adapter, options.output)
        print(options.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    articles = commands.add_parser("articles")
    articles.add_argument("data")
    articles.add_argument("output")
    articles.add_argument("--count", type=int, default=40)
    chosen = commands.add_parser("calibrate")
    chosen.add_argument("folders", nargs="+", metavar="RESULTS", help="results to choose signals and threshold on")
    chosen.add_argument("--report", nargs="+", metavar="RESULTS", required=True, help="results to report on")
    chosen.add_argument("--of", metavar="NAME", help="the adapter of the results")
    chosen.add_argument("--signals", nargs="+", metavar="NAME", help="choose among these alone (default: all)")
    chosen.add_argument("--length", type=int, default=16_384, help="of the texts (default: %(default)s)")
    chosen.add_argument("--policy", default="recall", help="default: %(default)s")
    chosen.add_argument("--finder", default="fused", help="default: %(default)s")
    chosen.add_argument("--name", default="support", help="of the file in benchmarks/results (default: %(default)s)")
    chosen.add_argument("--adapter", type=Path, help="an adapter with retrieval heads")
    chosen.add_argument("--output", type=Path, help="where it is written with the calibration")
    options = parser.parse_args()
    if options.command == "articles":
        if options.count < 1:
            parser.error(f"--count {options.count}: expected at least 1")
        write_records(options.output, records(options.data)[-options.count :])
        return
    if bool(options.adapter) != bool(options.output):
        parser.error("--adapter and --output go together")
    from ahn.errors import AHNError

    try:
        calibrate(options)
    except AHNError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
