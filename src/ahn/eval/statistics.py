"""Confidence intervals of means and of differences, by bootstrap over examples.

A resample draws as many examples as there are, with replacement. The interval holds the middle 95% of the means of
many resamples (percentile bootstrap). Where all scores are equal, so are all resamples: 0 right of 30 gives the
interval [0, 0], although a true share of 3/30 would fit as well. Differences are paired: both policies answered the
same examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ahn.eval.prompts import exact_tokens
from ahn.eval.results import Result, Row

RESAMPLES = 10_000
ENOUGH = 10
"""Examples that a verdict needs. The interval is too narrow where there are few: drawn from one normal distribution,
two policies that are alike differ by it in half of all trials with 2 examples, in 14% with 6, 10% with 10 and 7% with
20, instead of 5%; less often where many scores are equal. Of a mean over tasks the examples of all count."""
BLOCK = 4_000_000  # numbers drawn at once
WHERE = ("outside", "inside", "partly", "cut", "unknown")  # a memory is meant for the first


@dataclass(frozen=True)
class Interval:
    """A mean over `count` examples, and the 95% interval `low` to `high`; NaN for a single example."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is above or below zero and there are `ENOUGH` examples, else 0."""
        if self.count < ENOUGH:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def interval(*groups: Sequence[float], seed: int = 0) -> Interval:
    """The interval of the mean of the groups' means. Each group, a task, is resampled by itself. The same values and
    seed give the same interval.

    Raises:
        ValueError: no group, or one without values.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("no values: expected at least one in each group")
    mean, count = sum(float(np.mean(group)) for group in groups) / len(groups), sum(map(len, groups))
    if min(map(len, groups)) < 2:
        return Interval(mean, float("nan"), float("nan"), count)
    chance = np.random.default_rng(seed)
    means = sum(_means(np.asarray(group, dtype=np.float64), chance) for group in groups) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean, float(low), float(high), count)


def _means(values: Any, chance: np.random.Generator) -> Any:
    """Means of RESAMPLES samples, [RESAMPLES]."""
    rows = max(1, BLOCK // len(values))
    blocks = (min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows))
    return np.concatenate([values[chance.integers(0, len(values), (n, len(values)))].mean(1) for n in blocks])


def scores(result: Result, where: str | None = None, exact: tuple[int, int] | None = None) -> list[float]:
    """Scores of all examples, or of those whose evidence is `where`. `exact`: window and sinks."""
    return [row["score"] for row in result.rows.values() if where is None or place(row, exact) == where]


def differences(
    result: Result, baseline: Result, where: str | None = None, exact: tuple[int, int] | None = None
) -> list[float]:
    """Scores of `result` minus those of `baseline`, on the prompts that both have."""
    both = ((row, baseline.rows[id]) for id, row in result.rows.items() if id in baseline.rows)
    return [
        ours["score"] - theirs["score"]
        for ours, theirs in both
        if ours["prompt"] == theirs["prompt"] and (where is None or place(ours, exact) == where)
    ]


def place(row: Row, exact: tuple[int, int] | None) -> str:
    """The place of an example's evidence when the answer begins: "inside" the window or among the sinks, "outside" of
    both, "partly", "cut" when the prompt was truncated, or "unknown".

    A fact that stands in several places is inside if one of them is. Several facts are inside or outside if all are.

    Args:
        exact: window and sinks.
    """
    if row.get("evidence_cut"):
        return "cut"
    if exact is None or not (row.get("needs") or row.get("evidence")):
        return "unknown"
    facts = row.get("needs") or [[row["evidence"]]]
    there = {max(_kept(place, row["prompt_tokens"], exact) for place in fact) for fact in facts}
    return "inside" if there == {1} else "outside" if there == {0} else "partly"


def _kept(place: Sequence[int], tokens: int, exact: tuple[int, int]) -> float:
    """Share of a place's tokens that are sinks or in the window."""
    start, end = place
    return exact_tokens((start, end), tokens, *exact) / (end - start)
