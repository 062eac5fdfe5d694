"""Compare full attention with a memory: parameters, cache and FLOPs of reading one sequence, term by term.

  ahn cost --base qwen2.5-3b --length 128000 --window 32640 --sinks 128

Formulas: the paper's Table 1 (arXiv 2510.07318). No weights are needed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ahn.cli import _options

if TYPE_CHECKING:
    from ahn.cost import Cost, Table


def arguments(parser: argparse.ArgumentParser) -> None:
    integer, shown = _options.at_least(1), "(default: %(default)s)"
    parser.add_argument(
        "--base",
        metavar="B",
        default="smollm2-135m",
        help=f"qwen2.5-3b, -7b or -14b, a config.json, or any base {shown}",
    )
    parser.add_argument("--length", type=integer, default=128_000, metavar="L", help=f"tokens read {shown}")
    parser.add_argument("--window", type=integer, default=32_640, metavar="W", help=f"last tokens kept exactly {shown}")
    sinks = _options.at_least(0)
    parser.add_argument("--sinks", type=sinks, default=128, metavar="S", help=f"first tokens kept exactly {shown}")
    _options.add_store(parser)
    parser.add_argument("--cell", default="gated_deltanet", metavar="C", help=f"cell of the memory, or none {shown}")
    parser.add_argument("--bytes", type=integer, default=4, metavar="N", help=f"of a cache element {shown}")


def run(args: argparse.Namespace) -> None:
    from ahn.config import AHNConfig
    from ahn.cost import cost, shape_of

    _options.check_store(args, args.store, args.store_size or 0, args.store_span or 1)
    config = AHNConfig(
        None if args.cell == "none" else args.cell,
        args.window,
        args.sinks,
        store=None if args.store == "none" else args.store,
        store_size=args.store_size or 0,
        store_span=args.store_span or 1,
    )
    result = cost(shape_of(args.base), args.length, config, args.bytes)
    print("\n".join(_report(args.base, result)))


def _report(base: str, result: Cost) -> Iterator[str]:
    shape, config = result.shape, result.config
    store = f" + {config.store_size:,} store" if config.store else ""
    yield (
        f"{base}: {shape.layers} layers, D {shape.D:,}, N {shape.N}, M {shape.M}, H {shape.H}, F {shape.F:,}, "
        f"V {shape.V:,}{', tied' if shape.tied else ''}"
    )
    exact = f"{config.sinks:,} sinks{store} + {config.window:,} window"
    yield f"reading L = {result.length:,} tokens; W' = {exact} = {config.lossless:,}"
    yield f"full: full attention; memory: W' and {config.cell or 'no cell'}, holding {result.written:,} tokens"

    yield from _section("parameters", result.parameters)
    yield _total("model", result.parameters)

    yield from _section("cache (bytes)", result.cache, result.bytes_per_element)
    yield _total("as in the paper", result.cache, result.bytes_per_element)
    for term in result.ours.terms:
        yield _row(f"+ {term.name}", term.formula, 0, term.memory * result.bytes_per_element, result.full_bytes)
    if config.store:
        yield _row("+ store", "ranks, scores", 0, result.store_bytes, result.full_bytes)
    if config.cell or config.store:
        yield _row("held by ahn", "state in float32", result.full_bytes, result.held_bytes)

    from ahn.memory.archive import EVERY, KEY_BYTES, PLACE_BYTES, TOKEN_BYTES

    yield ""
    yield "archive (bytes, on host and disk)"
    text = TOKEN_BYTES * result.length + PLACE_BYTES * result.length // EVERY
    formula, most = f"{TOKEN_BYTES}L + {PLACE_BYTES}L / {EVERY}", text + KEY_BYTES * result.length
    yield _row("  text", formula, 0, text, most)
    yield _row("  keys, at most", f"{formula} + {KEY_BYTES}L", 0, most, most)

    yield from _section("FLOPs", result.mixing)
    yield _total("token mixing", result.mixing)
    yield from _terms(result.rest, 1, result.flops.full)
    yield _total("model", result.flops)

    yield ""
    yield f"parameters added {result.parameters.ratio - 1:6.2%}"
    yield f"cache saved      {result.cache.saving:6.1%}"
    yield f"FLOPs saved      {result.flops.saving:6.1%}"


def _section(title: str, table: Table, each: int = 1) -> Iterator[str]:
    yield ""
    yield f"{title:<18}{'a layer':<30}{'full':>10}  {'memory':>10}  {'ratio':>8}"
    yield from _terms(table, each, table.full * each)


def _terms(table: Table, each: int, scale: float) -> Iterator[str]:
    for term in table.terms:
        yield _row(f"  {term.name}", term.formula, term.full * each, term.memory * each, scale)


def _total(name: str, table: Table, each: int = 1) -> str:
    return _row(name, "", table.full * each, table.memory * each)


def _row(name: str, formula: str, full: int, memory: int, scale: float = 0) -> str:
    """`scale`: the number whose unit the whole table is in."""
    ratio = f"{memory / full:.1%}" if full else ""
    return f"{name:<18}{formula:<30}{_number(full, scale or full)}{_number(memory, scale or full)}{ratio:>8}".rstrip()


def _number(value: int, scale: float) -> str:
    """Three decimals in the unit that gives `scale` two to four digits before the point."""
    if not value:
        return f"{'-':>10}  "
    power = max(0, min(5, int(math.log10(max(scale, 1)) - 1) // 3))
    return f"{value / 1000**power:>10,.3f} {' kMGTP'[power]}"
