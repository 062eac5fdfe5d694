"""Choose the signals and the threshold by which an adapter refuses questions (`ahn.recall.support`), from results.

The results are those of tasks and of their "-absent" counterparts, whose questions the text does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ahn.errors import ConfigError
from ahn.eval import results
from ahn.memory.calibration import Calibration
from ahn.recall import support

ABSENT = "-absent"  # at the end of the name of a task
Rows = dict[str, list[dict[str, Any]]]  # by task


class Wanted(NamedTuple):
    """The results that count: those of this policy, finder and length. `of`: name of the adapter, None for any."""

    policy: str
    finder: str
    length: int
    of: str | None


def rows(folders: Sequence[str | Path], wanted: Wanted, signals: Sequence[str] | None = None) -> Rows:
    """Rows with signals of support, by task.

    Args:
        signals: names of the signals to keep; None: all.

    Raises:
        ConfigError: no results are like that, or two are of one task.
    """
    found: dict[str, results.Result] = {}
    for result in results.find(folders):
        config = result.config
        recall = config["settings"].get("recall", {})
        given = config["policy"], recall.get("finder"), config["length"] or wanted.length, recall.get("rounds")
        if given != (*wanted[:3], 1) or wanted.of not in (None, config["adapter"]):
            continue
        if not all("support" in row for row in result.rows.values()):
            continue  # of an earlier version
        if (other := found.setdefault(config["task"], result)) is not result:
            raise ConfigError(f"{other.folder} and {result.folder}: expected one result, choose by --of")
    if not found:
        where = ", ".join(map(str, folders))
        raise ConfigError(f"{where}: no results with signals of {wanted.policy}, {wanted.finder}")

    def only(row: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in row["support"].items() if signals is None or name in signals}
        return row | {"support": kept}

    return {task: [only(row) for row in result.rows.values()] for task, result in found.items()}


def calibrate(part: Rows, rest: Rows) -> tuple[Calibration, list[dict[str, Any]]]:
    """The calibration chosen on `part`, and for each candidate a row with its effect on the questions of both parts.

    Raises:
        ConfigError: `part` lacks questions of either kind, or a signal that all of them have.
    """
    answerable, absent = _signals(part, True), [row for one in _signals(part, False) for row in one]
    others = [[row for one in _signals(rest, kind) for row in one] for kind in (True, False)]
    chosen = support.calibrate(answerable, absent)
    found = []
    for one in support.candidates(answerable, absent):
        areas = {"calibrate": support.area(one, [row for group in answerable for row in group], absent)}
        if all(others):
            areas["report"] = support.area(one, *others)
        by_part = {
            name: {task: _errors(one, task, kept) for task, kept in of.items()}
            for name, of in (("calibrate", part), ("report", rest))
        }
        found.append({**one.to_dict(), "chosen": one == chosen, "area": areas, **by_part})
    return chosen, found


def _answered(task: str) -> bool:
    """Whether the text answers the questions of a task."""
    return not task.endswith(ABSENT)


def _signals(kept: Rows, answerable: bool) -> list[list[dict[str, float]]]:
    """The signals of each task of this kind that has rows."""
    return [[row["support"] for row in one] for task, one in kept.items() if one and _answered(task) == answerable]


def _errors(calibration: Calibration, task: str, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of questions of a task that are refused and answered, and scores in percent."""
    margins = [calibration.margin(row["support"]) for row in kept]
    refused = [margin is not None and margin < 0 for margin in margins]
    pairs = list(zip(kept, refused, strict=True))
    said: dict[str, Any] = {"questions": len(kept), "unknown": sum(margin is None for margin in margins)}
    if not _answered(task):
        return said | {"answered": _share([not no for no in refused])}
    before, after = [row["score"] for row in kept], [0.0 if no else row["score"] for row, no in pairs]
    with_evidence = [no for row, no in pairs if row.get("found") == 1 or row.get("inside")]
    return said | {
        "refused": _share(refused),
        "refused_with_evidence": _share(with_evidence),
        "with_evidence": len(with_evidence),
        "score": _share(before),
        "score_with_refusals": _share(after),
    }


def _share(values: Sequence[float]) -> float | None:
    return round(100 * sum(values) / len(values), 2) if values else None
