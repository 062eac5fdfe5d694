"""Tables of what is lost, found and answered: results.md, store.md, training.md, recall.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import mean

from common import RESULTS
from pages.cards import ENOUGH
from pages.tables import (
    Row,
    at_least,
    at_most,
    block,
    markdown,
    numbers,
    one,
    percent,
    recalled,
    result,
    rows,
    source,
    table,
    wrapped,
)

WINDOW, CLIPPED, LONGER = "sinks and window, absolute", "sinks and window, clipped", "a longer window, clipped"
SMALL = ("deltanet", "gated_deltanet", "mamba2")
SIZES = (256, 512, 1024, 2048)


def gap(name: str, memories: dict[str, tuple[str, str]], sizes: Sequence[int], form: str) -> list[list[str]]:
    """A line for each label: (memory, key) at these numbers of lossless tokens. A longer window is counted as the
    window that it is compared with."""
    longer = {448: 256, 704: 512, 1216: 1024, 2240: 2048, 2496: 2048}
    body = []
    for label, (memory, key) in memories.items():
        found = {longer.get(row["lossless"], row["lossless"]): row.get(key) for row in rows(name, memory=memory)}
        body.append([label, *numbers((found.get(size) for size in sizes), form)])
    return body


@table
def gap_loss() -> str:
    name = "gap-smollm2-135m"
    found = result(name)
    memories = {
        "sinks and window, as in the paper": (WINDOW, "loss"),
        "sinks and window, clipped (default)": (CLIPPED, "loss"),
        "a window longer by the bytes of a state": (LONGER, "loss"),
    } | {f"`smollm2-135m-{cell}`": (f"smollm2-135m-{cell}", "loss") for cell in SMALL}
    about = f"Mean loss of the next token (nats), as above. Full attention: {found['full']:.4f}."
    return block(["lossless tokens", *numbers(SIZES)], gap(name, memories, SIZES, "{:.4f}"), about, name)


@table
def gap_closed() -> str:
    name = "gap-smollm2-135m"
    memories = {"sinks and window, clipped (default)": (CLIPPED, "closed")}
    memories |= {"a window longer by the bytes of a state": (LONGER, "closed")}
    for cell in SMALL:
        memory = f"smollm2-135m-{cell}"
        memories |= {f"`{memory}`": (memory, "closed"), f"{cell}, memory of another book": (memory, "control_closed")}
    about = (
        "Share of the gap between the paper's window and full attention that is closed, at positions 4,096 to 8,191 of "
        f"{result(name)['books']} held-out books; 64 sinks, bfloat16."
    )
    return block(["lossless tokens", *numbers(SIZES)], gap(name, memories, SIZES, "{:.0%}"), about, name)


@table
def limit_of_cells() -> str:
    """An item of a list: by how much the cells fall short."""
    found = [row for row in rows("gap-smollm2-135m") if row["memory"].startswith("smollm2")]
    closed = [row["closed"] for row in found]
    fit = [row["control_closed"] / row["closed"] for row in found]
    item = (
        "- **The compressed memory returns no facts that left the window.** It lowers the loss of the text that "
        f"follows, for SmolLM2 by {min(closed):.0%} to {max(closed):.0%} of the gap to full attention, where the "
        f"goals are 45% and 60%. Of this, {min(fit):.0%} to {max(fit):.0%} is a better fit to books and no memory "
        "(`gap-smollm2-135m.json`). [docs/results.md](docs/results.md#goals) lists all goals, met and missed."
    )
    return wrapped(item).replace("\n", "\n  ")


@table
def gap_qwen() -> str:
    name, stored = "gap-qwen2.5-coder-0.5b", "gap-store-qwen2.5-coder-0.5b"
    adapter = "qwen2.5-coder-0.5b-gated_deltanet"
    lines = [
        ("sinks and window, clipped", stored, CLIPPED),
        ("a window longer by the bytes of a state", stored, LONGER),
        ("`qwen2.5-coder-0.5b-deltanet`, no store", name, "qwen2.5-coder-0.5b-deltanet"),
        (f"`{adapter}`, no store", stored, f"{adapter}@none"),
        (f"`{adapter}`, an eighth of the slots stored", stored, f"{adapter}@0.125"),
        (f"`{adapter}`, a quarter (as shipped)", stored, adapter),
        (f"`{adapter}`, half", stored, f"{adapter}@0.5"),
    ]
    body = []
    for label, file, memory in lines:
        row = one(file, memory=memory)
        shares = percent(row.get(key) for key in ("closed_of_clipped", "control_closed_of_clipped"))
        body.append([label, f"{row['loss']:.3f}", *shares])
    found = result(stored)
    about = (
        f"Qwen2.5-Coder-0.5B, positions 8,192 to 16,383 of {found['books']} held-out books, 2,048 lossless tokens: "
        f"loss (nats) and the share of the clipped window's gap that is closed. Full attention: {found['full']:.3f}."
    )
    head = ["", "loss", "closed", "closed with the memory of another book"]
    return block(head, body, about, stored, name)


@table
def gap_stored() -> str:
    name = "gap-store-smollm2-135m-deltanet"
    memories = {
        "sinks and window, clipped": (CLIPPED, "loss"),
        "cells": ("smollm2-135m-deltanet@none", "loss"),
        "cells and a store of three quarters": ("smollm2-135m-deltanet", "loss"),
    }
    found = result(name)
    about = (
        f"SmolLM2-135M: loss of the next token (nats), positions 4,096 to 8,191 of {found['books']} books. Full "
        f"attention: {found['full']:.4f}."
    )
    return block(["lossless tokens", *numbers(SIZES)], gap(name, memories, SIZES, "{:.4f}"), about, name)


def by_position(name: str, memories: dict[str, str], edges: Sequence[int]) -> str:
    found = result(name)
    width = found["bin"]
    body = []
    for label, memory in memories.items():
        losses = one(name, memory=memory)["loss"]
        spans = [losses[low // width : high // width] for low, high in pairwise(edges)]
        full = [
            span if len(span) == (high - low) // width else []
            for span, (low, high) in zip(spans, pairwise(edges), strict=True)
        ]
        body.append([label, *numbers((sum(span) / len(span) if span else None for span in full), "{:.3f}")])
    size = max(row["lossless"] or 0 for row in found["rows"])
    about = (
        f"SmolLM2-135M, {found['texts']} texts of {found['tokens']:,} tokens, {size:,} lossless: mean loss (nats) of "
        "the tokens up to a position, from the one before."
    )
    return block(["position", *numbers(edges[1:])], body, about, name)


@table
def positions_store() -> str:
    memories = {
        "sinks and window": "sinks and window",
        "full attention": "full attention",
        "deltanet": "smollm2-135m-deltanet@none",
        "deltanet and a store of three quarters": "smollm2-135m-deltanet",
    }
    return by_position("positions-smollm2-135m", memories, (0, 1024, 2048, 4096, 8192, 16384, 32768, 65536))


@table
def positions_cells() -> str:
    memories = {
        "sinks and window": "sinks and window",
        "full attention": "full attention",
        "gated_deltanet": "smollm2-135m-gated_deltanet",
        "mamba2": "smollm2-135m-mamba2",
        "deltanet and a store of a quarter (default)": "smollm2-135m-deltanet",
    }
    return by_position("positions-smollm2-135m-cells", memories, (4096, 8192, 16384, 32768, 65536))


@table
def sinks() -> str:
    name = "sinks-smollm2-135m"
    found = result(name)
    names = {"clipped": "clipped (default)", "absolute": "absolute (the paper's)", "none": "no sinks"}
    body = [[label, *numbers(one(name, lossless=512, sinks=kind)["loss"], "{:.2f}")] for kind, label in names.items()]
    about = (
        f"SmolLM2-135M, no memory, 512 lossless tokens, {len(found['books'])} books: mean loss (nats) of the tokens up "
        "to a position, from the one before. The model has 8,192 positions."
    )
    return block(["position", *numbers(found["position_edges"][1:])], body, about, name)


@table
def far() -> str:
    name = "far-smollm2-135m"
    found = result(name)
    edges = found["position_edges"][1:]
    about = "SmolLM2-135M, sinks and window alone, 512 lossless tokens, one book: mean loss (nats) by eighths."
    losses = ["loss", *numbers(one(name, sinks="clipped")["loss"], "{:.2f}")]
    return block(["position", *numbers(edges)], [losses], about, name)


def answers(name: str, tokens: int, memories: dict[str, str], base: str) -> str:
    """Word F1 and the loss of the right answer, of questions whose evidence is behind the window or in it."""
    body, every = [], []
    for label, memory in memories.items():
        both = [one(name, tokens=tokens, memory=memory, group=group) for group in ("behind", "within")]
        every += both
        body.append(
            [label, *numbers((row["f1"] for row in both), "{:.1f}"), *numbers((row["loss"] for row in both), "{:.2f}")]
        )
    asked = {row["group"]: row["questions"] for row in every}
    size = next(row["lossless"] for row in every if row["memory"] == "sinks and window")
    about = (
        f"{base}, SQuAD articles of {tokens:,} tokens, {size:,} lossless: word F1, and loss of the right answer (nats "
        f"a token), of {asked['behind']} questions on text behind the window and {asked['within']} on text in it. "
        f"Standard errors are at most {max(row['f1_se'] for row in every):.1f} points of F1 and "
        f"{max(row['loss_se'] for row in every):.2f} nats."
    )
    return block(["", "F1 behind", "F1 in it", "loss behind", "loss in it"], body, about, name)


@table
def answers_smollm2() -> str:
    memories = {"full attention": "full attention"} | SMALL_MEMORIES
    return answers("qa-smollm2-135m-cells", 8192, memories, "SmolLM2-135M")


@table
def answers_smollm2_long() -> str:
    return answers("qa-smollm2-135m-cells", 16384, SMALL_MEMORIES, "SmolLM2-135M")


@table
def answers_smollm2_large_store() -> str:
    memories = {
        "full attention": "full attention",
        "sinks and window": "sinks and window",
        "deltanet": "smollm2-135m-deltanet@none",
        "deltanet and a store of three quarters": "smollm2-135m-deltanet",
    }
    return answers("qa-smollm2-135m-store", 8192, memories, "SmolLM2-135M")


@table
def answers_qwen() -> str:
    adapter = "qwen2.5-coder-0.5b-gated_deltanet"
    memories = {
        "full attention": "full attention",
        "sinks and window": "sinks and window",
        "gated_deltanet": f"{adapter}@none",
        "gated_deltanet and its store (default)": adapter,
        "gated_deltanet, three quarters stored (not shipped)": "16k gates for three quarters, @0.74",
    }
    return answers("qa-qwen2.5-coder-0.5b", 16384, memories, "Qwen2.5-Coder-0.5B")


SMALL_MEMORIES = {
    "sinks and window": "sinks and window",
    "gated_deltanet": "smollm2-135m-gated_deltanet",
    "mamba2": "smollm2-135m-mamba2",
    "deltanet": "smollm2-135m-deltanet@none",
    "deltanet and its store (default)": "smollm2-135m-deltanet",
}
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
    """One row of facts and the loss on books, for each way to train gates and each share of the store."""
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
    head = ["gates trained for", "used with", *(task.partition("_")[2] for task in tasks), "loss on books"]
    about = "Qwen2.5-Coder-0.5B, 16,384 tokens, 2,048 lossless, n = 200; loss in nats."
    return block(head, body, about, "recall-qwen2.5-coder-0.5b-default", "recall-qwen2.5-coder-0.5b-16k", books)


BUDGETS = {
    "qwen": [f"recall-qwen2.5-coder-0.5b-{part}" for part in ("default", "rules", "curve")],
    "smollm2": ["recall-smollm2-135m", "recall-smollm2-135m-curve"],
}


def by_budget(base: str, sizes: Sequence[int], about: str) -> str:
    """Share found of three tasks, by rule and number of lossless tokens; of several rows the one with most examples."""
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
    about += f" Share found; 48 examples a cell, 200 of some; 95% intervals are at most ± {100 * widest:.0f} points."
    return block(["", "rule", *numbers(sizes)], body, about, *BUDGETS[base])


@table
def budget_qwen() -> str:
    return by_budget("qwen", (512, 1024, 2048, 4096, 8192), "Qwen2.5-Coder-0.5B, 16,384 tokens, by lossless tokens.")


@table
def budget_smollm2() -> str:
    return by_budget("smollm2", (256, 512, 1024, 2048, 4096), "SmolLM2-135M, 8,192 tokens, by lossless tokens.")


@table
def shares() -> str:
    name = "shares-smollm2-135m-cpu"
    labels = {
        CLIPPED: "none, and no cells",
        "smollm2-135m-deltanet@none": "none",
        "smollm2-135m-deltanet@0.125": "an eighth",
        "smollm2-135m-deltanet@0.25": "a quarter",
        "smollm2-135m-deltanet@0.5": "half",
        "smollm2-135m-deltanet@0.74": "three quarters",
    }
    memories = {label: (memory, "loss") for memory, label in labels.items()}
    about = f"SmolLM2-135M, 8,192 tokens: loss of the next token (nats) of {result(name)['books']} books."
    return block(["slots stored", *numbers((1024, 2048))], gap(name, memories, (1024, 2048), "{:.3f}"), about, name)


@table
def labels_or_loss() -> str:
    name = "stores-smollm2-135m-cpu"
    facts_file, squad = result(name)["sources"]
    kl = {row["store"]: row["kl"] for row in result(name)["table"]}
    names = {
        "window": "none",
        "random": "`random`",
        "attention": "`attention`",
        "attention:4": "`attention`, spans of 4",
    }
    names |= {"learned": "`learned`", "learned:4": "`learned`, spans of 4"}
    body = [[label, *numbers((kl[store][facts_file], kl[store][squad]), "{:.3f}")] for store, label in names.items()]
    about = (
        "SmolLM2-135M without cells, 64 of 512 tokens lossless, 90 steps: KL to full attention on the answers (nats)."
    )
    return block(["store", "facts hidden in books", "SQuAD"], body, about, name)


# Printed reports of `ahn report`


def printed(name: str, base: str, suite: str, length: str) -> dict[str, dict[str, tuple[float, int]]]:
    """Of a report as markdown, the table of scores of a suite: score and examples by policy and task."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    text = text[text.index(f"## {base}") :]
    part = re.search(rf"### {suite}, {length}: (?:scores|losses)\n(.*?)(?:\n###|\Z)", text, re.DOTALL)
    assert part, f"{name}.md has no scores of {suite}, {length}"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part[1].splitlines() if line[:1] == "|"]
    head, *body = lines
    if head[0] != "policy":
        turned = [list(column) for column in zip(*lines, strict=True)]
        head, *body = turned
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for policy, *cells in body:
        name_of = re.sub(r" \((?:learned|yarn).*", lambda part: " with store" if "learned" in part[0] else "", policy)
        for label, cell in zip(head[1:], cells, strict=True):
            if number := re.match(r"[\d.]+(?= \[|$)", cell):
                task, count = re.fullmatch(r"(.*?)(?: \(n=(\d+)\))?", label).groups()  # type: ignore[union-attr]
                found.setdefault(name_of, {})[task] = (float(number[0]), int(count or 0))
    return found


