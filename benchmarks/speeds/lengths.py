"""Time to read a text, time a token after it, and memory, by length: full attention, sinks and window, and cells.

    python benchmarks/speed.py lengths [--base smollm2-135m | --shape qwen2.5-3b] [--lengths 4096 16384 65536]
        [--kinds window gated_deltanet full] [--dtypes float32 bfloat16] [--lossless 512]

Random tokens. Full attention reads the text in one forward call of transformers, the others in chunks. Each figure is
measured in a process of its own, so that peaks do not mix: of the GPU's memory, or of the process on a CPU, weights
included. On two cores full attention takes a quarter of an hour for 65,536 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from ahn.compat import PAST
from common import HERE, SINKS, now, peak_bytes, random_model, write

NAME = "lengths"
TINY = "--base {base} --lengths 256 --lossless 96 --kinds window deltanet full --steps 2"


def measure(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """One process: read, decode, and look at the peak."""
    import torch

    import ahn
    from ahn.bases import load_base
    from ahn.cost import shape_of

    (length,), (dtype,), full = options.lengths, options.dtypes, kind == "full"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.shape:
        model = random_model(shape_of(options.shape), device)
    else:
        model = load_base(options.base, None if dtype == "default" else dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not full:
        ahn.augment(model, ahn.AHNConfig(None if kind == "window" else kind, options.lossless - SINKS, SINKS))
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (options.batch, length), device=device)

    def read(ids: Any) -> Any:
        return model(ids, logits_to_keep=1, use_cache=True)[PAST] if full else ahn.read(model, ids)

    with torch.no_grad():
        read(
            ids if device.type == "cuda" else ids[:, :64]
        )  # kernels are chosen and compiled at first sight of a length
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before, start = peak_bytes(), now(device)
        cache = read(ids)
        seconds, times = now(device) - start, []
        for _ in range(options.steps):
            start = now(device)
            model(ids[:, :1], **{PAST: cache})
            times.append(now(device) - start)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if full else cache.nbytes
    return {
        "kind": kind,
        "dtype": str(model.dtype).removeprefix("torch."),
        "length": length,
        "read_s": round(seconds, 3),
        "read_tokens_per_s": round(options.batch * length / seconds, 1),
        "decode_ms": round(1000 * statistics.median(times), 2),
        "peak_mib": round(peak_bytes() / 2**20, 1),
        "above_start_mib": round((peak_bytes() - before) / 2**20, 1),
        "cache_mib": round(held / 2**20, 2),
        "weights_mib": round(weights / 2**20, 1),
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ["window", "gated_deltanet", "deltanet", "mamba2", "full"]
    parser.add_argument("--base", default="smollm2-135m", help="name, folder or GGUF file (%(default)s)")
    parser.add_argument("--shape", help="random weights of this shape instead of the base")
    parser.add_argument("--lossless", type=int, default=512, help="sinks and window (%(default)s tokens)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--kinds", nargs="+", default=kinds)
    parser.add_argument("--dtypes", nargs="+", default=["default"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded (%(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    if options.one:
        print(json.dumps(measure(options, options.one)))
        return
    print(f"{'':<26}{'tokens':>8}{'read s':>9}{'tokens/s':>10}{'decode ms':>11}{'peak MiB':>10}{'cache MiB':>10}")
    same = [
        f"--{key}={value}" for key in ("base", "shape", "lossless", "batch", "steps") if (value := vars(options)[key])
    ]
    rows: list[dict[str, Any]] = []
    for length, dtype, kind in product(options.lengths, options.dtypes, options.kinds):
        one = ["--one", kind, "--lengths", str(length), "--dtypes", dtype]
        command = [sys.executable, str(HERE / "speed.py"), "lengths", *same, *one]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        weights = row.pop("weights_mib")
        rows.append(row)
        print(
            f"{kind:<16}{row['dtype']:<10}{length:>8,}{row['read_s']:>9.2f}{row['read_tokens_per_s']:>10,.0f}"
            f"{row['decode_ms']:>11.1f}{row['peak_mib']:>10,.0f}{row['cache_mib']:>10,.1f}",
            flush=True,
        )
        about = {"base": Path(options.shape or options.base).name, "batch": options.batch, "weights_mib": weights}
        path = write(options.name, lossless=options.lossless, sinks=SINKS, **about, rows=rows)
    print(path)
