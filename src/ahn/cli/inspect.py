"""Show which words of a text a memory file keeps exactly, in their context.

  ahn read book.txt -o book.ahn --store attention --store-size 1024
  ahn inspect book.ahn
  ahn inspect book.ahn --html book.html

Each layer's heads keep tokens of their own. Words are coloured by how many heads keep them; those that most heads keep
are shown. No model is loaded.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from ahn.cli import _options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("memory", metavar="FILE", help="a memory file that was read with --store")
    parser.add_argument("--html", metavar="FILE", help="write a page, with a map of the layers, instead")
    parser.add_argument(
        "--show",
        type=_options.at_least(1),
        default=400,
        metavar="N",
        help="kept tokens to show (default: %(default)s)",
    )
    parser.add_argument("--layer", type=_options.at_least(0), metavar="N", help="only this layer's, counted from 0")
    parser.add_argument("--base", metavar="B", help="base with the tokenizer (default: the one the file names)")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ahn import retention
    from ahn.bases import load_tokenizer
    from ahn.cli import _pages
    from ahn.cli._session import check_writable
    from ahn.errors import ConfigError
    from ahn.memory_file import peek, retained
    from ahn.transcript import BESIDE

    check_writable(args.html)
    header = peek(args.memory)
    positions, ids, ranks = retained(args.memory)
    if args.layer is not None:
        if args.layer >= len(ranks):
            raise ConfigError(f"--layer {args.layer}: expected 0 to {len(ranks) - 1}")
        ranks = ranks[args.layer : args.layer + 1]
    base = args.base or header.get("base")
    if not base:
        raise ConfigError(f"{args.memory} does not say which base it is of: expected --base")
    tokenizer = load_tokenizer(base)
    layers = [retention.position(layer[layer >= retention.TOKEN]).tolist() for layer in ranks]
    total, length, config = ranks.shape[0] * ranks.shape[1], header["seen"][0], header["config"]
    most = Counter(at for layer in layers for at in layer).most_common(args.show)
    shown = _pages.pieces(tokenizer, positions.tolist(), ids.tolist(), dict(most), BESIDE)
    kept = len({at for layer in layers for at in layer})
    facts = [
        f"{length:,} tokens read by {base}; {config['sinks']:,} sinks + {config['store_size']:,} store "
        f"({config['store']}, spans of {config['store_span']}) + {config['window']:,} window",
        f"{kept:,} tokens are stored by at least one of {total} heads; shown: the {len(most):,} that most heads keep",
    ]
    if args.html:
        text = _pages.page(Path(args.memory).name, facts, shown, layers, length, total)
        Path(args.html).write_text(text, encoding="utf-8")
        print(args.html)
        return
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for fact in facts:
        console.print(fact, style="dim")
    if console.is_terminal:
        console.print(_pages.legend(total))
    console.print()
    console.print(_pages.terminal(shown, total, console.is_terminal))