def comparison(name: str, base: str, columns: Sequence[str], about: str) -> str:
    parts = [
        (f"RULER, {length} tokens", "ruler", f"{length} tokens", "average")
        for length in ("4,096", "8,192", "16,384", "32,768")
    ]
    for length in ("8,192", "16,384"):
        parts.append((f"pass keys, {length} tokens", "infinitebench", f"{length} tokens", "passkey"))
    for length in ("8,192", "16,384"):
        parts.append((f"SQuAD in context, {length} tokens (F1)", "squad", f"{length} tokens", "spread"))
    parts.append(("multifieldqa_zh (F1)", "longbench", "its own lengths", "multifieldqa_zh"))
    parts.append(("books, 16,384 tokens (loss, nats)", "perplexity", "16,384 tokens", "text"))
    body = []
    for label, suite, length, task in parts:
        if f"### {suite}, {length}: " not in section(name, base):
            continue
        scores = printed(name, base, suite, length)
        count = next((n for tasks in scores.values() for n in (n for _, n in tasks.values()) if n), 0)
        form = "{:.3f}" if suite == "perplexity" else "{:.1f}"
        cells = [scores.get(column, {}).get(task, (None, 0))[0] for column in columns]
        body.append([label, f"{count}", *numbers(cells, form)])
    table_of = markdown(["", "examples of a task", *columns], body)
    return f"{table_of}\n\n{wrapped(f'{about} (H200, bfloat16; `{name}.md`)')}"


