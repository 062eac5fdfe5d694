"""The batch engine: tokens a second of several chats at once, and the time to a first token.

    python benchmarks/speed.py serve [--base smollm2-135m] [--chats 1 2 4 8] [--seen 65536]

Each chat asks a memory as after `--seen` tokens, of random numbers, a question of 16 tokens. Tokens are counted from
the first request to the end of the last answer. The time to the first token is the median of single questions: to an
idle engine, and to one that reads a document meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import ahn
from common import write
from speeds._measures import QUESTION, fill
from speeds._table import line

NAME = "serve-cpu"
TINY = "--base {base} --lossless 96 --chats 1 3 --seen 200 --new 8 --repeats 2"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter", help="default: that of the base")
    parser.add_argument("--lossless", type=int, help="tokens kept exactly (default: those of the adapter)")
    parser.add_argument("--chats", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seen", type=int, default=2**16, help="tokens read before (%(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slice", type=float, default=0.1, help="seconds of a piece of a document (%(default)s)")


def run(options: argparse.Namespace) -> None:
    from ahn.bases import load_tokenizer
    from ahn.engine.batch import Engine

    model = ahn.from_pretrained(options.base, options.adapter, lossless=options.lossless)
    memory, rows = fill(model, "memory", 1, options.seen), []
    with Engine(model, load_tokenizer(options.base), slots=max(options.chats), slice_seconds=options.slice) as engine:
        answers(engine, memory, 1, 8)  # warm
        for chats in options.chats:
            rates = [answers(engine, memory, chats, options.new) for _ in range(options.repeats)]
            rows.append(_row(options, model, "answer", chats) | {"tokens_per_s": statistics.median(rates)})
            print(line(rows[-1]), flush=True)
        idle = first_token(engine, memory, options.repeats)
        document = engine.read([5] * 10**6)
        before, began = engine.load.tokens_read, time.perf_counter()
        reading = first_token(engine, memory, options.repeats)
        speed = (engine.load.tokens_read - before) / (time.perf_counter() - began)
        document.cancel()
        found = {"idle_ms": idle, "reading_ms": reading, "read_per_s": speed}
        rows.append(_row(options, model, "first token", 1) | found)
        print(line(rows[-1]), flush=True)
        content: dict[str, Any] = {"bytes_of_slot": engine.bytes_of_slot, "slice_s": options.slice}
    rows = [
        {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
    print(write(options.name, base=options.base, config=model.ahn_config.to_dict(), **content, rows=rows))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _row(options: argparse.Namespace, model: Any, what: str, chats: int) -> dict[str, Any]:
    cell = model.ahn_config.cell or "none"
    return {"shape": options.base, "cell": cell, "what": what, "batch": chats, "length": options.seen}


def answers(engine: Any, memory: Any, chats: int, new: int) -> float:
    """Tokens a second of so many chats that begin together."""
    from ahn.engine.sequence import Request

    began = time.perf_counter()
    streams = [
        engine.submit(Request(ids=[7 + chat] * QUESTION, memory=memory, max_new_tokens=new, ends=False))
        for chat in range(chats)
    ]
    for stream in streams:
        stream.result()
    return chats * new / (time.perf_counter() - began)


def first_token(engine: Any, memory: Any, repeats: int) -> float:
    """Milliseconds from a question to the first token of its answer, the median."""
    from ahn.engine.sequence import Request

    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        stream = engine.submit(Request(ids=[7] * QUESTION, memory=memory, max_new_tokens=1, ends=False))
        next(iter(stream))
        times.append(1000 * (time.perf_counter() - began))
        stream.result()
        time.sleep(0.01)
    return statistics.median(times)
