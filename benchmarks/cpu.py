"""Reading and decoding on a CPU: sinks, window and memory against transformers' full attention, and constant memory.

    python benchmarks/cpu.py [--base smollm2-135m] [--text FILE] [--lossless 512] [--lengths 8192 16384 32768 65536]

Every figure is measured in a process of its own, so that peaks of resident memory do not mix.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ahn.cache import PAST
from common import BOOK, write

DECODED = 32
SINKS = 64


def measure(kind: str, base: str, text: str, length: int, lossless: int) -> dict[str, Any]:
    """One process: read `length` tokens (a text that is too short is repeated), decode, and look at the peak."""
    import torch

    import ahn

    tokens = ahn.load_tokenizer(base)(Path(text).read_text()).input_ids
    ids = torch.tensor([(tokens * (length // len(tokens) + 1))[:length]])
    if kind == "full":
        from ahn.bases import load_base

        model = load_base(base)
    else:
        cell = None if kind == "window" else kind
        adapter = "none" if cell is None else None
        model = ahn.from_pretrained(base, adapter, window=lossless - SINKS, sinks=SINKS, cell=cell)
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
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--text", default=str(BOOK))
    parser.add_argument("--lossless", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--compare-at", type=int, default=16384, help="length at which full attention is measured too")
    parser.add_argument("--cells", nargs="+", default=["window", "gated_deltanet", "deltanet", "mamba2"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.base, options.text, options.compare_at, options.lossless)))
        return

    def run(kind: str, length: int) -> dict[str, Any]:
        command = [sys.executable, __file__, "--one", kind, "--compare-at", str(length), "--base", options.base]
        command += ["--text", options.text, "--lossless", str(options.lossless)]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            sys.exit(out.stderr)
        row = json.loads(out.stdout.splitlines()[-1])
        print(
            f"{row['kind']:<16}{row['length']:>8,}{row['read_s']:>9.1f}{row['read_tokens_per_s']:>10.0f}"
            f"{row['decode_ms']:>11.1f}{row['peak_mib']:>10.0f}{row['cache_mib']:>10.1f}",
            flush=True,
        )
        return row

    print(f"{'':<16}{'tokens':>8}{'read s':>9}{'tokens/s':>10}{'decode ms':>11}{'peak MiB':>10}{'cache MiB':>10}")
    rows = [run(kind, options.compare_at) for kind in ["full", *options.cells]]
    full = rows[0]
    lengths = [run("gated_deltanet", length) for length in options.lengths]
    ratios = {
        row["kind"]: {
            "read_speedup": round(full["read_s"] / row["read_s"], 2),
            "decode_speedup": round(full["decode_ms"] / row["decode_ms"], 2),
            "peak_ratio": round(row["peak_mib"] / full["peak_mib"], 3),
        }
        for row in rows[1:]
    }
    for kind, ratio in ratios.items():
        speeds = f"reads {ratio['read_speedup']}x, decodes {ratio['decode_speedup']}x as fast"
        print(f"{kind}: {speeds}, {ratio['peak_ratio']:.0%} of the peak")
    peaks = [row["peak_mib"] for row in lengths]
    print(f"peak from {options.lengths[0]:,} to {options.lengths[-1]:,} tokens: {peaks[-1] / peaks[0] - 1:+.1%}")
    path = write(
        "cpu", lossless=options.lossless, sinks=SINKS, base=options.base, compared=rows, ratios=ratios, lengths=lengths
    )
    print(path)


if __name__ == "__main__":
    main()