def section(name: str, base: str) -> str:
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    return text[text.index(f"## {base}") :].partition("\n## ")[0]


QWEN = "qwen2.5-coder-0.5b-instruct.gguf"


@table
def comparison_qwen() -> str:
    columns = ("full", "window", "compressive-max", "compressive-avg", "ahn-zeroed", "ahn")
    about = (
        "Qwen2.5-Coder-0.5B, `qwen2.5-coder-0.5b-gated_deltanet` without its store, an eighth of the tokens lossless; "
    )
    return comparison("evaluate", QWEN, columns, about + "mean score, 0 to 100. Full attention has YaRN at 32,768.")


@table
def comparison_qwen_store() -> str:
    columns = ("window", "ahn", "ahn with store")
    about = (
        "The same base with its default store, all examples; an eighth of the tokens lossless; mean score, 0 to 100."
    )
    return comparison("evaluate-qwen-store", QWEN, columns, about)


@table
def comparison_smollm2() -> str:
    columns = ("full", "window", "compressive-avg", "ahn", "ahn with store")
    about = (
        "SmolLM2-135M, `smollm2-135m-deltanet`, three quarters of the slots stored, an eighth of the tokens lossless; "
    )
    return comparison("evaluate", "smollm2-135m", columns, about + "mean score. Full attention has YaRN from 8,192 on.")


