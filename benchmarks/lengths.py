"""What a longer text costs: time to read it, time a token after it, memory, with full attention, window, and memory.

    python benchmarks/lengths.py [--base smollm2-135m | --shape qwen2.5-3b] [--lengths 4096 ... 65536] [--cells ...]

Random tokens. Full attention reads the text in one forward call of transformers, the others in chunks. The peak is the
GPU's, weights included. On a CPU it is that of the process since it began: order cells and lengths so that it grows.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import ahn
from ahn.bases import load_base
from ahn.compat import PAST
from ahn.cost import shape_of
from common import now, peak_bytes, write
from train import random_model

SINKS = 64


@torch.inference_mode()
def measure(model: Any, length: int, batch: int, steps: int) -> dict[str, Any]:
    device = model.device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, length), device=device)
    full = not hasattr(model, "ahn_config")

    def read() -> Any:
        return model(ids, logits_to_keep=1, use_cache=True)[PAST] if full else ahn.read(model, ids)

    if device.type == "cuda":
        read()  # kernels are chosen and compiled at first sight of a length
        torch.cuda.reset_peak_memory_stats()
    start = now(device)
    cache = read()
    seconds = now(device) - start
    times = []
    for _ in range(steps):
        start = now(device)
        model(ids[:, :1], **{PAST: cache})
        times.append(now(device) - start)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if full else cache.nbytes
    return {
        "length": length,
        "read_s": round(seconds, 3),
        "decode_ms": round(1000 * statistics.median(times), 2),
        "peak_mib": round(peak_bytes() / 2**20, 1),
        "cache_mib": round(held / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--shape", help="random weights of this shape instead of the base")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--lossless", type=int, default=2048)
    parser.add_argument("--cells", nargs="+", default=["window", "gated_deltanet", "full"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded")
    parser.add_argument("--name", default="lengths")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(shape_of(options.shape), device) if options.shape else load_base(options.base)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{'':<16}{'tokens':>8}{'read s':>9}{'tokens/s':>10}{'decode ms':>11}{'peak MiB':>10}{'cache MiB':>11}")
    rows = []
    for kind in options.cells:
        if hasattr(model, "ahn_config"):
            ahn.detach(model)
        if kind != "full":
            cell = None if kind == "window" else kind
            ahn.augment(model, ahn.AHNConfig(cell, options.lossless - SINKS, SINKS))
        for length in options.lengths:
            row = {"kind": kind, **measure(model, length, options.batch, options.steps)}
            rows.append(row)
            print(
                f"{kind:<16}{length:>8,}{row['read_s']:>9.2f}{options.batch * length / row['read_s']:>10,.0f}"
                f"{row['decode_ms']:>11.1f}{row['peak_mib']:>10,.0f}{row['cache_mib']:>11,.1f}",
                flush=True,
            )
    print(
        write(
            options.name,
            base=Path(options.shape or options.base).name,
            lossless=options.lossless,
            sinks=SINKS,
            batch=options.batch,
            weights_mib=round(weights / 2**20, 1),
            rows=rows,
        )
    )


if __name__ == "__main__":
    main()
