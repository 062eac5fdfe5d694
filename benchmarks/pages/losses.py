"""Tables of the loss on books: results.md, store.md, training.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pages.tables import block, numbers, one, percent, result, rows, table, wrapped

WINDOW, CLIPPED, LONGER = "sinks and window, absolute", "sinks and window, clipped", "a longer window, clipped"
SMALL = ("deltanet", "gated_deltanet", "mamba2")
SIZES = (256, 512, 1024, 2048)


def gap(name: str, memories: dict[str, tuple[str, str]], sizes: Sequence[int], form: str) -> list[list[str]]:
    """A line for each label, with the value of (memory, key) at each number of lossless tokens. A longer window stands
    in the column of the window that it is compared with."""
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
    """An item of the README's list of limits: by how much the cells miss their goals."""
    found = [row for row in rows("gap-smollm2-135m") if row["memory"].startswith("smollm2")]
    closed = [row["closed"] for row in found]
    fit = [row["control_closed"] / row["closed"] for row in found]
    item = (
        "- **The compressed memory returns no facts that left the window.** It lowers the loss of the text that "
        f"follows, for SmolLM2 by {min(closed):.0%} to {max(closed):.0%} of the gap to full attention, where the "
        f"goals are 45% and 60%. Of this, {min(fit):.0%} to {max(fit):.0%} is a better fit to books and no memory "
        "(`gap-smollm2-135m.json`). [docs/results.md](docs/results.md#goals) lists all goals, met and missed."
    )
    return wrapped(item, indent="  ")


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
    body: list[list[str]] = []
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
    window, store = body[0], body[-1]
    more = [float(mine) - float(its) for mine, its in zip(store[2:], window[2:], strict=True)]
    about += f" Beyond {edges[1]:,} tokens a store loses {min(more):.2f} to {max(more):.2f} nats against the window."
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


@table
def ablations() -> str:
    """The short runs: each form of the memory, with its own memory and with the control, the memory of another book."""
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