# Training


@table
def ablations() -> str:
    """The short runs with the control: each form of the memory, its own memory and another book's."""
    name = "ablations-smollm2-135m-control"
    sizes = ("256", "512", "1024")
    body = []
    for row in result(name)["rows"]:
        label = (
            row["name"].replace("maps, room", "feature maps, window gate").replace("features, room", "features, gate")
        )
        label = label.replace(", ce", ", cross-entropy").replace("paper", "the paper's form")
        body.append([label, *percent(row["closed"][size] for size in sizes), f"{row['far_gain']:.3f}"])
        body.append(["memory of another book", *percent(row["control"][size] for size in sizes), ""])
    found = result(name)
    about = (
        f"SmolLM2-135M, 60 steps of 16 rows of 4,096 tokens: share of the gap from the clipped window that is closed, "
        f"{found['books']} held-out books, 64 sinks, by lossless tokens. Last column: nats below the window at "
        f"positions {found['far'] // 2:,} to {found['far'] - 1:,}, 512 lossless, {found['far_texts']} texts. Runs "
        "differ by about two points."
    )
    return block(["", *numbers(map(int, sizes)), "far"], body, about, name)


@table
def where_lost() -> str:
    name = "where-smollm2-135m"
    found = result(name)
    names = {
        "common": "one of the 300 most common",
        "in the window": "seen in the window",
        "further back": "seen only further back",
        "further back, after the same token": "seen only further back, after the same token",
        "new": "new",
    }
    body = []
    for row in found["classes"]:
        shares = numbers((row["tokens"], row["of_gap"]), "{:.1%}")
        losses = numbers((row["full"], row["window"]), "{:.3f}")
        body.append([names[row["class"]], shares[0], *losses, shares[1]])
    about = (
        f"SmolLM2-135M, {found['books']} held-out books, {found['tokens']:,} tokens, {found['lossless']} lossless; "
        "loss in nats."
    )
    return block(["the token to predict", "of all", "full", "window", "of the gap"], body, about, name)


