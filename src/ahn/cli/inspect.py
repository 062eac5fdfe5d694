"""Show what a memory file holds: its documents, its bytes, and the words that its store keeps exactly.

  ahn read book.txt -o book.ahn
  ahn inspect book.ahn
  ahn inspect book.ahn --html book.html

The memory has the same size however much was read. The archive grows with the text.

Each head keeps its own tokens. Every line shows a passage: the most heads that keep one of its tokens, the position of
that token, and the text. Kept words are in ⟦ ⟧, coloured by the number of heads that keep them. The passages that most
heads keep come first; the page of --html has them in the order of the text. No model is loaded.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ahn.cli import _options

LINES, WORDS = 100, 400  # kept tokens that are shown in a terminal and on a page


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("memory", metavar="FILE", help="a memory file made by ahn read")
    parser.add_argument("--html", metavar="FILE", help="write a page, with a map of the layers (- for standard output)")
    parser.add_argument(
        "--show",
        type=_options.at_least(1),
        metavar="N",
        help=f"kept tokens to show (default: {LINES}, on a page {WORDS})",
    )
    parser.add_argument("--layer", type=_options.at_least(0), metavar="N", help="only this layer's, counted from 0")
    parser.add_argument("--base", metavar="B", help="base with the tokenizer (default: the one the file names)")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ahn.bases import base_config, load_tokenizer
    from ahn.cli import _pages
    from ahn.errors import ConfigError
    from ahn.files import atomic, check_writable
    from ahn.memory.file_contents import retained
    from ahn.memory.file_format import peek
    from ahn.memory.transcript import BESIDE
    from ahn.ops.ranks import TOKEN, position_of

    check_writable(None if args.html == "-" else args.html, "--html")
    header = peek(args.memory)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    words = args.html or args.layer is not None or args.show or args.base
    if not words:
        for line in _held(args.memory, header):
            console.print(line)
        if not header["config"]["store"]:
            return
        console.print()
    base = args.base or header.get("base")
    if not base:
        raise ConfigError(f"{args.memory} does not say which base it is of: expected --base")
    positions, ids, ranks = retained(args.memory, base_config(base))
    layers = dict(enumerate(position_of(layer[layer >= TOKEN]).tolist() for layer in ranks))
    if args.layer is not None:
        if args.layer not in layers:
            raise ConfigError(f"--layer {args.layer}: expected 0 to {len(layers) - 1}")
        layers = {args.layer: layers[args.layer]}
    total, length, config = len(layers) * ranks.shape[1], header["seen"][0], header["config"]
    counts = Counter(at for layer in layers.values() for at in layer)
    most = counts.most_common(args.show or (WORDS if args.html else LINES))
    shown = _pages.pieces(load_tokenizer(base), positions.tolist(), ids.tolist(), dict(most), BESIDE)
    of = "" if args.layer is None else f" of layer {args.layer}"
    facts = [
        f"{length:,} tokens read by {header.get('base') or base}; "
        f"{config['sinks']:,} sinks + {config['store_size']:,} store "
        f"({config['store']}, spans of {config['store_span']}) + {config['window']:,} window",
        f"{len(counts):,} tokens are stored by at least one of {total} heads{of}; "
        f"shown: the {len(most):,} that most heads keep",
    ]
    if args.html:
        page = _pages.page(Path(args.memory).name, facts, shown, layers, length, total)
        if args.html == "-":
            print(page)
            return
        with atomic(args.html) as path:
            path.write_text(page, encoding="utf-8")
        print(args.html)
        return
    for fact in facts:
        console.print(fact, style="dim")
    console.print(f"\n{'heads':>5} {'token':>9}", style="dim")
    for passage in _pages.passages(shown):
        console.print(_pages.terminal(passage, total))


def _held(path: str, header: dict[str, Any]) -> Iterator[str]:
    """A line each for the memory, its archive, and every document."""
    from ahn.cli._console import counted, size
    from ahn.memory.file_contents import held

    found, config, adapter = held(path), header["config"], header.get("adapter") or "none"
    store = f" + {config['store_size']:,} store" if config["store"] else ""
    yield f"read     {counted(header['tokens_seen'], 'token')} by {header.get('base')}, adapter {adapter}"
    yield f"memory   {size(found.memory)}: {config['sinks']:,} sinks{store} + {config['window']:,} window exactly"
    archive = header.get("archive")
    if archive is None:
        yield "archive  none"
        return
    heads = ", ".join(f"{count} of layer {layer}" for layer, count in sorted(found.heads.items()))
    keys = f", keys {size(found.keys)} (key/value heads: {heads})" if heads else ""
    yield (
        f"archive  {size(found.archive)} for {counted(archive['tokens'], 'token')}: "
        f"ids {size(found.ids)}, places {size(found.places)}{keys}"
    )
    for name, tokens, pages in found.documents:
        yield f"         {tokens:>9,} tokens{', ' + counted(pages, 'page') if pages else ''}  {name}"
