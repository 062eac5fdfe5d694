"""Groups results that can be compared, by base, settings and lossless tokens, and names their policies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ahn.eval.results import Result

ORDER = ("full", "window", "compressive-max", "compressive-avg", "ahn-zeroed", "ahn")  # the paper's
BASELINE = "window"
Exact = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Results that can be compared: `results[length][task][label]`.

    share: 1/share of each length is lossless; None: the same number of tokens at all lengths.
    exact: window and sinks, by length.
    """

    base: str
    share: int | None
    exact: dict[int | None, Exact]
    results: dict[int | None, dict[str, dict[str, Result]]]

    @property
    def title(self) -> str:
        if self.share:
            return f"{self.base}, 1/{self.share} of the tokens lossless"
        if not self.exact:
            return self.base
        window, sinks = next(iter(self.exact.values()))
        return f"{self.base}, {window + sinks:,} lossless tokens ({sinks} sinks + {window:,} window)"

    def place(self, label: str) -> tuple[float, int, str]:
        """The key to sort labels by. It gives the order of rows in the paper."""
        tasks = (found for by_task in self.results.values() for found in by_task.values())
        result = next(found[label] for found in tasks if label in found)
        return (0, *place_of(result)[1:])

    def blocks(self) -> Iterator[tuple[str, int | None, dict[str, dict[str, Result]]]]:
        """Suite, length, and the results of the suite's tasks of one kind, by task and label."""
        for length, by_task in self.results.items():
            kinds = {task: kind_of(found) for task, found in by_task.items()}
            for suite, kind in dict.fromkeys(kinds.values()):
                yield suite, length, {task: f for task, f in by_task.items() if kinds[task] == (suite, kind)}


def grouped(results: Sequence[Result]) -> list[Group]:
    """Groups by base and by the number of lossless tokens, or their share of each length. A result that keeps all, as
    `full` does, is in every group with a result of the same base, task and length."""

    def base(result: Result) -> tuple[object, ...]:
        return tuple(result.config[key] for key in ("base", "base_config", "dtype", "seed"))

    def kept(result: Result) -> tuple[int | None, Exact | None] | None:
        """The share, or window and sinks. None if everything is lossless."""
        if result.config["window"] is None:
            return None
        share = result.config.get("share")
        return (share, None) if share else (None, (result.config["window"], result.config["sinks"]))

    def place(result: Result) -> tuple[str, int | None]:
        return result.config["task"], result.config["length"]

    found = []
    for key in dict.fromkeys(map(base, results)):
        mine = [result for result in results if base(result) == key]
        for size in sorted({kept(result) for result in mine} - {None}, key=str) or [None]:
            there = {place(result) for result in mine if kept(result) == size}
            here = [r for r in mine if kept(r) == size or (kept(r) is None and place(r) in there)]
            labels, exacts = policy_labels(here), {}
            by_length: dict[int | None, dict[str, dict[str, Result]]] = {}
            for result in sorted(here, key=place_of):
                config = result.config
                by_length.setdefault(config["length"], {}).setdefault(config["task"], {})[labels[id(result)]] = result
                if config["window"] is not None:
                    exacts[config["length"]] = config["window"], config["sinks"]
            found.append(Group(str(mine[0].config["base"]), size[0] if size else None, exacts, by_length))
    return found


def in_order(found: dict[str, Result]) -> dict[str, Result]:
    return {label: found[label] for label in all_labels({"": found})}


def policy_labels(results: Sequence[Result]) -> dict[int, str]:
    """A label for each result, by `id` of the result: the policy with its store. Where one policy is there with several
    settings, the label names the settings that differ, for a memory its adapter. Window and sinks are the group's."""
    names: dict[int, str] = {}
    for result in results:
        config = result.config
        variants = [r.config for r in results if r.config["policy"] == config["policy"]]
        keys = [
            key
            for key in config["settings"]
            if key not in ("window", "sinks", "store") and len({str(v["settings"].get(key)) for v in variants}) > 1
        ]
        parts = [_words(key, config["settings"][key]) for key in keys]
        if "adapter_digest" in keys:
            alike = {v["settings"]["adapter_digest"] for v in variants if v["adapter"] == config["adapter"]}
            parts = [config["adapter"], *([config["settings"]["adapter_digest"][:6]] if len(alike) > 1 else [])]
        if store := config["settings"].get("store"):
            span = f" in spans of {store['span']}" if store["span"] > 1 else ""
            parts.append(f"{store['name']} store of {store['size']:,}{span}")
        names[id(result)] = f"{config['policy']} ({', '.join(parts)})" if parts else config["policy"]
    return names


def _words(key: str, value: Any) -> str:
    """A setting as text for people. Of recall, only the values that differ from the defaults."""
    if key != "recall" or not isinstance(value, dict):
        return f"{key} {value}"
    rounds = f", {value['rounds']} rounds" if value.get("rounds", 1) > 1 else ""
    return f"{value['finder']}, {value['tokens']:,} tokens{rounds}"


def baseline(found: dict[str, Result], label: str) -> Result | None:
    """The result of `window` among the results of one task. Of several, the one with the sink positions of `label`.
    None if there is no such result, or if it is the one of `label`."""
    windows = [result for result in found.values() if result.config["policy"] == BASELINE]
    if label not in found or not windows or found[label] in windows:
        return None
    wanted = found[label].config["settings"]
    alike = [w for w in windows if all(wanted.get(k) == w.config["settings"][k] for k in ("sink_positions", "layers"))]
    return (alike or windows)[0]


def place_of(result: Result) -> tuple[float, int, str]:
    policy, length = result.config["policy"], result.config["length"]
    which = f"{result.config['adapter']} {result.config['settings'].get('store') or ''}"  # without a store first
    return length or math.inf, ORDER.index(policy) if policy in ORDER else len(ORDER), which


def all_labels(by_task: Mapping[Any, dict[str, Result]]) -> list[str]:
    results = {label: result for found in by_task.values() for label, result in found.items()}
    return sorted(results, key=lambda label: place_of(results[label]))


def is_loss(by_task: dict[str, dict[str, Result]]) -> bool:
    return any(kind_of(found)[1] == "loss" for found in by_task.values())


def kind_of(found: dict[str, Result]) -> tuple[str, str]:
    config = next(iter(found.values())).config
    return config["suite"], config["kind"]