@table
def oracles() -> str:
    name = "where-smollm2-135m"
    names = {
        "mass": "their exact weight in the softmax, no content",
        "mean": "their exact weight, the mean of their values",
        "smooth": "their exact weight, values averaged at twice the temperature",
        "top 4": "the 4 of them with the highest scores, exactly",
        "top 16": "the 16 with the highest scores",
        "top 64": "the 64 with the highest scores",
    }
    found = result(name)
    body = [["nothing: the window alone", f"{found['window']:.3f}", "0%"]]
    body += [[names[row["oracle"]], f"{row['loss']:.3f}", f"{row['closed']:.0%}"] for row in found["oracles"]]
    return block(["instead of the evicted tokens", "loss", "closed"], body, "As above.", name)


# Recall

ASKED = "qa-qwen2.5-coder-1.5b"
BEHIND = {
    "window": "window alone",
    "ahn": "window, store and cell",
    "full": "full attention",
    "rag-random": "passages at random, no memory",
    "rag": "`rag`: passages by BM25, no memory",
    "recall": "recall: passages by `fused`",
    "rag-true": "the true passages first, no memory",
}
FORMS = {
    "passages": {"policy": "recall", "context": "passages", "question": None},
    "memory, passages": {"policy": "recall", "context": "memory and passages", "question": None},
    "question, passages": {"policy": "recall", "context": "passages", "question": "in front and behind"},
    "memory, question, passages": {
        "policy": "recall", "context": "memory and passages", "question": "in front and behind",
    },
}  # fmt: skip


WAYS = {"window": "window", "ahn": "memory", "recall": "recall", "full": "full attention", "rag": "rag"}
TITLES = {name.lower(): name for name in ("SQuAD", "FairytaleQA", "MuSiQue", "HotpotQA", "QMSum")}


def question_scores() -> dict[str, dict[str, Row]]:
    """Of each set of ordinary questions that recall was asked, a row by way of answering, in texts of 16,384 tokens."""
    sets: dict[str, dict[str, Row]] = {}
    for row in rows(ASKED):
        if row["policy"] in WAYS and row["length"] == 16_384 and "of" not in row:
            task = row["task"].partition("/")[2]
            sets.setdefault(TITLES.get(task, task), {}).setdefault(WAYS[row["policy"]], row)
    return {task: ways for task, ways in sets.items() if task in SET_GOALS and "recall" in ways}


