"""How much of what has left the window is recalled, by store, budget and depth of the needle.

    python benchmarks/recall.py [--base smollm2-135m] [--adapter A] [--tasks ruler/niah_single_2 squad/spread=qa ...]
        [--length 8192] [--lossless 512 1024 2048] [--stores attention surprise:8 learned:8] [--share 0.74]
        [--limit 200] [--batch 16] [--seed 1]

Every row keeps as many tokens exactly: a store has the `--share` of them, the window the rest. `surprise:8` judges
spans of 8 tokens. A task may name its data behind `=`. Without an adapter stores are measured alone, without a memory.
Rows: full attention (`--no-full` leaves it out), the window, the adapter without a store (`--no-plain` leaves both
out), and the stores. Choose with one seed, report another.

`--prompts FILE` holds the prompts: `--prepare` makes it, on a machine without a GPU. A run takes the first `--limit` of
each task. Results are those of `ahn eval`, in `--output`, and go on where they were interrupted (`--seconds`); the
summary is benchmarks/results/recall-BASE.json (benchmarks/plot.py draws it).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import SHARE, UNFINISHED, keep, kept, run_in_memory, stored, write

if TYPE_CHECKING:
    from ahn.eval.runner import Work

DEPTHS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--tasks", nargs="+", default=["ruler/niah_single_1", "ruler/niah_single_2"])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--lossless", type=int, nargs="+", default=[1024])
    parser.add_argument("--stores", nargs="*", default=["recency", "random", "attention:8"])
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-full", action="store_true")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--prompts", type=Path, metavar="FILE")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("recall-runs"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no batch after these")
    parser.add_argument("--name", help="of the result file")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    works = prompts(options)
    if options.prepare:
        print(f"{sum(len(prompt.ids) for work in works for prompt in work.prompts):,} tokens, read once a row")
        return
    name, rows = options.name or f"recall-{Path(options.base).stem}", []
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    for row in _rows(options, works, end):
        rows.append(row)
        path = write(name, settings=settings, rows=rows)
    if rows:
        print(path)
    if time.monotonic() > end:
        print("time is over: the same command goes on from here", flush=True)
        raise SystemExit(UNFINISHED)


def prompts(options: argparse.Namespace) -> list[Work]:
    from ahn.eval import runner, tasks

    if options.prompts is not None and options.prompts.is_file():
        made: list[Work] = kept(options.prompts)
        names = {task.name for task in tasks.expand([text.partition("=")[0] for text in options.tasks])}
        made = [work for work in made if work.task.name in names]
    else:
        made = []
        for text in options.tasks:
            name, _, data = text.partition("=")
            what = runner.Options(
                options.base, window=1, sinks=0, data=Path(data) if data else None, seed=options.seed,
                limit=options.limit,
            )  # fmt: skip
            made += runner.prepare(tasks.expand([name]), [options.length], what)
        if options.prompts is not None:
            keep(options.prompts, made)
    first = slice(options.limit)
    return [replace(work, examples=work.examples[first], prompts=work.prompts[first]) for work in made]


def _rows(options: argparse.Namespace, works: list[Work], end: float) -> Iterator[dict[str, Any]]:
    from ahn.bases import base_config, load_base
    from ahn.eval import results, runner
    from ahn.eval.policies.base import exact_sizes

    model = load_base(options.base)
    for number, lossless in enumerate(options.lossless):
        window, sinks = exact_sizes(base_config(options.base), options.adapter, lossless, None)
        plain = [] if options.no_plain else ["window"] + (["ahn"] if options.adapter else [])
        if number == 0 and not options.no_full:
            plain.insert(0, "full")
        ways: list[tuple[str, Any]] = [(name, None) for name in plain]
        for text in options.stores:
            ways.append(("ahn" if options.adapter else "store", stored(text, window, options.share)))
        for name, store in ways:
            what = runner.Options(
                base=options.base, window=window, sinks=sinks, adapter=options.adapter, store=store,
                seed=options.seed, limit=options.limit, batch=options.batch,
            )  # fmt: skip
            begun = time.monotonic()
            folders = run_in_memory(works, [name], what, options.output, lambda: time.monotonic() > end, model)
            seconds = time.monotonic() - begun
            for folder in folders:
                found = results.load(folder)
                if not found.rows:
                    continue
                row = summary(found.config, list(found.rows.values()))
                row |= {"lossless": None if found.config["policy"] == "full" else lossless}
                row |= {"store": None if store is None else store._asdict()}
                score = f"{row['score']:8.3f} [{row['low']:.3f}, {row['high']:.3f}] n={row['n']}"
                print(f"{label(row):<28}{row['task']:<24}{row['lossless'] or 'all':>8}{score}", flush=True)
                yield row
            print(f"{name} {store or ''}: {seconds:.0f} s", flush=True)


def summary(config: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean score with its 95% interval, over all examples and by depth of the needle."""
    from ahn.eval.statistics import interval

    row = {"task": config["task"], "policy": config["policy"], "n": len(rows)}
    row |= {"cache_bytes": config["cost"]["cache_bytes"]}
    scores = [example["score"] for example in rows]
    found = interval(scores)
    row |= {"score": sum(scores) / len(scores), "low": found.low, "high": found.high}
    by_depth: list[list[float]] = [[] for _ in range(DEPTHS)]
    for example in rows:
        if example.get("depth") is not None:
            by_depth[min(DEPTHS - 1, int(example["depth"] * DEPTHS))].append(example["score"])
    return row | {"by_depth": [sum(part) / len(part) if part else None for part in by_depth]}


def label(row: dict[str, Any]) -> str:
    if row["store"] is None:
        return {"full": "full attention", "ahn": "memory"}.get(row["policy"], row["policy"])
    span = row["store"]["span"]
    return row["store"]["name"] + (f", spans of {span}" if span > 1 else "")


if __name__ == "__main__":
    main()
