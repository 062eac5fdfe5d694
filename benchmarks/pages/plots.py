"""Draws the plots of the documentation from the result files. Needs matplotlib (the `dev` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pages.drawn import SOURCES, digest
from pages.recall import question_scores
from pages.tables import recalled, result

NO_STORE = "@none"
STYLE = {
    "figure.facecolor": "white",  # in GitHub's dark mode too
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "svg.hashsalt": "ahn",  # the same file from the same numbers
}
FULL, WINDOW, MEMORIES = "#c0392b", "#7a7a7a", ("#1f6fb4", "#2a9d66", "#8e5bb5", "#c98a1b")

ENOUGH = 40  # examples

Label = tuple[float, str, str]  # height in the units of the axes, text, colour


def colours(names: list[str]) -> dict[str, str]:
    fixed = {"full": FULL, "full attention": FULL, "window": WINDOW, "sinks and window": WINDOW}
    memories = [name for name in dict.fromkeys(names) if name not in fixed]
    return fixed | {name: MEMORIES[i % len(MEMORIES)] for i, name in enumerate(memories)}


def name_lines(axes: Any, labels: list[Label]) -> None:
    """Write the names of lines to the right of the axes, at the height of the lines' ends. Names that would touch are
    pushed up."""
    lines = 72 * axes.get_window_extent().height / axes.figure.dpi / 12
    least = -1.0
    for y, text, colour in sorted(labels):
        height = axes.transAxes.inverted().transform(axes.transData.transform((axes.get_xlim()[1], y)))[1]
        least = max(height, least + 1 / lines)
        axes.text(1.01, least, text, color=colour, transform=axes.transAxes, va="center", fontsize=9)


def count(tokens: float, _: Any = None) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"


def number(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def loss_by_position(results: dict[str, Any]) -> Any:
    """The losses above; below, the gain of the memories over sinks and window with standard errors."""
    size = next(row["lossless"] for row in results["rows"] if row["lossless"])
    rows = [row for row in results["rows"] if row["lossless"] in (None, size)]
    colour = colours([row["memory"] for row in rows])
    width, context, tokens = results["bin"], results["context"], results["tokens"]
    every = [width * (i + 0.5) for i in range(tokens // width)]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 2))
    above: list[Label] = []
    below: list[Label] = [(0, "sinks and window", WINDOW)]
    lowest = highest = 0.0
    bottom.axhline(0, color=WINDOW, linewidth=1.8)
    for row in rows:
        memory, name = row["memory"], Path(row["memory"].removesuffix(NO_STORE)).name
        if memory + NO_STORE in colour:
            name += " + store"
        places = every[: len(row["loss"])]
        top.plot(places, row["loss"], color=colour[memory])
        if len(places) == len(every):
            above.append((row["loss"][-1], name, colour[memory]))
        else:
            top.text(places[-1], row["loss"][-1], f" {name}", color=colour[memory], va="center", fontsize=9)
        if memory == "sinks and window":
            continue
        low, high = ([g + s * e for g, e in zip(row["gain"], row["gain_se"], strict=True)] for s in (-1, 1))
        bottom.plot(places, row["gain"], color=colour[memory])
        bottom.fill_between(places, low, high, color=colour[memory], alpha=0.2, linewidth=0)
        shown = [i for i, place in enumerate(places) if memory != "full attention" or place < context]
        highest = max(highest, *(high[i] for i in shown))
        lowest = min(lowest, *(low[i] for i in shown))
        if len(shown) == len(every):
            below.append((row["gain"][-1], name, colour[memory]))
    top.set_title("loss of the next token (nats)")
    count_of = f"{results['texts']} text" + ("s" if results["texts"] > 1 else "")
    bottom.set_title(f"how much lower than with sinks and window alone (± standard error, {count_of})")
    bottom.set_ylim(min(1.1 * lowest, -0.3 * highest), 1.1 * highest)
    bottom.set_xlim(0, tokens)
    bottom.set_xlabel("position in the text (tokens)")
    bottom.xaxis.set_major_locator(FixedLocator([tokens * i // 8 for i in range(9)]))
    bottom.xaxis.set_major_formatter(FuncFormatter(count))
    for axes in (top, bottom):
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if context < tokens:
            axes.axvline(context, color="#999999", linewidth=1, linestyle=(0, (4, 3)))
    if context < tokens:
        top.annotate(
            "trained context  ",
            (context, 0.6),
            xycoords=("data", "axes fraction"),
            ha="right",
            color="#666666",
            fontsize=9,
        )
    figure.draw_without_rendering()
    name_lines(top, above)
    name_lines(bottom, below)
    return figure


def cost_by_length(results: dict[str, Any]) -> Any:
    rows = results["rows"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    colour = colours(kinds)
    names = {"full": "full attention", "window": "sinks and window"}
    panels = {
        "cache_mib": "cache (MiB)",
        "peak_mib": "peak memory (MiB)",
        "read_s": "time to read (s)",
        "decode_ms": "time of one more token (ms)",
    }
    lengths = sorted({row["length"] for row in rows})
    figure, grid = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    drawn = []
    for axes, (key, title) in zip(grid.flat, panels.items(), strict=True):
        labels = []
        for kind in kinds:
            points = [(row["length"], row[key]) for row in rows if row["kind"] == kind]
            axes.plot(*zip(*points, strict=True), color=colour[kind], marker="o", markersize=3.5)
            labels.append((points[-1][1], names.get(kind, f"+ {kind}"), colour[kind]))
        axes.set(title=title, xscale="log", yscale="log")
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(count))
        low, high = axes.get_ylim()
        if high < 10 * low:  # at least a decade, so that noise does not look like a slope
            middle = (low * high) ** 0.5
            axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(number))
        axes.yaxis.set_minor_locator(NullLocator())
        drawn.append((axes, labels))
    for axes in grid[1]:
        axes.set_xlabel("tokens read")
    figure.draw_without_rendering()
    for axes, labels in drawn:
        name_lines(axes, labels)
    return figure


def facts_found(results: dict[str, Any]) -> Any:
    """A group of bars for each task, with 95% intervals, and a line at the score of full attention."""
    rows = recalled(results)
    series = {  # name, policy, span of the store
        "window": ("window", 0, "#b5b5b5"),
        "+ compressed memory": ("ahn", 0, MEMORIES[0]),
        "+ learned store": ("ahn", 1, MEMORIES[1]),
        "+ learned store, spans of 4": ("ahn", 4, "#8fd3b3"),
    }
    tasks, labels, ticks, y = list(dict.fromkeys(task for task, *_ in rows)), set(), [], 0.0
    figure, axes = plt.subplots(figsize=(8, 5))
    for task in tasks:
        top = y
        for name, (policy, span, colour) in series.items():
            if (row := rows.get((task, policy, span))) is None:
                continue
            score, end = row["score"], max(row["score"], row["high"])
            axes.barh(y, score, 0.9, color=colour, label=None if name in labels else name, zorder=2)
            axes.plot([row["low"], row["high"]], [y, y], color="#444444", linewidth=1, zorder=3)
            axes.text(end + 0.012, y, f"{score:.0%}", va="center", fontsize=7, color="#444444")
            labels.add(name)
            y += 1
        ticks.append((top + y - 1) / 2)
        full = rows[task, "full", 0]["score"]
        name = "full attention"
        axes.vlines(full, top - 0.6, y - 0.4, color=FULL, label=None if name in labels else name, zorder=4)
        labels.add(name)
        y += 0.9
    axes.set(xlim=(0, 1.09), ylim=(y - 1.2, -0.9), yticks=ticks)
    axes.set_yticklabels([task.partition("/")[2].replace("spread", "SQuAD (F1)") for task in tasks])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.grid(visible=False, axis="y")
    axes.set_title(f"found, of {results['note'].partition(';')[0]}")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=5, columnspacing=1)
    return figure


def facts_by_depth(results: dict[str, Any]) -> Any:
    """A panel for each way to read, with the share found: a row for each task, a column for each fifth of the text."""
    by = recalled(results)
    ways = {"window": ("window", 0), "learned store": ("ahn", 4), "full attention": ("full", 0)}
    tasks = [
        task for task, *way in by if tuple(way) == ways["learned store"] and None not in by[task, *way]["by_depth"]
    ]
    figure, panels = plt.subplots(1, len(ways), figsize=(9.5, 0.42 * len(tasks) + 1.3), sharey=True)
    for axes, (name, way) in zip(panels, ways.items(), strict=True):
        shares = [by[task, *way]["by_depth"] for task in tasks]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, of_task in enumerate(shares):
            for column, share in enumerate(of_task):
                colour = "white" if share > 0.6 else "#222222"
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
        axes.set(title=name, xlabel="fifth of the text", xticks=range(len(shares[0])), yticks=range(len(tasks)))
        axes.set_xticklabels(range(1, len(shares[0]) + 1))
        axes.grid(visible=False)
        axes.tick_params(length=0)
    panels[0].set_yticklabels([task.partition("/")[2] if "ruler" in task else "SQuAD (F1)" for task in tasks])
    figure.suptitle(
        f"found, {results['tokens']:,} tokens, {results['lossless']:,} lossless, {results['adapter']}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def facts_by_budget(results: dict[str, Any], *more: dict[str, Any]) -> Any:
    """A panel for each task: the share found by lossless tokens, a line for each store. Of several rows, the one with
    most examples is shown. Rows with fewer than `ENOUGH` examples are left out."""
    every = [row for part in (results, *more) for row in part["rows"]]
    rows = sorted((r for r in every if r.get("seed", 1) == 1 and r["n"] >= ENOUGH), key=lambda r: r["n"])
    sizes = sorted({r["lossless"] for r in rows if (r["store"] or {}).get("name") == "learned"})
    tasks = [task for task in dict.fromkeys(r["task"] for r in rows) if sum(r["task"] == task for r in rows) > 12]
    lines = {"window": WINDOW, "learned": MEMORIES[1], "surprise": MEMORIES[0], "attention": MEMORIES[2]}
    lines |= {"recency": MEMORIES[3], "random": "#222222"}
    figure, panels = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks) + 1, 3.4), sharey=True, squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        axes.set(title=task.partition("/")[2], xscale="log", xlabel="lossless tokens", ylim=(-0.03, 1.03))
        for name, colour in lines.items():
            of_name = {
                r["lossless"]: r["score"]
                for r in rows
                if r["task"] == task and ((r["store"] or {}).get("name") or r["policy"]) == name
            }
            if not (at := [size for size in sizes if size in of_name]):
                continue
            axes.plot(at, [of_name[size] for size in at], color=colour, marker="o", markersize=3, label=name)
        full = next(r["score"] for r in rows if r["task"] == task and r["policy"] == "full")
        axes.axhline(full, color=FULL, linewidth=1, label="full attention", zorder=1)
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(count))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    figure.suptitle(f"found, of {results['tokens']:,} tokens, {results['adapter']}", fontsize=10, x=0.01, ha="left")
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    return figure


def answers(facts: dict[str, Any], questions: dict[str, Any]) -> Any:
    """Ordinary questions answered and needles found, by each way to read. Ways differ in lightness and pattern, so that
    the plot can be read in grey."""
    styles: dict[str, dict[str, Any]] = {
        "window": {"facecolor": "#dcdcdc"},
        "memory": {"facecolor": "#9cc3e6"},
        "recall": {"facecolor": "#1f5f99"},
        "full attention": {"facecolor": "white", "hatch": "////"},
    }
    by, sets = recalled(facts), question_scores(questions)
    keys = {"window": ("window", 0), "memory": ("ahn", 4), "full attention": ("full", 0)}
    tasks = dict.fromkeys(task for task, policy, span in by if (policy, span) == ("ahn", 4) and task != "squad/spread")
    needles = {
        NEEDLES[task]: {way: {"score": 100 * row["score"], "interval_95": [100 * row["low"], 100 * row["high"]]} for
                        way, key in keys.items() for row in [by[task, *key]]} for task in tasks
    }  # fmt: skip
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6))
    named: dict[str, Any] = {}
    titles = "ordinary questions, word F1 (1.5B)", "needles found, % (0.5B)"
    for axes, title, groups in zip(panels, titles, (sets, needles), strict=True):
        y, ticks = 0.0, []
        for group in groups.values():
            ways = [way for way in styles if way in group]
            ticks.append(y + (len(ways) - 1) / 2)
            for way in ways:
                score, interval = group[way]["score"], group[way].get("interval_95")
                drawn = axes.barh(y, score, 0.86, edgecolor="black", linewidth=0.8, zorder=2, **styles[way])
                named.setdefault(way, drawn)
                if interval:
                    axes.plot(interval, [y, y], color="black", linewidth=1, zorder=3)
                axes.text(max(score, *(interval or [0])) + 1.5, y, f"{score:.0f}", va="center", fontsize=8)
                y += 1
            y += 0.8
        axes.set(title=title, xlim=(0, 110), ylim=(y - 1.2, -0.8), yticks=ticks)
        axes.set_yticklabels(list(groups))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    labels = [way for way in styles if way in named]
    bars = [named[way] for way in labels]
    figure.legend(bars, labels, frameon=False, loc="outside lower center", ncols=4)
    return figure


NEEDLES = {
    "infinitebench/passkey": "pass keys",
    "ruler/niah_single_1": "number in noise",
    "ruler/niah_single_2": "number in a book",
    "ruler/niah_single_3": "hexadecimal value",
    "ruler/niah_multikey_1": "one of several",
    "ruler/niah_multivalue": "several values",
    "ruler/niah_multiquery": "several keys",
}


def draw_all(into: Path, form: str = "svg") -> None:
    """Draw every plot into a folder, as files of that form. An SVG carries the digest of its result files."""
    with plt.rc_context(STYLE):
        for name, draw in PLOTS.items():
            figure = draw(*(result(source) for source in SOURCES[name]))
            path = into / f"{name}.{form}"
            about = {"Date": None, "Identifier": digest(name)} if form == "svg" else None
            figure.savefig(path, metadata=about, dpi=110)
            plt.close(figure)
            print(path)


PLOTS = {
    "answers": answers,
    "loss-by-position": loss_by_position,
    "cost-by-length": cost_by_length,
    "facts-found": facts_found,
    "facts-by-depth": facts_by_depth,
    "facts-by-budget": facts_by_budget,
    "facts-by-budget-smollm2": facts_by_budget,
}