@table
def picture() -> str:
    """The caption of docs/answers.svg."""
    sets = question_scores()
    counts = ", ".join(f"{ways['recall']['n']}" for ways in sets.values())
    facts = "recall-qwen2.5-coder-0.5b-default"
    return wrapped(
        f"Left: word F1 of Qwen2.5-Coder-1.5B on {', '.join(sets)} ({counts} questions, "
        f"evidence anywhere in the text; {source(ASKED)[1:]}. Right: Qwen2.5-Coder-0.5B with its default memory, 100 "
        f"to 200 examples a task ({source(facts)[1:]}. All texts have 16,384 tokens, of which 2,048 are kept exactly; "
        "recall reads 512 again. Lines are 95% intervals, where the file has them."
    )


SET_GOALS = {"SQuAD": (1.15, 5), "FairytaleQA": (1.15, 0), "MuSiQue": (1, 0), "HotpotQA": (1, 0)}


@table
def goals_recall() -> str:
    """Goals of recall, of questions whose evidence is behind the window where there are any."""
    name = ASKED
    found = {(row["task"], row["policy"]): row for row in reversed(rows(name)) if row["length"] == 16_384}

    def score(task: str, policy: str, group: str = "behind") -> float:
        row = found[f"qa/{task.lower()}", policy]
        return float((row.get(group) or row)["score"])

    body = []
    for task, (times, points) in SET_GOALS.items():
        recall, full, rag = (score(task, policy) for policy in ("recall", "full", "rag"))
        body.append(at_least(f"{task}: F1, times that of full attention", times, recall / full, "{:.2f}", "H200"))
        body.append(at_least(f"{task}: F1, points above `rag`", points, recall - rag, "{:.1f}", "H200"))
    squad, same = found["qa/squad", "recall"], result(name)["qmsum_questions_that_recall_answered"]
    longer = {row["length"]: row["score"] for row in reversed(rows(name)) if row["policy"] == "recall"}
    short = result(name)["the_same_questions_in_16384_tokens"]["score"]
    window = {
        task: score(task, "recall", "within") - score(task, "window", "within") for task in SET_GOALS if task[0] in "SF"
    }
    by_policy = {(row["task"], row["policy"]): row["score"] for row in rows("ruler-qwen2.5-coder-1.5b")}
    needles = {
        task: score - by_policy[task, "ahn"] for (task, policy), score in by_policy.items() if policy == "recall"
    }
    body += [
        at_least("SQuAD: evidence among 512 tokens, %", 93, squad["found"]["512"], "{:.1f}", "H200"),
        at_least("SQuAD: the third with fewest shared words, %", 80, squad["lowest_third"]["found"], "{:.1f}", "H200"),
        *(
            at_least(f"SQuAD in {length:,} tokens, of F1 in 16,384", 0.9, longer[length] / short, "{:.3f}", "H200")
            for length in (131_072, 1_048_576)
        ),
        *(
            at_least(f"{task} within the window: points above it", -1, points, "{:.1f}", "H200")
            for task, points in window.items()
        ),
        at_least(
            "QMSum: points above the memory without recall", -1, same["recall"] - same["ahn"], "{:.1f}", "H200"
        ),
        at_least("needles: points above the store", 0, mean(needles.values()), "{:.1f}", "H200"),
    ]  # fmt: skip
    small, large = (result(f"find-cpu-{part}")["finding"]["fused"] for part in ("finding", "1.5b-shape"))
    gpu, ratio = result("find-h200"), result("find-cpu-reading")["reading"]["keys_cpu_s_ratio"]
    bytes_of = gpu["asking"]["keys"]["plain_bytes"] / gpu["asking"]["none"]["plain_bytes"]
    body += [
        at_most("passages in a million tokens, s", 0.05, gpu["finding"]["fused"]["later_s"], "{:.2f}", "H200"),
        at_most("the same, SmolLM2, s", 0.25, small["later_cpu_s"], "{:.2f}", "2 CPU cores"),
        at_most("the same, 9 layers of the 1.5B's shape, s", 0.25, large["later_cpu_s"], "{:.2f}", "2 CPU cores"),
        at_most("bytes while asking without recall, of those without an archive", 1, bytes_of, "{:.2f}", "H200"),
        at_most("reading with keys kept, times as long", 1.03, gpu["reading"]["keys_ratio"], "{:.2f}", "H200"),
        at_most("the same", 1.05, ratio, "{:.2f}", "2 CPU cores"),
    ]
    files = ", ".join(
        f"`{part}.json`" for part in (name, "find-h200", "find-cpu-finding", "find-cpu-1.5b-shape", "find-cpu-reading")
    )
    counts = ", ".join(f"{found[f'qa/{task.lower()}', 'recall'].get('behind', {}).get('n')}" for task in SET_GOALS)
    about = (
        f"Qwen2.5-Coder-1.5B. F1 of {counts} questions whose evidence is behind the window, where the goals ask for at "
        f"least 200 (MuSiQue and HotpotQA have 98 and 90 that fit). Within the window are 31 questions of each set, of "
        f"QMSum {same['n']} questions were asked both ways, of the longer texts 120, of {len(needles)} kinds of needles"
        " 7 to 12. The rows of longer texts, QMSum and needles are of the shipped adapter, the others of its retrieval "
        "heads alone. Seconds on a CPU are of all threads, because other work used the cores; a CPU read 512 tokens. "
        f"({files})"
    )
    return f"{markdown(['goal', 'device', 'limit', 'measured', ''], body)}\n\n{wrapped(about)}"


