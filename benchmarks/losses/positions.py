"""Loss by position, far beyond the context a base was trained with.

    python benchmarks/loss.py positions BOOKS.jsonl[.xz] [--adapter FOLDER ...] [--base smollm2-135m] [--tokens 65536]

Mean next-token loss (nats) in bins of positions, for full attention, sinks and window, and each adapter. Also the gain
over sinks and window, and the standard errors of both over texts. A text is `--tokens` tokens of a book; long books
give several. Texts are read in chunks through a cache, as rows of a batch, so that memory is bounded (for full
attention, by its cache). `--full N` ends full attention at N tokens: beyond its context it fails, and on a CPU it takes
hours.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import ahn
from ahn.bases import load_base
from common import SINKS, now, peak_bytes, put_on, records, set_lossless, write
from losses._positions import position_losses

NAME = "positions"
TINY = "{books} --base {base} --adapter {adapter} --tokens 256 --lossless 72 --bin 64 --texts 2"


def texts(books: list[dict[str, Any]], tokenizer: Any, tokens: int, count: int) -> Tensor:
    """At most `count` pieces of books, [B, tokens + 1]. Pieces that begin a book come first."""
    length = tokens + 1
    whole = [tokenizer(book["text"], verbose=False).input_ids for book in books]
    starts = [(low, book) for book in whole for low in range(0, len(book) - length + 1, length)]
    starts.sort(key=lambda start: start[0])  # stable: in the order of the books
    return torch.tensor([book[low : low + length] for low, book in starts[:count]])


def mean_and_error(name: str, values: Tensor) -> dict[str, list[float]]:
    """The standard error of each column of [B, bins]."""
    error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.zeros(values.shape[1])
    return {
        key: [round(x, 4) for x in column.tolist()] for key, column in ((name, values.mean(0)), (f"{name}_se", error))
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("books")
    parser.add_argument("--adapter", nargs="*", default=ahn.zoo.names())
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--full", type=int, help="tokens that full attention reads, a multiple of --bin (default: all)")
    parser.add_argument("--lossless", type=int, nargs="+", default=[1024])
    parser.add_argument("--bin", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=12, help="texts at most")
    parser.add_argument("--rows", type=int, default=12, help="texts in a batch")
    parser.add_argument("--chunk", type=int, default=512)


def run(options: argparse.Namespace) -> None:
    if options.tokens % options.bin:
        sys.exit(f"--tokens {options.tokens}: expected a multiple of --bin {options.bin}")

    ids = texts(records(options.books), ahn.load_tokenizer(options.base), options.tokens, options.texts)
    if not len(ids):
        sys.exit(f"--tokens {options.tokens}: no book is that long")
    model = load_base(options.base)
    context = model.config.max_position_embeddings
    bins = options.tokens // options.bin
    ends = [1 << i for i in range(bins.bit_length())]  # each column shows the mean over the later half of so many bins
    print(f"{len(ids)} texts, loss up to position")
    print(f"{'':<44}{'lossless':>9}" + "".join(f"{end * options.bin:>9,}" for end in ends) + f"{'s':>7}")
    rows = []
    window: dict[int, Tensor] = {}
    for memory in ["sinks and window", "full attention", *options.adapter]:
        name = memory
        if memory != "full attention":
            name = put_on(model, memory if memory in options.adapter else None)
        elif hasattr(model, "ahn_config"):
            ahn.detach(model)
        for size in [None] if memory == "full attention" else options.lossless:
            if size is not None:
                set_lossless(model, size, SINKS)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = now(model.device)
            tokens = options.full or options.tokens if size is None else options.tokens
            read = ids[:, : tokens + 1]
            found = torch.cat([position_losses(model, batch, options.chunk) for batch in read.split(options.rows)])
            seconds = now(model.device) - start
            by_bin = found.unflatten(1, (tokens // options.bin, options.bin)).mean(2)
            if memory == "sinks and window":
                window[size] = by_bin
            rows.append(
                {
                    "memory": memory,
                    "lossless": size,
                    **mean_and_error("loss", by_bin),
                    **mean_and_error("gain", window[size or options.lossless[0]][:, : by_bin.shape[1]] - by_bin),
                    "read_s": round(seconds, 1),
                    "peak_gib": round(peak_bytes() / 2**30, 2),
                }
            )
            shown = [end for end in ends if end <= by_bin.shape[1]]
            cells = "".join(f"{by_bin[:, end // 2 : end].mean().item():>9.4f}" for end in shown)
            print(f"{name:<44}{size or '':>9}{cells}{seconds:>7.0f}", flush=True)
            path = write(
                options.name, base=options.base, context=context, tokens=options.tokens, bin=options.bin,
                texts=len(ids), sinks=SINKS, rows=rows,
            )  # fmt: skip
    print(path)
