"""Tables like the paper's (2, 3, 5 and 6) and plots of the results of `ahn eval`.

Results are compared where everything but the policy is equal: base, dtype, seed, window and sinks. Losses against the
window are shown in the same place and the same words as wins.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ahn.eval import evidence, statistics
from ahn.eval.compare import Exact, Group, all_labels, baseline, grouped, in_order, is_loss, kind_of, policy_labels
from ahn.eval.results import Result
from ahn.eval.statistics import Interval

WIDE = 8  # tasks that are columns; if there are more, they are rows as in the paper's table 6
UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    aligned: bool = False

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", self.note, ""] if self.note else [f"### {self.title}", ""]
        head, *rows = self._aligned() if self.aligned else [self.head, *self.rows]
        rule = ["-" * len(cell) if self.aligned else "-" for cell in head]
        lines += [_line(head), _line(rule), *map(_line, rows), ""]
        return "\n".join(lines)

    def text(self) -> str:
        """The table for a terminal, with aligned columns. The first column is flush left."""
        return "\n".join([self.title, *map("  ".join, self._aligned())])

    def _aligned(self) -> list[list[str]]:
        """Head and rows, with cells padded to the width of their columns."""
        columns = []
        for i, column in enumerate(zip(self.head, *self.rows, strict=True)):
            width = max(map(len, column))
            columns.append([cell.rjust(width) if i else cell.ljust(width) for cell in column])
        return [list(row) for row in zip(*columns, strict=True)]

    def html(self) -> str:
        def cell(text: str) -> str:
            verdict = text.rpartition(" ")[2]
            mark = f' class="{verdict}"' if verdict in ("better", "worse") else ""
            return f"<td{mark}>{html.escape(text)}</td>"

        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.head)
        body = "\n".join(f"<tr>{''.join(map(cell, cells))}</tr>" for cells in self.rows)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<h3>{html.escape(self.title)}</h3>{note}<table><tr>{head}</tr>\n{body}</table>"


def brief(results: Sequence[Result]) -> Table:
    """The scores of one run: a row for each task and length, a column for each policy."""
    labels = policy_labels(results)
    found: dict[tuple[str, int | None], dict[str, Result]] = {}
    for result in results:
        found.setdefault((result.config["task"], result.config["length"]), {})[labels[id(result)]] = result
    columns, rows = all_labels(found), []
    for (task, length), by_label in found.items():
        loss, count = kind_of(by_label)[1] == "loss", max(len(result.rows) for result in by_label.values())
        cell = _column(by_label, loss, count)
        tokens = "its own" if length is None else f"{length:,}"
        rows.append([f"{task} (loss)" if loss else task, tokens, str(count), *map(cell, columns)])
    title = "mean score, 0 to 100 (loss: nats a token, less is better), and its 95% interval over n examples"
    return Table(title, "", ["task", "tokens", "n", *columns], rows)


def markdown(results: Sequence[Result]) -> str:
    """All tables, as markdown."""
    parts = []
    for group in grouped(results):
        parts.append(f"## {group.title}\n\n{_made_with(group)}\n")
        parts += [table.markdown() for table in tables(group)]
    return "\n".join(parts)


def as_json(results: Sequence[Result]) -> str:
    """All tables as they are shown, and as numbers the evidence that was found by policies that read passages again."""
    groups = []
    for group in grouped(results):
        recall = [
            {"task": task, "length": length, **row}
            for _, length, by_task in group.blocks()
            for task, found in by_task.items()
            for row in evidence.measured(in_order(found), group.exact.get(length))
        ]
        shown = [{"title": t.title, "note": t.note, "head": t.head, "rows": t.rows} for t in tables(group)]
        groups.append({"title": group.title, "made_with": _made_with(group), "recall": recall, "tables": shown})
    return json.dumps({"groups": groups}, indent=2, ensure_ascii=False)


def page(results: Sequence[Result]) -> str:
    """One HTML page with all tables and plots. It needs no other file. Raises ConfigError without matplotlib."""
    from ahn.eval import plots

    parts = []
    for group in grouped(results):
        parts.append(f"<h2>{html.escape(group.title)}</h2><p>{html.escape(_made_with(group))}</p>")
        parts += [
            f'<figure role="img" aria-label="{html.escape(name)}">{svg}</figure>' for name, svg in plots.svgs(group)
        ]
        parts += [table.html() for table in tables(group)]
    return PAGE.format(body="\n".join(parts))


def tables(group: Group) -> Iterator[Table]:
    if summary := _summary(group):
        yield summary
    for suite, length, by_task in group.blocks():
        at = f"{suite}, its own lengths" if length is None else f"{suite}, {length:,} tokens"
        if split := _split(at, by_task, group.exact.get(length)):
            yield split
        if found := _found(at, by_task, group.exact.get(length)):
            yield found
        yield _scores(at, by_task)
        if compared := _against(at, by_task):
            yield compared


def _summary(group: Group) -> Table | None:
    """Wins and losses of all policies of a group: over all examples, and over those where only a memory can help."""
    blocks = [(length, by_task) for _, length, by_task in group.blocks()]
    labels = sorted({label for _, by_task in blocks for label in all_labels(by_task)}, key=group.place)
    rows = []
    for label in labels:
        every, outside = [], []
        for length, by_task in blocks:
            loss = is_loss(by_task)
            for found in by_task.values():
                if window := baseline(found, label):
                    every.append((_difference([found], label), loss))
                    if not loss:
                        exact = group.exact.get(length)
                        outside.append(statistics.differences(found[label], window, "outside", exact))
        if every:
            verdicts = [_verdict(value, loss) for value, loss in every if value is not None]
            there = [gains for gains in outside if gains]
            gained = _judged(statistics.interval(*there), False) if there else "-"
            rows.append([label, _tally(verdicts), gained, f"{sum(map(len, there))} in {len(there)}"])
    if not rows:
        return None
    head = ["policy", "all tasks: better / worse / unclear", "evidence outside the window", "examples in tasks"]
    note = (
        "Against sinks and window on the same examples. First every task at every length, then only the examples whose "
        "evidence has left the window when the question is asked, as the mean over tasks: only these measure memory."
    )
    return Table("Wins and losses", note, head, rows)


def _scores(at: str, by_task: dict[str, dict[str, Result]]) -> Table:
    labels, loss = all_labels(by_task), is_loss(by_task)
    note = "Mean loss in nats a token (less is better)" if loss else "Mean score, 0 to 100"
    note += " and its 95% interval over examples. In brackets after cache and FLOPs: share of full attention's."
    costs = {label: _cost(next(f[label] for f in by_task.values() if label in f)) for label in labels}
    columns: dict[str, Callable[[str], str]] = {
        "params": lambda label: costs[label][0],
        "cache": lambda label: costs[label][1],
        "mixing FLOPs": lambda label: costs[label][2],
        "model FLOPs": lambda label: costs[label][3],
    }
    for task, found in by_task.items():
        count = max(len(result.rows) for result in found.values())
        columns[f"{_short(task)} (n={count})"] = _column(found, loss, count)
    if len(by_task) > 1:
        columns["average"] = lambda label: _shown(_mean(by_task, label), loss)
    return _laid_out(f"{at}: {'losses' if loss else 'scores'}", note, labels, columns, len(by_task) > WIDE)


def _against(at: str, by_task: dict[str, dict[str, Result]]) -> Table | None:
    loss = is_loss(by_task)
    labels = [n for n in all_labels(by_task) if any(baseline(found, n) for found in by_task.values())]
    tasks = {task: found for task, found in by_task.items() if any(baseline(found, n) for n in found)}
    if not labels:
        return None
    columns: dict[str, Callable[[str], str]] = {}
    for task, found in tasks.items():
        columns[_short(task)] = lambda label, found=found: _judged(_difference([found], label), loss)  # type: ignore[misc]
    if len(tasks) > 1:
        columns["average"] = lambda label: _judged(_difference(list(tasks.values()), label), loss)
    columns["better / worse / unclear"] = lambda label: _count(
        [_difference([found], label) for found in tasks.values()], loss
    )
    note = (
        "Paired difference to sinks and window on the same examples, and its 95% interval; better or worse where the "
        f"interval leaves out 0 and is of at least {statistics.ENOUGH} examples, else unclear."
    )
    return _laid_out(f"{at}: difference to the window", note, labels, columns, len(tasks) > WIDE)


def _split(at: str, by_task: dict[str, dict[str, Result]], exact: Exact | None) -> Table | None:
    """Scores by the place of the evidence when the question is asked, over all examples of all tasks."""
    if exact is None or is_loss(by_task):
        return None
    places = [
        where
        for where in statistics.WHERE
        if any(statistics.scores(result, where, exact) for found in by_task.values() for result in found.values())
    ]
    if not {*places} - {"unknown"}:
        return None
    rows = []
    for label in all_labels(by_task):
        cells = []
        for where in places:
            found = [f for f in by_task.values() if label in f]
            values = [v for f in found for v in statistics.scores(f[label], where, exact)]
            pairs = [(f[label], window) for f in found if (window := baseline(f, label))]
            gains = [v for ours, window in pairs for v in statistics.differences(ours, window, where, exact)]
            cells.append(f"{_shown(statistics.interval(values), False)} n={len(values)}" if values else "-")
            cells.append(_judged(statistics.interval(gains), False) if gains else "")
        rows.append([label, *cells])
    head = [name for where in places for name in (f"evidence {where}", "to the window")]
    note = (
        "Scores by where the evidence is when the question is asked: gone from sinks and window, which alone measures "
        "memory, or among them"
    )
    note += "; cut: truncation has taken it out of the prompt." if "cut" in places else "."
    return Table(f"{at}: evidence outside and inside", note, ["policy", *head], rows)


def _found(at: str, by_task: dict[str, dict[str, Result]], exact: Exact | None) -> Table | None:
    """The share of the evidence that was found, and the scores that depend on it."""
    measured = [(task, row) for task, f in by_task.items() for row in evidence.measured(in_order(f), exact)]
    if not measured:
        return None
    budgets = sorted({budget for _, row in measured for budget in row["found"]}, key=int)

    def cells(task: str, row: dict[str, Any]) -> list[str]:
        third = row["lowest_third"]
        numbers = [row["n"], row["score"]]
        numbers += [number for part in (row["behind"], row["within"]) for number in (part["n"], part["score"])]
        numbers += [*(row["found"].get(budget) for budget in budgets), third["n"], third["score"], third["found"]]
        return [_short(task), row["policy"], *map(_number, numbers)]

    head = ["task", "policy", "n", "score", "n behind", "score behind", "n within", "score within"]
    head += [*(f"found in {int(budget):,}" for budget in budgets), "n lowest", "score lowest", "found lowest"]
    note = (
        "Scores and shares, 0 to 100. Behind: the evidence has left sinks and window when the question is asked. "
        "Within: they still hold it. Found: share of the evidence behind the window that is among so many tokens of "
        "passages. Lowest: the third of the questions behind the window that share the fewest words with the passage; "
        "found among the tokens that were read again."
    )
    return Table(f"{at}: evidence found", note, head, [cells(task, row) for task, row in measured], aligned=True)


def _number(value: float | None) -> str:
    """A count unchanged, a share in percent."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{100 * value:.1f}"