@table
def recall_behind() -> str:
    """By way of answering: F1 of questions whose evidence is behind the window."""
    found = {(row["task"], row["policy"]): row for row in reversed(rows(ASKED)) if row["length"] == 16_384}
    body = []
    for policy, label in BEHIND.items():
        cells = [found.get((f"qa/{task.lower()}", policy), {}).get("behind") for task in SET_GOALS]
        body.append([label, *(f"{cell['score']:.1f}" if cell else "" for cell in cells)])
    counts = [found[f"qa/{task.lower()}", "recall"]["behind"]["n"] for task in SET_GOALS]
    widths = [row["behind"]["interval_95"] for row in found.values() if "behind" in row and row["policy"] in BEHIND]
    about = (
        f"Qwen2.5-Coder-1.5B, texts of 16,384 tokens, 2,048 lossless, 512 tokens of passages; word F1 of "
        f"{', '.join(map(str, counts))} questions. 95% intervals are at most "
        f"± {max(high - low for low, high in widths) / 2:.0f} points, on SQuAD ± 6."
    )
    return block(["", *SET_GOALS], body, about, ASKED)


@table
def recall_evidence() -> str:
    """How much of the evidence behind the window is found."""
    every = [row for row in rows(ASKED) if row["length"] == 16_384 and "found" in row and "question" not in row]
    body = []
    for task in SET_GOALS:
        for policy, finder in (("rag", "bm25"), ("recall", "fused"), ("recall", "heads")):
            row = next(
                row for row in every
                if (row["task"], row["policy"], row["finder"]) == (f"qa/{task.lower()}", policy, finder)
                and row["rounds"] == 1
            )  # fmt: skip
            shares = [f"{row['found'][budget]:.1f}" for budget in ("256", "512", "1024")]
            body.append([task, f"`{finder}`", *shares, f"{row['lowest_third']['found']:.1f}"])
    head = ["", "finder", "256 tokens", "512 tokens", "1,024 tokens", "512 tokens, fewest shared words"]
    about = (
        "Qwen2.5-Coder-1.5B, texts of 16,384 tokens: evidence behind the window that is among the passages, %. Fewest "
        "shared words: the third of the questions that share the fewest with their passage."
    )
    return block(head, body, about, ASKED)


@table
def recall_forms() -> str:
    """What stands in front of the question."""
    body = []
    for label, wanted in FORMS.items():
        cells = []
        for task in SET_GOALS:
            row = next(
                row for row in rows(ASKED)
                if row["length"] == 16_384 and row["task"] == f"qa/{task.lower()}" and "of" not in row
                and {"finder": "fused", "rounds": 1} | wanted
                == {key: row.get(key) for key in ("finder", "rounds", *wanted)}
            )  # fmt: skip
            cells.append(f"{row['score']:.1f}")
        body.append([label, *cells])
    about = (
        "As above, without a trained memory; word F1 of 240, 240, 98 and 90 questions, evidence anywhere in the text."
    )
    return block(["in front of the question", *SET_GOALS], body, about, ASKED)


@table
def support_errors() -> str:
    """What a calibration refuses and what it lets pass."""
    name = "support-qwen2.5-coder-1.5b"
    (chosen,) = (one for one in result(name)["candidates"] if one["chosen"])
    body = []
    for task in ("squad", "fairytaleqa", "musique"):
        kept, absent = (chosen["report"].get(f"qa/{task}{end}") for end in ("", "-absent"))
        body.append(
            [
                TITLES[task], f"{kept['questions']}", f"{kept['refused']:.1f}", f"{kept['refused_with_evidence']:.1f}",
                f"{absent['questions']}" if absent else "", f"{absent['answered']:.1f}" if absent else "",
            ]
        )  # fmt: skip
    head = ["", "with an answer", "refused, %", "refused though found, %", "without an answer", "answered, %"]
    about = (
        "Qwen2.5-Coder-1.5B with its adapter, texts of 16,384 tokens; the threshold was chosen on 150 questions with "
        "and 150 without an answer in articles of SQuAD's training part, and on 26 of QMSum. Refused though found: of "
        "the questions whose evidence was read again. Some fairy-tale questions without an answer fit the other tale."
    )
    return block(head, body, about, name)


