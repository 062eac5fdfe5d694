"""Tables from printed reports of `ahn report`: the comparison of results.md."""

from __future__ import annotations

import re
from collections.abc import Sequence

from common import RESULTS
from pages.tables import markdown, numbers, table, wrapped


def printed(name: str, base: str, suite: str, length: str) -> dict[str, dict[str, tuple[float, int]]]:
    """The table of a suite's scores in a report as markdown: score and examples, by policy and task."""
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
    about += outside(name, base)
    table_of = markdown(["", "examples of a task", *columns], body)
    return f"{table_of}\n\n{wrapped(f'{about} (H200, bfloat16; `{name}.md`)')}"


def section(name: str, base: str) -> str:
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    return text[text.index(f"## {base}") :].partition("\n## ")[0]


def outside(name: str, base: str) -> str:
    """A sentence on the examples whose evidence has left the window: points above the window, by policy."""
    lines = re.findall(
        r"^\| (.+?) \|.*?\| ([+-][\d.]+(?: \[.*?\])?).*?\| (\d+) in \d+ \|$", section(name, base), re.MULTILINE
    )
    stores = r"\(learned store of ([\d,]+) in spans of 4\)"
    named = [(re.sub(stores, r"with \1 slots stored", policy), points, count) for policy, points, count in lines]
    parts = [f"{policy} {points} ({count})" for policy, points, count in named]
    return f" Points above the window where the evidence has left it (examples): {', '.join(parts)}."


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