def _laid_out(
    title: str, note: str, labels: list[str], columns: dict[str, Callable[[str], str]], turned: bool
) -> Table:
    if turned:
        rows = [[name, *(cell(label) for label in labels)] for name, cell in columns.items()]
        return Table(title, note, ["", *labels], rows)
    return Table(
        title, note, ["policy", *columns], [[label, *(c(label) for c in columns.values())] for label in labels]
    )


def _column(found: dict[str, Result], loss: bool, count: int) -> Callable[[str], str]:
    def cell(label: str) -> str:
        if label not in found:
            return "-"
        value = statistics.interval(statistics.scores(found[label]))
        return _shown(value, loss) + ("" if value.count == count else f" n={value.count}")

    return cell


def _mean(by_task: dict[str, dict[str, Result]], label: str) -> Interval | None:
    """The mean over tasks. None if one is missing, because the mean of fewer tasks cannot be compared."""
    if not all(label in found for found in by_task.values()):
        return None
    return statistics.interval(*(statistics.scores(found[label]) for found in by_task.values()))


def _difference(by_task: Sequence[dict[str, Result]], label: str) -> Interval | None:
    """The difference to the window, as the mean over tasks. None if one is missing."""
    gains = [
        statistics.differences(found[label], window) if (window := baseline(found, label)) else [] for found in by_task
    ]
    return statistics.interval(*gains) if all(gains) else None


