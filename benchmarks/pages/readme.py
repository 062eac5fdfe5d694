"""The table and the sentences of README.md on what to choose and what reading costs."""

from __future__ import annotations

from pages.speed import WIDE, newest, shape
from pages.tables import block, one, recalled, result, table, wrapped


@table
def choose() -> str:
    """Facts found and bytes kept by each way to read. One result file has them all."""
    name = "recall-qwen2.5-coder-0.5b-default"
    by = recalled(result(name))
    needles = [task for task, policy, span in by if (policy, span) == ("ahn", 4) and task != "squad/spread"]
    ways = {
        "window": (("window", 0), "what matters is at the end: logs, chat"),
        "cell": (("ahn", 0), "long prose: the next word gets more predictable, facts do not come back"),
        "store": (("ahn", 4), "numbers, names and codes from anywhere in the text"),
        "full attention": (("full", 0), "the text fits the model and the memory"),
    }
    body = []
    for label, (key, when) in ways.items():
        found = sum(by[task, *key]["score"] for task in needles) / len(needles)
        body.append([label, when, f"{found:.0%}", f"{by[needles[0], *key]['cache_bytes'] / 2**20:.0f}"])
    recalled_when = "ordinary questions; beside any of these, with 4 bytes a token on disk"
    body.insert(3, ["recall", recalled_when, "", "as without it"])
    shown = [by[task, *key] for task in needles for key, _ in ways.values()]
    counts = [row["n"] for row in shown]
    widest = max(row["high"] - row["low"] for row in shown) / 2
    about = (
        f"Qwen2.5-Coder-0.5B, 16,384 tokens, 2,048 of them lossless: mean of {len(needles)} tasks with needles, "
        f"{min(counts)} to {max(counts)} examples each, 95% intervals at most ± {100 * widest:.0f} points."
    )
    return block(["", "when", "needles found", "cache, MiB"], body, about, name)


@table
def speed() -> str:
    """The cost of reading, in sentences."""
    cell, full = (one("cpu", kind=kind, length=16384) for kind in ("deltanet", "full"))
    base = "qwen2.5-3b"
    gpu = {
        (kind, what): newest(WIDE["H200"], **shape(base, kind, what)) or {}
        for kind in ("gated_deltanet", "full")
        for what in ("read", "decode")
    }
    read_s = [gpu[kind, "read"]["prefill_s"] for kind in ("gated_deltanet", "full")]
    decode_ms = [gpu[kind, "decode"]["decode_ms"] for kind in ("gated_deltanet", "full")]
    return wrapped(
        f"On two CPU cores SmolLM2-135M reads 16,384 tokens at {cell['read_tokens_per_s']:.0f} tokens/s and decodes a "
        f"token in {cell['decode_ms']:.0f} ms, with a cache of {cell['cache_mib']:.0f} MiB; full attention at "
        f"{full['read_tokens_per_s']:.0f} tokens/s and in {full['decode_ms']:.0f} ms, with {full['cache_mib']:.0f} MiB "
        f"(`cpu.json`). On an H200 Qwen2.5-3B's shape reads 131,072 tokens in {read_s[0]:.1f} s and decodes a token in "
        f"{decode_ms[0]:.1f} ms; full attention takes {read_s[1]:.1f} s and {decode_ms[1]:.0f} ms (`gpu-h200-3b.json`)."
    )
