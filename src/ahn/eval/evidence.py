"""Measures finding apart from answering: the share of evidence found, and scores by its place and its wording."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ahn.eval.results import Result, Row
from ahn.eval.statistics import place


def measured(found: Mapping[str, Result], exact: tuple[int, int] | None) -> list[dict[str, Any]]:
    """The evidence that each policy found for one task. Empty if no policy has read passages again.

    Args:
        found: results by the name of the policy.
        exact: window and sinks; None: the place of the evidence is unknown.

    Returns:
        for each policy `policy`, `n` and `score`; the same of examples whose evidence is `behind` the window when the
        question is asked, and `within` it; `found`, by number of tokens, the share of the evidence behind the window
        that is among so many of passages; and of the `lowest_third` by overlap of words between question and
        passage, of those behind the window, `n`, `score`, and `found` among the tokens that were read again. Scores
        and shares are from 0 to 1, None where there is no example.
    """
    every = [row for result in found.values() for row in result.rows.values()]
    budgets = sorted({budget for row in every for budget in row.get("found_by_budget") or ()}, key=int)
    if not any("recalled" in row for row in every):
        return []
    low = _lowest_third(row for row in every if place(row, exact) == "outside")
    measured = []
    for policy, result in found.items():
        rows = list(result.rows.values())
        behind = [row for row in rows if place(row, exact) == "outside"]
        within = [row for row in rows if place(row, exact) == "inside"]
        third = [row for row in behind if row["id"] in low]
        shares = {n: [row["found_by_budget"][n] for row in behind if "found_by_budget" in row] for n in budgets}
        measured.append(
            {
                "policy": policy,
                **_scored(rows),
                "behind": _scored(behind),
                "within": _scored(within),
                "found": {budget: _mean(values) for budget, values in shares.items()},
                "lowest_third": _scored(third) | {"found": _mean([row["found"] for row in third if "found" in row])},
            }
        )
    return measured


def _lowest_third(rows: Iterable[Row]) -> set[str]:
    """Ids of the examples. All policies answer the same questions, so any policy's overlap will do."""
    overlaps = {row["id"]: row["overlap"] for row in rows if row.get("overlap") is not None}
    return set(sorted(overlaps, key=lambda id: (overlaps[id], id))[: len(overlaps) // 3])


def _scored(rows: list[Row]) -> dict[str, Any]:
    return {"n": len(rows), "score": _mean([row["score"] for row in rows])}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