def _shown(value: Interval | None, loss: bool, signed: bool = False) -> str:
    if value is None:
        return "-"
    scale, places = (1, 3) if loss else (100, 1)
    numbers = [f"{scale * x:{'+' if signed else ''}.{places}f}" for x in (value.mean, value.low, value.high)]
    return numbers[0] if math.isnan(value.low) else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _judged(value: Interval | None, loss: bool) -> str:
    if value is None:
        return "-"
    return f"{_shown(value, loss, signed=True)}{['', ' better', ' worse'][_verdict(value, loss)]}"


def _verdict(value: Interval, loss: bool) -> int:
    """1 for better, -1 for worse, 0 for unclear."""
    return -value.sign if loss else value.sign


def _count(values: list[Interval | None], loss: bool) -> str:
    return _tally([_verdict(value, loss) for value in values if value is not None])


def _tally(verdicts: list[int]) -> str:
    return " / ".join(str(verdicts.count(kind)) for kind in (1, -1, 0))


def _cost(result: Result) -> list[str]:
    """Parameters added, cache, mixing FLOPs, model FLOPs."""
    cost = result.config["cost"]
    shares = []
    for key, unit in (("cache_bytes", "B"), ("mixing_flops", ""), ("model_flops", "")):
        value, full = cost[key], cost[f"full_{key}"]
        shares.append(f"{quantity(value)}{unit} ({value / full:.1%})")
    added = cost["parameters_added"]
    return [f"+{quantity(added)}".strip() if added else "0", *shares]


