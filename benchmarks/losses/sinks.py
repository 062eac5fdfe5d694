"""Loss by position where a query behind the window sees the sinks near, far, or not at all.

    python benchmarks/loss.py sinks BOOK.txt [BOOK.txt ...] [--base smollm2-135m] [--tokens 32768] [--lossless 512 2048]

Compares sink_positions "clipped" and "absolute", and no sinks, on sinks and window without a memory, at several times
the context length.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path

from common import SINKS, write

NAME = "sinks"
TINY = "{text} --base {base} --tokens 256 --lossless 80"
PARTS = 8


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ["clipped", "absolute", "none"]
    parser.add_argument("books", nargs="+")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--lossless", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--sinks", nargs="+", default=kinds, choices=kinds)


def run(options: argparse.Namespace) -> None:
    import torch

    import ahn
    from losses._positions import position_losses

    tokenizer = ahn.load_tokenizer(options.base)
    texts = {book: tokenizer(Path(book).read_text()).input_ids for book in options.books}
    model = ahn.from_pretrained(options.base, "none", window=16, sinks=4)
    edges = [options.tokens * i // PARTS for i in range(PARTS + 1)]
    rows = []
    print(f"{'lossless':>8}  {'sinks':<9}" + "".join(f"{f'to {edge // 1024}k':>9}" for edge in edges[1:]))
    for lossless in options.lossless:
        for kind in options.sinks:
            sinks = 0 if kind == "none" else SINKS
            ahn.detach(model)
            ahn.augment(
                model,
                ahn.AHNConfig(None, lossless - sinks, sinks, sink_positions="clipped" if kind == "none" else kind),
            )
            by_book = [position_losses(model, torch.tensor([ids[: options.tokens + 1]]))[0] for ids in texts.values()]
            means = []
            for low, high in pairwise(edges):
                values = torch.cat([book[low:high] for book in by_book])
                means.append(round(values.mean().item(), 4) if len(values) else math.nan)
            rows.append({"lossless": lossless, "sinks": kind, "loss": means})
            print(f"{lossless:>8}  {kind:<9}" + "".join(f"{mean:>9.4f}" for mean in means), flush=True)
    sizes = {Path(book).stem: min(len(ids), options.tokens) for book, ids in texts.items()}
    print(write(options.name, base=options.base, books=sizes, position_edges=edges, rows=rows))
