"""The plots of a report, as SVG in text: score by length, by needle depth, by cache and FLOPs, and loss by position."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.errors import ConfigError
from ahn.eval import statistics
from ahn.eval.compare import baseline, is_loss
from ahn.eval.rows import BIN

if TYPE_CHECKING:
    from ahn.eval.compare import Group
    from ahn.eval.results import Result

DEPTHS = 10  # rows of the heat map
FIXED = {"full": "#c0392b", "window": "#7a7a7a", "compressive-max": "#c98a1b", "compressive-avg": "#e0b76a"}
MEMORIES = ("#1f6fb4", "#2a9d66", "#8e5bb5", "#17a2b8")
STYLE = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ahn",  # the same file from the same numbers
}


def svgs(group: Group) -> Iterator[tuple[str, str]]:
    """Name and SVG of each plot there is data for. Raises ConfigError without matplotlib."""
    for name, figure in figures(group):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        yield name, text.getvalue()[text.getvalue().index("<svg") :]


def figures(group: Group) -> Iterator[tuple[str, Any]]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("matplotlib is not installed, which plots need: pip install 'ahn[report]'") from error
    with matplotlib.rc_context(STYLE):
        for draw in (_by_length, _by_depth, _by_cost, _by_position):
            figure = Figure()
            if draw(figure, group):
                yield draw.__doc__ or "", figure


def _by_length(figure: Any, group: Group) -> bool:
    """Score by length"""
    series: dict[str, dict[str, list[tuple[int, statistics.Interval]]]] = {}
    for suite, length, by_task in group.blocks():
        if length is None or is_loss(by_task):
            continue
        for label in _labels(by_task):
            if not all(label in found for found in by_task.values()):
                continue
            whole = [statistics.scores(found[label]) for found in by_task.values()]
            outside = [
                statistics.scores(found[label], "outside", group.exact.get(length)) for found in by_task.values()
            ]
            for which, values in (("", whole), (", evidence outside the window", [part for part in outside if part])):
                if values:
                    points = series.setdefault(suite + which, {}).setdefault(label, [])
                    points.append((length, statistics.interval(*values)))
    if not series:
        return False
    colour = _colours(group)
    for axes, (suite, lines) in zip(_panels(figure, len(series)), series.items(), strict=True):
        lengths = sorted({length for points in lines.values() for length, _ in points})
        for i, (label, points) in enumerate(lines.items()):
            points.sort(key=lambda point: point[0])
            x = [length * 1.02 ** (i - len(lines) / 2) for length, _ in points]  # beside each other, to be seen
            y = [100 * mean.mean for _, mean in points]
            spread = np.array([[m.mean - m.low, m.high - m.mean] for _, m in points]).T * 100
            axes.errorbar(x, y, np.nan_to_num(spread), color=colour[label], marker="o", ms=4, capsize=2, label=label)
        axes.set_title(f"{suite}: mean score")
        axes.set_xscale("log", base=2)
        axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
        axes.set_xticks(lengths, [_count(length) for length in lengths])
        axes.minorticks_off()
        _score_axis(axes, [100 * np.nanmax([m.mean, m.high]) for points in lines.values() for _, m in points])
        axes.set_xlabel("length (tokens); 95% intervals")
        axes.legend(fontsize=9)
    return True


def _by_depth(figure: Any, group: Group) -> bool:
    """Score by depth of the needle"""
    found: dict[str, dict[int, list[list[float]]]] = {}
    for _, length, by_task in group.blocks():
        runs = [(label, result) for results in by_task.values() for label, result in results.items()]
        for label, row in ((label, row) for label, result in runs for row in result.rows.values()):
            if row.get("depth") is not None and length is not None:
                cells = found.setdefault(label, {}).setdefault(length, [[] for _ in range(DEPTHS)])
                cells[min(int(row["depth"] * DEPTHS), DEPTHS - 1)].append(row["score"])
    if not found:
        return False
    lengths = sorted({length for column in found.values() for length in column})
    labels = [label for label in _order(group) if label in found]
    image = None
    for axes, label in zip(_panels(figure, len(labels)), labels, strict=True):
        values = np.full((DEPTHS, len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            for depth, scores in enumerate(found[label].get(length, [])):
                if scores:
                    mean = values[depth, column] = 100 * sum(scores) / len(scores)
                    colour = "black" if mean > 55 else "white"
                    axes.text(column, depth, f"{mean:.0f}", ha="center", va="center", fontsize=8, color=colour)
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axes.set_facecolor("#dddddd")
        axes.grid(False)
        axes.set_title(label)
        axes.set_xticks(range(len(lengths)), [_count(length) for length in lengths])
        axes.set_yticks([-0.5, DEPTHS / 2 - 0.5, DEPTHS - 0.5], ["0%", "50%", "100%"])
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel("depth of the needle")
        for column, length in enumerate(lengths):
            if length in group.exact:
                edge = max(0.0, 1 - group.exact[length][0] / length) * DEPTHS - 0.5
                axes.plot([column - 0.5, column + 0.5], [edge, edge], color="#ff4d4d", linewidth=1.5)
    figure.colorbar(image, ax=figure.axes, label="score (grey: none; red: where the window begins)", shrink=0.8)
    return True


def _by_cost(figure: Any, group: Group) -> bool:
    """Score by cache and by FLOPs"""
    lines: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for suite, _, by_task in group.blocks():
        for label in [] if is_loss(by_task) else _labels(by_task):
            if all(label in found for found in by_task.values()):
                mean = statistics.interval(*(statistics.scores(found[label]) for found in by_task.values())).mean
                costs = [found[label].config["cost"] for found in by_task.values()]
                cache, flops = (sum(cost[key] for cost in costs) / len(costs) for key in ("cache_bytes", "model_flops"))
                lines.setdefault(suite, {}).setdefault(label, []).append((cache / 1e6, flops / 1e12, 100 * mean))
    if not lines:
        return False
    colour, panels = _colours(group), _panels(figure, 2 * len(lines), columns=2)
    for i, (suite, points) in enumerate(lines.items()):
        for axes, k, name in ((panels[2 * i], 0, "cache (MB)"), (panels[2 * i + 1], 1, "FLOPs of reading (T)")):
            for label, found in points.items():
                x, y = [point[k] for point in found], [point[2] for point in found]
                axes.plot(x, y, color=colour[label], linewidth=1, label=label)
                axes.scatter(x, y, [16 + 14 * n for n in range(len(x))], color=colour[label])
            axes.set_title(f"{suite}: score by {name}")
            _score_axis(axes, [point[2] for found in points.values() for point in found])
            axes.set_xlim(0, 1.08 * max(point[k] for found in points.values() for point in found))
            axes.set_xlabel(name + ("; larger dots: longer texts" if len(x) > 1 else ""))
        panels[2 * i].legend(fontsize=9)
    return True


def _by_position(figure: Any, group: Group) -> bool:
    """Loss by position"""
    found: dict[str, tuple[int | None, dict[str, Result]]] = {}
    for _, length, by_task in group.blocks():
        for task, results in by_task.items():
            if is_loss({task: results}):
                found[task if length is None else f"{task}, {_count(length)} tokens"] = length, results
    if not found:
        return False
    colour, panels = _colours(group), _panels(figure, 2 * len(found), columns=2)
    for i, (title, (length, results)) in enumerate(found.items()):
        whole, gain = panels[2 * i], panels[2 * i + 1]
        for label, result in results.items():
            y, window = _positions(result), baseline(results, label)
            x = [BIN * (k + 0.5) for k in range(len(y))]
            whole.plot(x, y, color=colour[label], label=label)
            if window is not None:
                gains = [a - b for a, b in zip(_positions(window), y, strict=False)]
                gain.plot(x[: len(gains)], gains, color=colour[label])
        whole.set_title(f"{title}: loss (nats a token)")
        gain.set_title("how much lower than the window's")
        gain.axhline(0, color=FIXED["window"])
        for axes in (whole, gain):
            axes.set_xlabel("position (tokens); dashed: the end of what is lossless")
            axes.set_xticks([max(BIN * len(_positions(r)) for r in results.values()) * k / 4 for k in range(5)])
            axes.xaxis.set_major_formatter(lambda tokens, _: _count(int(tokens)))
            if length in group.exact:
                axes.axvline(sum(group.exact[length]), color="#999999", linewidth=1, linestyle=(0, (4, 3)))
        whole.legend(fontsize=9)
    return True


def _positions(result: Result) -> list[float]:
    """Mean over texts of each bin of positions, as far as all texts go."""
    texts = [row["losses"] for row in result.rows.values()]
    return [sum(text[k] for text in texts) / len(texts) for k in range(min(map(len, texts)))]


def _panels(figure: Any, count: int, columns: int = 3) -> list[Any]:
    """Axes side by side, at most so many in a row."""
    columns = min(count, 2 if count == 4 else columns)
    rows = math.ceil(count / columns)
    figure.set_size_inches(max(5.5, 4.2 * columns), 3.6 * rows)
    return [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _score_axis(axes: Any, values: list[float]) -> None:
    """From 0 as high as the scores go, so that low ones can be told apart too."""
    top = min(100.0, max(10.0, 1.1 * max(values)))
    axes.set_ylim(-0.03 * top, 1.03 * top)


def _labels(by_task: dict[str, dict[str, Result]]) -> list[str]:
    return list(dict.fromkeys(label for found in by_task.values() for label in found))


def _order(group: Group) -> list[str]:
    return list(dict.fromkeys(label for _, _, by_task in group.blocks() for label in _labels(by_task)))


def _colours(group: Group) -> dict[str, str]:
    memories = [label for label in _order(group) if label not in FIXED]
    return FIXED | {label: MEMORIES[i % len(MEMORIES)] for i, label in enumerate(memories)}


def _count(tokens: int) -> str:
    return f"{tokens / 1024:g}k" if tokens % 1024 == 0 else f"{tokens:,}"
