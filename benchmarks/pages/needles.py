"""Tables of facts found in long texts: results.md, store.md."""

from __future__ import annotations

from collections.abc import Sequence

from pages.cards import ENOUGH
from pages.tables import Row, block, numbers, one, percent, recalled, result, rows, table

TASKS = {
    "infinitebench/passkey": "pass keys",
    "ruler/niah_single_1": "a number in noise (niah_single_1)",
    "ruler/niah_single_2": "a number in a book (niah_single_2)",
    "ruler/niah_single_3": "a long hexadecimal value (niah_single_3)",
    "ruler/niah_multikey_1": "one of several numbers (niah_multikey_1)",
    "ruler/niah_multivalue": "several numbers, one key (niah_multivalue)",
    "ruler/niah_multiquery": "several keys (niah_multiquery)",
    "squad/spread": "SQuAD articles (word F1)",
}
POLICIES = {"window": ("window", 0), "cells": ("ahn", 0), "cells and store": ("ahn", 4), "full attention": ("full", 0)}


def facts(name: str, columns: dict[str, tuple[str, int]], about: str) -> str:
    by, shown, body = recalled(result(name)), [], []
    for task, label in TASKS.items():
        found = [by.get((task, *key)) for key in columns.values()]
        kept = [row if row and row["n"] >= ENOUGH else None for row in found]
        shown += [row for row in kept if row]
        body.append([label, *percent(row and row["score"] for row in kept)])
    widest = max(row["high"] - row["low"] for row in shown) / 2
    count = sorted({row["n"] for row in shown})
    about += f" Share found; {listed(count)} examples a cell; 95% intervals are at most ± {100 * widest:.0f} points."
    return block(["", *columns], body, about, name)


def listed(values: Sequence[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"


@table
def facts_qwen() -> str:
    about = "Qwen2.5-Coder-0.5B with its default memory: 16,384 tokens, 2,048 of them lossless, 496 of these stored."
    return facts("recall-qwen2.5-coder-0.5b-default", POLICIES, about)


@table
def facts_smollm2() -> str:
    about = "SmolLM2-135M with its default memory: 8,192 tokens, 2,048 of them lossless, 496 of these stored."
    columns = {label: key for label, key in POLICIES.items() if label != "full attention"}
    return facts("recall-smollm2-135m-default", columns, about)


@table
def facts_smollm2_large_store() -> str:
    about = "SmolLM2-135M, 8,192 tokens, 1,024 of them lossless, 710 of these stored."
    return facts("recall-smollm2-135m", POLICIES, about)


@table
def facts_by_depth() -> str:
    name = "recall-qwen2.5-coder-0.5b-default"
    by = recalled(result(name))
    body = []
    for task, label in TASKS.items():
        for column, key in (("window", ("window", 0)), ("cells and store", ("ahn", 4))):
            shares = by[task, *key]["by_depth"]
            if task.startswith("ruler") and None not in shares:
                body.append([f"{label}: {column}", *percent(shares)])
    about = "Share found by the fifth of the text that holds the fact; as above."
    return block(["", "first", "second", "third", "fourth", "last"], body, about, name)


@table
def gates() -> str:
    """Facts found and the loss on books, for each way to train gates and each share of the store."""
    books = "gap-store-qwen2.5-coder-0.5b"
    lines = [
        (
            "a quarter (shipped)",
            "a quarter",
            "recall-qwen2.5-coder-0.5b-default",
            496,
            "qwen2.5-coder-0.5b-gated_deltanet",
        ),
        ("three quarters", "a quarter", "recall-qwen2.5-coder-0.5b-16k", 496, "16k gates for three quarters, @0.25"),
        (
            "three quarters",
            "three quarters",
            "recall-qwen2.5-coder-0.5b-16k",
            1468,
            "16k gates for three quarters, @0.74",
        ),
    ]
    tasks = [f"ruler/niah_{task}" for task in ("single_3", "multikey_1", "multivalue", "multiquery")]
    body = []
    for trained, used, file, size, memory in lines:
        stored = {
            row["task"]: row for row in rows(file, seed=1, lossless=2048) if (row["store"] or {}).get("size") == size
        }
        shares = percent(stored[task]["score"] for task in tasks)
        body.append([trained, used, *shares, f"{one(books, memory=memory)['loss']:.3f}"])
    body.append(["", "no store", *[""] * len(tasks), f"{one(books, memory=f'{lines[0][-1]}@none')['loss']:.3f}"])
    head = ["gates trained for", "used with", *(task.partition("_")[2] for task in tasks), "loss on books"]
    about = "Qwen2.5-Coder-0.5B, 16,384 tokens, 2,048 lossless, n = 200; loss in nats."
    return block(head, body, about, "recall-qwen2.5-coder-0.5b-default", "recall-qwen2.5-coder-0.5b-16k", books)


BUDGETS = {
    "qwen": [f"recall-qwen2.5-coder-0.5b-{part}" for part in ("default", "rules", "curve")],
    "smollm2": ["recall-smollm2-135m", "recall-smollm2-135m-curve"],
}


def by_budget(base: str, sizes: Sequence[int], about: str) -> str:
    """The share found of three tasks, by rule and number of lossless tokens. The row with most examples counts."""
    found: dict[tuple[str, str, int], Row] = {}
    for name in BUDGETS[base]:
        for row in result(name)["rows"]:
            if row["store"] and row.get("seed", 1) == 1 and row["n"] >= 40:
                key = (row["store"]["name"], row["task"], row["lossless"])
                found[key] = max(found.get(key, row), row, key=lambda one: one["n"])
    body = []
    for task in ("single_2", "multikey_1", "multiquery"):
        for rule in ("learned", "surprise", "attention", "random"):
            shares = [found.get((rule, f"ruler/niah_{task}", size)) for size in sizes]
            body.append([task, f"`{rule}`", *percent(row and row["score"] for row in shares)])
    widest = max(row["high"] - row["low"] for row in found.values()) / 2
    counts = [row["n"] for row in found.values()]
    about += f" Share found; {min(counts)} to {max(counts)} examples a cell; 95% intervals are at most "
    about += f"± {100 * widest:.0f} points."
    return block(["", "rule", *numbers(sizes)], body, about, *BUDGETS[base])


@table
def budget_qwen() -> str:
    return by_budget("qwen", (512, 1024, 2048, 4096, 8192), "Qwen2.5-Coder-0.5B, 16,384 tokens, by lossless tokens.")


@table
def budget_smollm2() -> str:
    return by_budget("smollm2", (256, 512, 1024, 2048, 4096), "SmolLM2-135M, 8,192 tokens, by lossless tokens.")
