"""Tables of time and memory, and of the goals: performance.md, results.md, README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pages.tables import (
    Row,
    at_least,
    at_most,
    block,
    markdown,
    numbers,
    one,
    recalled,
    result,
    rows,
    table,
    wrapped,
)

CELLS = ("gated_deltanet", "deltanet", "mamba2")
KINDS = {"full": "full attention", "window": "sinks and window"} | {cell: f"+ {cell}" for cell in CELLS}
STORE = "gated_deltanet+learned"
WIDE = {
    "H100": ("gpu-h100-3b", "gpu-h100-large", "gpu-h100-0.5b"),
    "H200": ("gpu-h200-3b", "gpu-h200-large", "gpu-h200-0.5b"),
}
NARROW = {"H100": ("gpu-h100-narrow",), "H200": ("gpu-h200-narrow",)}


@table
def cpu_lengths() -> str:
    name = "cpu"
    head = ["", "tokens", "read, tokens/s", "decode, ms a token", "peak, MiB", "cache, MiB"]
    keys = ("length", "read_tokens_per_s", "decode_ms", "peak_mib", "cache_mib")
    body = [[KINDS[row["kind"]], *numbers(row[key] for key in keys)] for kind in KINDS for row in rows(name, kind=kind)]
    about = "SmolLM2-135M, float32, 512 lossless tokens, one run. Other tests ran beside full attention at 65,536."
    return block(head, body, about, name)


@table
def cpu_dtypes() -> str:
    name = "cpu-dtypes"
    head = ["", "weights", "read, tokens/s", "decode, ms a token", "peak, MiB", "cache, MiB"]
    keys = ("read_tokens_per_s", "decode_ms", "peak_mib", "cache_mib")
    body = [[KINDS[row["kind"]], row["dtype"], *numbers(row[key] for key in keys)] for row in rows(name)]
    about = "SmolLM2-135M, 4,096 tokens, 512 lossless, one run, on a processor that multiplies bfloat16 (AVX512-BF16)."
    return block(head, body, about, name)


@table
def cpu_load() -> str:
    name = "load-cpu-2threads"
    head = ["lossless tokens", "load, s", "to the first token, s", "file, MB"]
    body = [
        [f"{row['lossless']:,}", *numbers((row["load_s"], row["first_token_s"]), "{:.2f}"), f"{row['file_mb']:.0f}"]
        for row in rows(name)
    ]
    return block(head, body, "SmolLM2-135M, a memory of 1,048,576 tokens from its file.", name)


@table
def lengths() -> str:
    name = "lengths-smollm2-135m-h200"
    head = ["", "tokens", "read, s", "decode, ms a token", "peak, MiB", "cache, MiB"]
    body = []
    for kind in ("full", "window", "deltanet"):
        for row in rows(name, kind=kind):
            if row["length"] >= 16384:
                times = [f"{row['read_s']:.2f}", f"{row['decode_ms']:.1f}"]
                body.append([KINDS[kind], f"{row['length']:,}", *times, *numbers((row["peak_mib"], row["cache_mib"]))])
    about = "SmolLM2-135M, batch 1, 2,048 lossless tokens; full attention is transformers' own, with its default cache."
    return block(head, body, about, name)


def newest(files: Sequence[str], **wanted: Any) -> Row | None:
    """The last row of the first of these files that has one."""
    return next((found[-1] for name in files if (found := rows(name, **wanted))), None)


class Line(NamedTuple):
    """A line of a table of GPU times: the row of each device, and the key that is shown."""

    label: str
    wanted: Row
    key: str
    scale: float = 1


def devices(lines: Sequence[Line], files: dict[str, tuple[str, ...]], form: str, floor: str, about: str) -> str:
    body = []
    for label, wanted, key, scale in lines:
        found = [newest(files[device], **wanted) for device in files]
        cells = numbers((row and row.get(key) and scale * row[key] for row in found), form)
        cells += numbers((row and row.get(floor) for row in found), form)
        body.append([label, *cells])
    unit = "ms" if floor == "floor_ms" else "s"
    head = ["", *(f"{device}, {unit}" for device in files), *(f"floor {device}, {unit}" for device in files)]
    names = [name for device in files for name in files[device]]
    used = ", ".join(f"`{name}.json`" for name in names)
    dates = sorted(result(name)["environment"]["date"][:10] for name in names)
    return f"{markdown(head, body)}\n\n{wrapped(f'{about} ({dates[0]} to {dates[-1]}; {used})')}"


def shape(name: str, cell: str, what: str, length: int = 131072, batch: int = 1) -> Row:
    return {"shape": name, "cell": cell, "what": what, "length": length, "batch": batch}


@table
def decode() -> str:
    base = "qwen2.5-3b"
    lines = [
        Line("3B", shape(base, "gated_deltanet", "decode"), "decode_ms"),
        Line("3B, through `ahn.generate`", shape(base, "gated_deltanet", "decode"), "generate_ms"),
        Line("3B, with a store", shape(base, STORE, "decode"), "decode_ms"),
        Line("3B, deltanet", shape(base, "deltanet", "decode"), "decode_ms"),
        Line("3B, mamba2", shape(base, "mamba2", "decode"), "decode_ms"),
        Line("3B, behind 16,384", shape(base, "gated_deltanet", "decode", 16384), "decode_ms"),
        Line("3B, behind 1,048,576", shape(base, "gated_deltanet", "decode", 1048576), "decode_ms"),
        Line("3B, batch 8", shape(base, "gated_deltanet", "decode", batch=8), "decode_ms"),
        Line("3B, batch 32", shape(base, "gated_deltanet", "decode", batch=32), "decode_ms"),
        Line("3B, full attention", shape(base, "full", "decode"), "decode_ms"),
        Line("7B", shape("qwen2.5-7b", "gated_deltanet", "decode"), "decode_ms"),
        Line("7B, deltanet", shape("qwen2.5-7b", "deltanet", "decode"), "decode_ms"),
        Line("7B, mamba2", shape("qwen2.5-7b", "mamba2", "decode"), "decode_ms"),
        Line("7B, batch 8", shape("qwen2.5-7b", "gated_deltanet", "decode", batch=8), "decode_ms"),
        Line("7B, full attention", shape("qwen2.5-7b", "full", "decode"), "decode_ms"),
        Line("14B", shape("qwen2.5-14b", "gated_deltanet", "decode"), "decode_ms"),
        Line("14B, deltanet", shape("qwen2.5-14b", "deltanet", "decode"), "decode_ms"),
        Line("14B, mamba2", shape("qwen2.5-14b", "mamba2", "decode"), "decode_ms"),
        Line("0.5B", shape("qwen2.5-coder-0.5b", "gated_deltanet", "decode"), "decode_ms"),
        Line("0.5B, with a store", shape("qwen2.5-coder-0.5b", STORE, "decode"), "decode_ms"),
    ]
    about = (
        "Time of a token behind 131,072 tokens if no other number is said; shapes of Qwen2.5 with random weights, "
        "32,768 lossless tokens, bfloat16, batch 1, gated_deltanet, a store of 24,154 slots; full attention is sdpa "
        "with the default cache."
    )
    return devices(lines, WIDE, "{:.2f}", "floor_ms", about)


@table
def read() -> str:
    base, small = "qwen2.5-3b", "qwen2.5-coder-0.5b"
    lines = [
        Line("3B, 65,536 tokens", shape(base, "gated_deltanet", "read", 65536), "prefill_s"),
        Line("3B", shape(base, "gated_deltanet", "read"), "prefill_s"),
        Line("3B, 1,048,576 tokens", shape(base, "gated_deltanet", "read", 1048576), "prefill_s"),
        Line("3B, with a store", shape(base, STORE, "read"), "prefill_s"),
        Line("3B, deltanet", shape(base, "deltanet", "read"), "prefill_s"),
        Line("3B, mamba2", shape(base, "mamba2", "read"), "prefill_s"),
        Line("3B, full attention, 65,536 tokens", shape(base, "full", "read", 65536), "prefill_s"),
        Line("3B, full attention", shape(base, "full", "read"), "prefill_s"),
        Line("7B", shape("qwen2.5-7b", "gated_deltanet", "read"), "prefill_s"),
        Line("7B, deltanet", shape("qwen2.5-7b", "deltanet", "read"), "prefill_s"),
        Line("7B, mamba2", shape("qwen2.5-7b", "mamba2", "read"), "prefill_s"),
        Line("7B, full attention", shape("qwen2.5-7b", "full", "read"), "prefill_s"),
        Line("14B", shape("qwen2.5-14b", "gated_deltanet", "read"), "prefill_s"),
        Line("14B, deltanet", shape("qwen2.5-14b", "deltanet", "read"), "prefill_s"),
        Line("14B, mamba2", shape("qwen2.5-14b", "mamba2", "read"), "prefill_s"),
        Line("0.5B", shape(small, "gated_deltanet", "read"), "prefill_s"),
        Line("0.5B, with a store", shape(small, STORE, "read"), "prefill_s"),
        Line("0.5B, 16,384 tokens", shape(small, "gated_deltanet", "read", 16384), "prefill_s"),
        Line("0.5B, 16,384 tokens, with a store", shape(small, STORE, "read", 16384), "prefill_s"),
    ]
    about = (
        "Time to read 131,072 tokens if no other number is said; settings as above. The store's gates are untrained."
    )
    return devices(lines, WIDE, "{:.2f}", "floor_s", about)


@table
def read_narrow() -> str:
    small = "qwen2.5-coder-0.5b"
    lines = [
        Line("16,384 tokens", shape(small, "gated_deltanet", "read", 16384), "prefill_s"),
        Line("16,384 tokens, with a store", shape(small, STORE, "read", 16384), "prefill_s"),
        Line("131,072 tokens", shape(small, "gated_deltanet", "read"), "prefill_s"),
        Line("131,072 tokens, with a store", shape(small, STORE, "read"), "prefill_s"),
    ]
    about = "Time to read with 2,048 lossless tokens and a store of 1,421 slots; shape of Qwen2.5-Coder-0.5B, as above."
    return devices(lines, NARROW, "{:.3f}", "floor_s", about)


@table
def starting() -> str:
    base = shape("qwen2.5-3b", "gated_deltanet", "load", 1048576)
    decoded = shape("qwen2.5-3b", "gated_deltanet", "decode")
    lines = [
        ("load a memory of 1,048,576 tokens, s", base, "load_s", 1.0, "{:.2f}"),
        ("the same, to the first token, s", base, "first_token_s", 1.0, "{:.2f}"),
        ("the same, first time in a process, s", base, "first_s", 1.0, "{:.2f}"),
        ("its file, GB", base, "file_mb", 0.001, "{:.2f}"),
        ("first token of an answer to a question of 2 tokens, ms", decoded, "answer_begins_ms", 1.0, "{:.0f}"),
        ("first step of decoding, s", decoded, "first_s", 1.0, "{:.1f}"),
        (
            "peak while reading 131,072 tokens, GiB",
            shape("qwen2.5-3b", "gated_deltanet", "read"),
            "peak_gib",
            1.0,
            "{:.2f}",
        ),
        (
            "peak while reading 1,048,576 tokens, GiB",
            shape("qwen2.5-3b", "gated_deltanet", "read", 1048576),
            "peak_gib",
            1.0,
            "{:.2f}",
        ),
        ("cache, GiB", shape("qwen2.5-3b", "gated_deltanet", "read"), "cache_gib", 1.0, "{:.2f}"),
    ]
    body = []
    for label, wanted, key, scale, form in lines:
        found = [newest(files, **wanted) for files in WIDE.values()]
        body.append([label, *numbers((row and row.get(key) and scale * row[key] for row in found), form)])
    about = (
        "Shape of Qwen2.5-3B, settings as above; other jobs ran on the hosts. (`gpu-h100-3b.json`, `gpu-h200-3b.json`)"
    )
    return f"{markdown(['', *WIDE], body)}\n\n{wrapped(about)}"


@table
def with_weights() -> str:
    name = "gpu-h200-real"
    body = [
        [f"{row['length']:,}", *numbers((row["tokens_per_s"], row["answer_tokens_per_s"])), f"{row['peak_gib']:.2f}"]
        for row in rows(name, what="ask")
    ]
    about = (
        "Qwen2.5-Coder-0.5B with its weights through the functions behind `ahn read` and `ahn ask`, 32,768 lossless."
    )
    return block(["tokens", "read, tokens/s", "answer, tokens/s", "peak, GiB"], body, about, name)


TRAINED = {
    "train-smollm2-135m-h100": "SmolLM2-135M, deltanet, 16 x 4,096",
    "train-smollm2-135m-h200": "SmolLM2-135M, deltanet, 16 x 4,096",
    "train-smollm2-135m-mamba2": "SmolLM2-135M, mamba2, 16 x 4,096",
    "train-smollm2-135m-2gpu": "SmolLM2-135M, deltanet, DDP, two GPUs",
    "train-smollm2-135m-fsdp": "SmolLM2-135M, deltanet, FSDP2, two GPUs",
    "train-qwen2.5-coder-0.5b-deltanet": "Qwen2.5-Coder-0.5B, deltanet, 4 x 8,192",
    "train-qwen2.5-coder-0.5b-gated_deltanet": "Qwen2.5-Coder-0.5B, gated_deltanet, 4 x 8,192",
}


@table
def training_speed() -> str:
    body = []
    for name, label in TRAINED.items():
        found = result(name)
        device = "H100" if "H100" in found["environment"]["device"] else "H200"
        cells = [f"{found['tokens_per_s']:,.0f}", f"{found['of_floor']:.1%}", f"{found['peak_gib']:.1f}"]
        body.append([label, device, *cells, f"`{name}.json`"])
    about = (
        "Rows x tokens a step and GPU, one run each, other jobs on the hosts except on the H100. The floor is the time "
        "of the step's matrix products alone. Two GPUs: tokens/s of both, the rest of one."
    )
    head = ["", "device", "tokens/s", "of the floor", "peak, GiB", "file"]
    return f"{markdown(head, body)}\n\n{wrapped(about)}"


# Goals


def ratio(files: Sequence[str], what: str, key: str, **wanted: Any) -> float:
    """How much longer the newest row with a store took than the newest row without one, of the same commit if
    there is one."""
    stored = newest(files, cell=STORE, what=what, **wanted)
    assert stored
    plain = newest(files, cell="gated_deltanet", what=what, commit=stored.get("commit"), **wanted)
    plain = plain or newest(files, cell="gated_deltanet", what=what, **wanted)
    assert plain
    return float(stored[key] / plain[key])


@table
def goals_speed() -> str:
    h100, h200 = WIDE["H100"], WIDE["H200"]
    k, three, half = 131072, {"shape": "qwen2.5-3b", "batch": 1}, {"shape": "qwen2.5-coder-0.5b", "batch": 1}

    def of(files: Sequence[str], what: str, key: str, length: int = k, cell: str = "gated_deltanet") -> float:
        found = newest(files, what=what, length=length, cell=cell, **three)
        assert found, f"no {what} of {length:,} tokens in {', '.join(files)}"
        return float(found[key])

    def times(files: Sequence[str], what: str, key: str, of_shape: Row, length: int = k) -> float:
        return ratio(files, what, key, length=length, **of_shape)

    def large(files: Sequence[str], cell: str) -> float:
        return float((newest(files, **shape("qwen2.5-14b", cell, "read")) or {})["first_s"])

    million = 1048576
    slower = of(h100, "read", "prefill_s", million) / of(h100, "read", "prefill_s") * k / million - 1
    peaks = abs(of(h100, "read", "peak_gib", million) / of(h100, "read", "peak_gib") - 1)
    faster = of(h200, "read", "prefill_s", cell="full") / of(h200, "read", "prefill_s")
    loaded = one("load-cpu-2threads", lossless=2048)["first_token_s"]
    smol, qwen = (result(f"train-{name}") for name in ("smollm2-135m-h100", "qwen2.5-coder-0.5b-deltanet"))
    body = [
        at_most("decode a token, ms", 3.3, of(h100, "decode", "decode_ms"), "{:.2f}", "H100"),
        at_least("the same, share of the floor", 0.75, of(h100, "decode", "of_floor"), "{:.0%}", "H100"),
        at_most("through `ahn.generate`, ms", 3.3, of(h100, "decode", "generate_ms"), "{:.2f}", "H100"),
        at_most("decode with a store, times as long", 1.1, times(h100, "decode", "decode_ms", three), "{:.3f}", "H100"),
        at_most("the same, 0.5B", 1.1, times(h200, "decode", "decode_ms", half), "{:.3f}", "H200"),
        at_most("read 65,536 tokens, s", 1.5, of(h100, "read", "prefill_s", 65536), "{:.2f}", "H100"),
        at_most("read 131,072 tokens, s", 3.2, of(h100, "read", "prefill_s"), "{:.2f}", "H100"),
        at_least("the same, times as fast as full attention", 1.9, faster, "{:.2f}", "H200"),
        at_most("time a token at 1,048,576, above that at 131,072", 0.05, slower, "{:.1%}", "H100"),
        at_most("difference of the peaks at these lengths", 0.01, peaks, "{:.1%}", "H100"),
        at_most("peak at 1,048,576, GiB", 9.5, of(h100, "read", "peak_gib", million), "{:.2f}", "H100"),
        at_most("cache, above the cost model", 0.02, of(h100, "read", "cache_over_model"), "{:.0%}", "H100"),
        at_most("read with a store, times as long", 1.3, times(h200, "read", "prefill_s", three), "{:.2f}", "H200"),
        at_most("the same, 0.5B", 1.3, times(h200, "read", "prefill_s", half), "{:.2f}", "H200"),
        at_most("the same, 0.5B, 16,384", 1.3, times(h200, "read", "prefill_s", half, 16384), "{:.2f}", "H200"),
        at_most(
            "the same, 0.5B, 2,048 lossless, 16,384 tokens",
            1.3,
            times(NARROW["H200"], "read", "prefill_s", half, 16384),
            "{:.2f}",
            "H200",
        ),
        at_most("compile before the first 65,536 tokens, s", 60, of(h100, "read", "first_s", 65536), "{:.0f}", "H100"),
        at_most("the same", 60, of(h200, "read", "first_s", 65536), "{:.0f}", "H200"),
        at_most("the same, with a store", 60, of(h100, "read", "first_s", cell=STORE), "{:.0f}", "H100"),
        at_most("the same, with a store", 60, of(h200, "read", "first_s", cell=STORE), "{:.0f}", "H200"),
        at_most("the same, 14B, deltanet", 60, large(h100, "deltanet"), "{:.0f}", "H100"),
        at_most("the same, 14B, mamba2", 60, large(h200, "mamba2"), "{:.0f}", "H200"),
        at_most(
            "a file of a million tokens to the first token, s",
            0.5,
            of(h100, "load", "first_token_s", million),
            "{:.3f}",
            "H100",
        ),
        at_most("the same", 0.5, of(h200, "load", "first_token_s", million), "{:.3f}", "H200"),
        at_most("the same, SmolLM2, 2,048 lossless", 2, loaded, "{:.2f}", "CPU"),
        at_least("train SmolLM2, deltanet, tokens/s", 250000, smol["tokens_per_s"], "{:,.0f}", "H100"),
        at_least("train Qwen 0.5B, deltanet, tokens/s", 100000, qwen["tokens_per_s"], "{:,.0f}", "H200"),
        at_most(
            "train the 3B's shape on 24,576 tokens: peak, GiB",
            70,
            result("train-qwen2.5-3b")["peak_gib"],
            "{:.1f}",
            "H100",
        ),
    ]
    about = (
        "Shape of Qwen2.5-3B, gated_deltanet, 32,768 lossless tokens, if nothing else is said. Each number is the "
        "newest row of its file; performance.md names the files."
    )
    return f"{markdown(['goal', 'device', 'limit', 'measured', ''], body)}\n\n{wrapped(about)}"


# README.md


@table
def choose() -> str:
    """Facts found and bytes kept by each way to read, of the one result file that has them all."""
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
    about = (
        f"Qwen2.5-Coder-0.5B, 16,384 tokens, 2,048 of them lossless: mean of {len(needles)} tasks with needles, 100 to "
        "200 examples each, 95% intervals at most ± 5 points."
    )
    return block(["", "when", "needles found", "cache, MiB"], body, about, name)


@table
def speed() -> str:
    """What reading costs, in sentences."""
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