@table
def ruler_15b() -> str:
    name = "ruler-qwen2.5-coder-1.5b"
    found = {(row["task"], row["policy"]): row for row in rows(name)}
    body = []
    for task in dict.fromkeys(task for task, _ in found):
        memory, recall = found.get((task, "ahn")), found.get((task, "recall"))
        body.append(
            [
                f"`{task}`",
                f"{memory['score']:.0f}",
                f"{recall['score']:.0f}" if recall else "",
                f"{(recall or memory)['n']}",
            ]
        )
    about = (
        "Qwen2.5-Coder-1.5B with its adapter, texts of 16,384 tokens, 2,048 lossless, 496 of them stored: mean score. "
        "The machine's time ended before recall was through."
    )
    return block(["", "memory with store", "recall", "examples"], body, about, name)


@table
def finding() -> str:
    name, large = "find-cpu-finding", "find-cpu-1.5b-shape"
    body = []
    for finder in ("bm25", "heads", "fused"):
        cells = [f"{result(name)['finding'][finder]['first_cpu_s']:.1f}"]
        cells += [f"{1000 * result(file)['finding'][finder]['later_cpu_s']:.0f}" for file in (name, large)]
        body.append([f"`{finder}`", *cells])
    about = (
        f"{result(name)['tokens']:,} tokens, {result(name)['bytes_per_token']:.0f} bytes of keys a token; seconds of "
        "all threads together, because other work used the cores."
    )
    head = ["", "first question of a process, s", "each further one, ms", "the same, 9 layers of the 1.5B's shape, ms"]
    return block(head, body, about, name, large)


# Goals


FOUND = {"single_1": 0.9, "single_2": 0.9, "single_3": 0.9, "multikey_1": 0.6, "multivalue": 0.6, "multiquery": 0.6}


@table
def goals_memory() -> str:
    files = "gap-smollm2-135m", "gap-store-qwen2.5-coder-0.5b", "gap-store-smollm2-135m-deltanet"
    small, books, stored = files
    default = "qwen2.5-coder-0.5b-gated_deltanet"
    found = recalled(result("recall-qwen2.5-coder-0.5b-default"))
    asked = {(row["memory"], row["group"]): row["f1"] for row in rows("qa-qwen2.5-coder-0.5b")}
    least, most = asked["sinks and window", "behind"], asked["full attention", "behind"]

    def closed(cell: str, size: int) -> float:
        return float(one(small, memory=f"smollm2-135m-{cell}", lossless=size)["closed"])

    def of_full(task: str) -> float:
        return float(found[f"ruler/niah_{task}", "ahn", 4]["score"] / found[f"ruler/niah_{task}", "full", 0]["score"])

    def extra(name: str, memory: str) -> float:
        with_store, without = (one(name, memory=m, lossless=2048)["loss"] for m in (memory, f"{memory}@none"))
        return float(with_store - without)

    share = (asked[default, "behind"] - least) / (most - least)
    body = []
    for cell, size, limit in (
        ("deltanet", 512, 0.6),
        ("deltanet", 1024, 0.6),
        (SMALL[1], 512, 0.45),
        (SMALL[2], 512, 0.45),
    ):
        body.append(at_least(f"gap closed, {cell}, {size:,} lossless", limit, closed(cell, size), "{:.0%}", "SmolLM2"))
    body.append(at_least("gap closed", 0.6, one(books, memory=default)["closed"], "{:.0%}", "Qwen 0.5B"))
    for task, limit in FOUND.items():
        body.append(at_least(f"found, of full attention's: {task}", limit, of_full(task), "{:.0%}", "Qwen 0.5B"))
    body += [
        at_least("SQuAD behind the window: gap in F1 closed by the store", 0.6, share, "{:.0%}", "Qwen 0.5B"),
        at_most("loss on books, with the store less without", 0, extra(books, default), "{:.3f}", "Qwen 0.5B"),
        at_most("the same, three quarters stored", 0, extra(stored, "smollm2-135m-deltanet"), "{:.3f}", "SmolLM2"),
    ]
    about = "Files: the tables below and in store.md name them."
    return f"{markdown(['goal', 'base', 'limit', 'measured', ''], body)}\n\n{about}"
