"""Checks of options that need no model: they are made before one is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from ahn.cli import _options
from ahn.errors import ConfigError

# settings that a memory file fixes
SEEN_IN_MEMORY = "window", "lossless", "sinks", "cell", "store", "store_size", "store_span"


def check_question(text: str) -> str:
    if not text.strip():
        raise ConfigError(f"question {text!r}: expected some text")
    return text


def check_store(args: argparse.Namespace, base: str) -> None:
    """Raises ConfigError, before anything is loaded, if the options of the store do not go together."""
    from ahn import zoo
    from ahn.adapter import chosen
    from ahn.adapter_files import read_adapter
    from ahn.config import AHNConfig

    if args.store or args.store_size or args.store_span or args.lossless:
        name = chosen(base, args.adapter, args.cell)
        own = read_adapter(name).config if name else AHNConfig(None)
        size, span = args.store_size or own.store_size, args.store_span or own.store_span
        if args.lossless and not args.store_size:
            size = own.replace(store_span=1).with_lossless(args.lossless, args.sinks).store_size
        _options.check_store(args, args.store or own.store, size, span, zoo.with_store(base))


def header_of(memory: str, args: argparse.Namespace) -> dict[str, Any]:
    from ahn.config import AHNConfig
    from ahn.memory.file_format import peek

    header = peek(memory)
    config = AHNConfig.from_dict(header["config"])
    if args.exact is not None and args.memory == memory:
        raise ConfigError(f"--exact: {memory} was read with window={config.window:,}; leave the option out")
    for name in SEEN_IN_MEMORY:
        given, kept = getattr(args, name), getattr(config, name)
        if given is not None and given != kept:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} {given}: {memory} was read with {name}={kept}; leave the option out")
    return header
