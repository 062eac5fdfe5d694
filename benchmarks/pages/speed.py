"""Tables of time and memory: performance.md, training.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ahn.cost import PAPER, cost
from pages.tables import Row, block, markdown, numbers, result, rows, table, wrapped
from speeds._floors import Ceilings, Floors

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
def cpu_serve() -> str:
    name = "serve-cpu"
    head = ["chats", "tokens/s of all", "of one chat"]
    body = []
    for row in rows(name, what="answer"):
        rate, chats = row["tokens_per_s"], row["batch"]
        body.append([str(chats), f"{rate:.1f}", f"{rate / chats:.1f}"])
    first, slot = rows(name, what="first token")[0], result(name)["bytes_of_slot"] / 1e6
    alone, four = (rows(name, what="answer", batch=chats)[-1]["tokens_per_s"] for chats in (1, 4))
    about = (
        f"SmolLM2-135M, chats on a memory of {first['length']:,} tokens, questions of 16 tokens and answers of 64. "
        f"Four chats get {four / alone:.1f} times the tokens of one. A slot has {slot:.0f} MB. The first token comes "
        f"after {first['idle_ms'] / 1000:.2f} s, and after {first['reading_ms'] / 1000:.2f} s while a document "
        f"is read at {first['read_per_s']:.0f} tokens/s."
    )
    return block(head, body, about, name)


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
    """The last row with these values, in the first file that has one."""
    return next((found[-1] for name in files if (found := rows(name, **wanted))), None)


class Line(NamedTuple):
    """A line of a table of GPU times: its label, the values that select a row, and the key that is shown."""

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
        "with the default cache. "
    )
    return devices(lines, WIDE, "{:.2f}", "floor_ms", about + rates())


def rates() -> str:
    """The rates behind the floors, as a sentence."""
    by = {device: result(files[0])["ceilings"] for device, files in WIDE.items()}
    copies = ", ".join(f"{device} {found['copy_tb_per_s']:.1f}" for device, found in by.items())
    products = ", ".join(f"{device} {found['matmul_tflops']:.0f}" for device, found in by.items())
    return (
        "A floor is the time for the bytes that must be moved, or for the products that must be computed, at the rates "
        f"that the device reached in the same run (copies: {copies} TB/s; products: {products} TFLOP/s)."
    )


@table
def sustained() -> str:
    """The reason why an H100 reads no faster."""
    name = "gpu-h100-3b"
    reached, length = result(name)["sustained"], 131072
    model = floors()
    attention = attended(model, length)
    products = model.read_flops("gated_deltanet", 1, length) - attention
    least = products / reached["matmul_tflops"] / 1e12 + attention / reached["attention_tflops"] / 1e12
    took = (newest(WIDE["H100"], **shape("qwen2.5-3b", "gated_deltanet", "read")) or {})["prefill_s"]
    return wrapped(
        f"**Why reading stops at {took:.1f} s on an H100.** The card is at its limit of 700 W and below its clock. For "
        f"three seconds it sustains {reached['matmul_tflops']} TFLOP/s in large products and "
        f"{reached['attention_tflops']} in attention. At these rates the products and the attention of {length:,} "
        f"tokens alone take {least:.1f} s (`{name}.json`). Filling gaps between kernels does not help there; only less "
        "work and fewer bytes do."
    )


def floors() -> Floors:
    """Those of Qwen2.5-3B in bfloat16 with 32,768 lossless tokens."""
    return Floors(PAPER["qwen2.5-3b"], 2, window=32640, sinks=128, ceilings=Ceilings(1, 1))


def attended(model: Floors, length: int) -> int:
    """FLOPs of the attention over sinks and window. The first tokens see fewer than `lossless` keys."""
    pairs = length * model.lossless - model.lossless**2 // 2
    return 4 * model.shape.layers * model.shape.N * model.shape.H * pairs


@table
def moved() -> str:
    """The bytes of a step and the operations of reading."""
    model, cell, k = floors(), "gated_deltanet", 131072
    layers = model.shape.layers
    state = 2 * 4 * layers * model.shape.N * model.shape.H**2
    window = 2 * model.itemsize * layers * model.shape.M * model.shape.H * model.lossless
    weights = model.decode_bytes(cell, 0, k)
    body = [[f"decode, batch {batch}, GB", f"{model.decode_bytes(cell, batch, k) / 1e9:.1f}"] for batch in (1, 8, 32)]
    body[1:1] = [
        [f"of these {name}, GB", f"{size / 1e9:.2f}"]
        for name, size in (("weights", weights), ("the window", window), ("the state", state))
    ]
    for length in (65536, k, 1048576):
        body.append([f"read {length:,} tokens, PFLOP", f"{model.read_flops(cell, 1, length) / 1e15:.2f}"])
    share = attended(model, k) / model.read_flops(cell, 1, k)
    body.append([f"share of attention over the window in {k:,} tokens", f"{share:.0%}"])
    a_layer = 4 * model.shape.N * model.shape.H * model.lossless
    body.append(["attention of a token over a full window, a layer, MFLOP", f"{a_layer / 1e6:.0f}"])
    about = "Shape of Qwen2.5-3B, bfloat16, 32,768 lossless tokens, gated_deltanet (computed)."
    return f"{markdown(['', 'moved or multiplied'], body)}\n\n{about}"


@table
def cost_model() -> str:
    """The savings that `ahn cost` computes, beside the paper's."""
    said = {"3b": 0.405, "7b": 0.346, "14b": 0.375}
    body = []
    for name, flops in said.items():
        found = cost(PAPER[f"qwen2.5-{name}"], 128000)
        theirs = "74.0%" if name == "3b" else ""
        body.append([name.upper(), f"{found.cache.saving:.1%}", theirs, f"{found.flops.saving:.1%}", f"{flops:.1%}"])
    head = ["Qwen2.5", "cache saved", "in the paper", "FLOPs saved", "in the paper"]
    return f"{markdown(head, body)}\n\n`ahn cost` at 128,000 tokens, 32,768 of them lossless."


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
        ("load it and decode the first token, s", base, "first_token_s", 1.0, "{:.2f}"),
        ("load it for the first time in a process, s", base, "first_s", 1.0, "{:.2f}"),
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
