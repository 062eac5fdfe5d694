"""How soon a saved memory answers: seconds from its file to the first token, the model being loaded already.

    python benchmarks/speed.py load [--base smollm2-135m] [--lossless 512 2048] [--seen 1048576]

The memory is as after `--seen` tokens, of random numbers: neither its size nor the time depends on what was read. The
file was just written, so the system still holds it in its own cache. The question has 16 tokens.
"""

from __future__ import annotations

import argparse

import ahn
from common import SINKS, write
from speeds._measures import fill, load
from speeds._table import line

NAME = "load-cpu"
TINY = "--base {base} --lossless 80 96 --repeats 1"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--cell", default="gated_deltanet", help="untrained, which costs the same (%(default)s)")
    parser.add_argument("--lossless", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--seen", type=int, default=2**20, help="tokens read before (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)


def run(options: argparse.Namespace) -> None:
    import torch

    rows = []
    for lossless in options.lossless:
        model = ahn.from_pretrained(options.base, cell=options.cell, window=lossless - SINKS, sinks=SINKS)
        with torch.no_grad():
            found = load(model, fill(model, "memory", 1, options.seen), options.repeats)
        row = {"shape": options.base, "cell": model.ahn_config.cell, "what": "load", "batch": 1}
        row |= {"length": options.seen, "lossless": lossless}
        rows.append(row | {name: float(f"{value:.4g}") for name, value in found.items()})
        print(line(rows[-1]), flush=True)
    print(write(options.name, base=options.base, sinks=SINKS, rows=rows))