def quantity(value: float) -> str:
    """A number with three digits and a decimal prefix."""
    prefix, scale = next(((p, s) for p, s in UNITS if value >= s), ("", 1))
    number = value / scale
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {prefix}" if prefix else f"{value:g} "


def _made_with(group: Group) -> str:
    """The versions, commits and devices that the numbers were made with, each once."""
    found = [r for tasks in group.results.values() for labels in tasks.values() for r in labels.values()]
    made = [m for result in found for m in result.config["made_with"]]
    packages = sorted({f"ahn {m['package']}" + (f" at {m['commit'][:12]}" if m["commit"] else "") for m in made})
    versions = sorted({f"torch {m['versions']['torch']}, transformers {m['versions']['transformers']}" for m in made})
    devices = sorted({m["device"] for m in made})
    config = found[0].config
    return f"Greedy decoding, {config['dtype']}, seed {config['seed']}; {'; '.join([*packages, *versions, *devices])}."


def _short(task: str) -> str:
    return task.partition("/")[2] or task


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ahn eval</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }}
body {{ color: #222; background: #fff }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
.better {{ background: #dcf2e4 }} .worse {{ background: #fbe0dd }}
figure {{ margin: 1rem 0 }} svg {{ max-width: 100%; height: auto }}
</style></head><body><h1>Memories compared</h1>
{body}
</body></html>
"""
