"""Reading and decoding on a CPU: sinks, window and memory against transformers' full attention, and constant memory.

    python benchmarks/cpu.py [--base smollm2-135m] [--text FILE] [--lossless 512] [--lengths 4096 16384 65536]
        [--dtypes float32 bfloat16]

Every figure is measured in a process of its own, so that peaks of resident memory do not mix. Full attention at 65,536
tokens takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from ahn.compat import PAST
from common import BOOK, write

DECODED = 32
SINKS = 64


def measure(kind: str, base: str, text: str, length: int, lossless: int, dtype: str) -> dict[str, Any]:
    """One process: read `length` tokens (a text that is too short is repeated), decode, and look at the peak."""
    import torch

    import ahn

    tokens = ahn.load_tokenizer(base)(Path(text).read_text()).input_ids
    ids = torch.tensor([(tokens * (length // len(tokens) + 1))[:length]])
    if kind == "full":
        from ahn.bases import load_base

        model = load_base(base, dtype)
    else:
        cell = None if kind == "window" else kind
        adapter = "none" if cell is None else None
        model = ahn.from_pretrained(base, adapter, window=lossless - SINKS, sinks=SINKS, cell=cell, dtype=dtype)
    with torch.no_grad():
        model(ids[:, :64])
        start_rss = resident()
        start = time.perf_counter()
        full = kind == "full"
        cache = model(ids, logits_to_keep=1, use_cache=True)[PAST] if full else ahn.read(model, ids)
        read = time.perf_counter() - start
        steps = []
        for _ in range(DECODED):
            start = time.perf_counter()
            model(ids[:, :1], **{PAST: cache})
            steps.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "kind": kind,
        "dtype": dtype,
        "length": length,
        "read_s": round(read, 2),
        "read_tokens_per_s": round(length / read, 1),
        "decode_ms": round(1000 * statistics.median(steps), 2),
        "peak_mib": round(peak, 1),
        "above_start_mib": round(peak - start_rss, 1),
        "cache_mib": round(nbytes(cache) / 2**20, 2),
    }


def nbytes(cache: Any) -> int:
    return (
        cache.nbytes
        if hasattr(cache, "nbytes")
        else sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    )


def resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="name, folder or GGUF file (%(default)s)")
    parser.add_argument("--text", default=str(BOOK), help="read again and again until it is long enough")
    parser.add_argument("--lossless", type=int, default=512, help="sinks and window (%(default)s tokens)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--kinds", nargs="+", default=["window", "gated_deltanet", "deltanet", "mamba2", "full"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--name", default="cpu", help="of the file in results/ (%(default)s)")
    options = parser.parse_args()
    if options.one:
        (length,), (dtype,) = options.lengths, options.dtypes
        print(json.dumps(measure(options.one, options.base, options.text, length, options.lossless, dtype)))
        return

    print(f"{'':<26}{'tokens':>8}{'read s':>9}{'tokens/s':>10}{'decode ms':>11}{'peak MiB':>10}{'cache MiB':>10}")
    rows: list[dict[str, Any]] = []
    for length, dtype in product(options.lengths, options.dtypes):
        for kind in options.kinds:
            command = [sys.executable, __file__, "--one", kind, "--lengths", str(length), "--base", options.base]
            command += ["--dtypes", dtype, "--text", options.text, "--lossless", str(options.lossless)]
            out = subprocess.run(command, capture_output=True, text=True, check=False)
            if out.returncode:
                sys.exit(out.stderr)
            row = json.loads(out.stdout.splitlines()[-1])
            rows.append(row)
            print(
                f"{row['kind']:<16}{dtype:<10}{row['length']:>8,}{row['read_s']:>9.1f}{row['read_tokens_per_s']:>10.0f}"
                f"{row['decode_ms']:>11.1f}{row['peak_mib']:>10.0f}{row['cache_mib']:>10.1f}",
                flush=True,
            )
            path = write(options.name, lossless=options.lossless, sinks=SINKS, base=options.base, rows=rows)
    print(path)


if __name__ == "__main__":
    main()
