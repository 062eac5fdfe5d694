"""Options that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from ahn.errors import ConfigError
from ahn.registry import Registry


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: integers from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {least}")
        return value

    return number


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def byte_count(text: str) -> int:
    """An argparse type: bytes in decimal units, such as 512MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected bytes, such as 512MB, 2GB or 0")
    return int(float(found[1]) * UNITS[found[2]])


def namer(parser: argparse.ArgumentParser) -> Callable[[str, Any], str]:
    """Says a setting and its value as the option of a command: `--recall 512`, else as in Python."""
    options = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}

    def named(name: str, value: Any) -> str:
        return f"{options[name]} {value}" if name in options else f"{name}={value!r}"

    return named


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model and its memory."""
    group = parser.add_argument_group("model and memory")
    group.add_argument(
        "--base",
        metavar="B",
        help="hub id, folder, .gguf file, or a short name: smollm2-135m (the default, or the memory's), "
        "qwen2.5-coder-0.5b, qwen2.5-coder-1.5b",
    )
    group.add_argument(
        "--adapter", metavar="A", help="trained memory: folder, hub id, the name of a shipped one, or none"
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument("--window", type=at_least(1), metavar="N", help="last tokens kept exactly")
    either.add_argument(
        "--lossless",
        type=at_least(1),
        metavar="N",
        help="tokens kept exactly in all: sinks, store and window; the store keeps its share",
    )
    either.add_argument(
        "--exact",
        type=byte_count,
        metavar="SIZE",
        help="keep a whole text exactly if it fits the base's positions and a cache of SIZE bytes; only without "
        "options for the sizes of the memory (default: 512MB; 0: never)",
    )
    group.add_argument("--sinks", type=at_least(0), metavar="N", help="first tokens kept exactly")
    add_store(group, "the adapter's", "the adapter's, else 1")
    group.add_argument("--cell", metavar="C", help="an untrained cell, to see what it costs (ahn info lists them)")
    group.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--chunk", type=at_least(1), metavar="N", help="tokens read at once (default: 512; on CUDA more)"
    )


def add_store(group: Any, size: str = "none", span: str = "1") -> None:
    """Add the options of the store. `size` and `span` are the defaults that the help shows."""
    group.add_argument(
        "--store", metavar="S", help="keep some of what leaves the window exactly (ahn info lists them), or none"
    )
    group.add_argument(
        "--store-size",
        type=at_least(1),
        metavar="N",
        help=f"tokens that the store keeps, for each head (default: {size})",
    )
    group.add_argument(
        "--store-span",
        type=at_least(1),
        metavar="N",
        help=f"neighbouring tokens that are kept or dropped together (default: {span})",
    )


def check_store(
    args: argparse.Namespace, name: str | None, size: int, span: int, adapters: Sequence[str] = ()
) -> str | None:
    """The name of the store, None without one. Raises ConfigError, in the words of the options of `add_store`, if they
    do not go together.

    Args:
        name, size, span: what is given or the default. adapters: some that have a store.
    """
    from ahn import stores

    if name in (None, "none"):
        for option, given in (("--store-size", args.store_size), ("--store-span", args.store_span)):
            if given and args.store == "none":
                raise ConfigError(f"{option} {given}: goes with a store, and --store none takes it away")
            if given:
                hint = f", or an --adapter that has one ({', '.join(adapters)})" if adapters else ""
                raise ConfigError(f"{option} {given}: expected the name of a --store as well{hint}")
        return None
    stores.check_name(name)
    if not size:
        raise ConfigError(f"--store {name}: expected --store-size as well")
    if span > size and not args.store_size and getattr(args, "lossless", None):
        raise ConfigError(
            f"--lossless {args.lossless}: room for {size} in the store, which judges spans of {span}: "
            "expected more, --store none, or a shorter --store-span"
        )
    if span > size:
        raise ConfigError(f"--store-span {span}: expected at most the --store-size of {size}")
    return name


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="replace the output, whatever is in it; read again what is there already"
    )


def add_archive(parser: argparse.ArgumentParser) -> None:
    """Add the option of the archive."""
    parser.add_argument(
        "--archive",
        choices=("none", "text", "keys"),
        help="keep the text in the memory file, for --recall. text: 4 bytes a token. keys: up to 128 bytes more, "
        "which find passages better (default: keys if the adapter has retrieval heads, else text)",
    )


def add_recall(parser: argparse.ArgumentParser) -> None:
    """Add the options of recall."""
    group = parser.add_argument_group("recall")
    group.add_argument(
        "--recall",
        type=at_least(0),
        metavar="N",
        help="tokens of passages to read again, 0 for none (default: 512 if the memory has keys, else 0)",
    )
    add_finder(group, "how they are found")
    group.add_argument(
        "--rounds",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: search a second time, with the best passage of the first (default: 1)",
    )
    group.add_argument(
        "--guess",
        action="store_true",
        help="answer even if the adapter finds no support in the text (default: say that it is not there)",
    )
    group.add_argument("--sources", action="store_true", help="show the passages after the answer")


def add_finder(group: Any, how: str) -> None:
    """Add `--finder`, the way to find passages. The names come from the folder of finders, without their imports."""
    names = Registry("finder", "ahn.recall.finders").names()
    group.add_argument(
        "--finder", metavar="F", default="fused", help=f"{how}: {', '.join(names)} (default: %(default)s)"
    )


def add_answer(parser: argparse.ArgumentParser) -> None:
    """Add the options of generation."""
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-new-tokens", type=at_least(1), default=256, metavar="N", help="longest answer (default: %(default)s)"
    )
