"""Checks of options that need no model, made before one is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ahn.cli import _options
from ahn.config import AHNConfig
from ahn.errors import ConfigError, MemoryFileError

if TYPE_CHECKING:
    from ahn.memory.archive import Archive

# settings that a memory file fixes
SEEN_IN_MEMORY = "window", "lossless", "sinks", "cell", "store", "store_size", "store_span"


def check_question(text: str) -> str:
    if not text.strip():
        raise ConfigError(f"question {text!r}: expected some text")
    return text


@dataclass(frozen=True)
class Expected:
    """The archive and the settings of a memory that is still to be loaded or made, for `ahn.recall.check`."""

    archive: Archive | None
    config: AHNConfig


def check_before_loading(args: argparse.Namespace, header: dict[str, Any], base: str, adapter: str | None) -> str:
    """The adapter that will be loaded, "none" if there is none.

    Args:
        args: with the options of `add_model`.
        header: of the memory file to go on from, empty without one.
        adapter: named by the command or the memory file.

    Raises:
        AHNError: options that do not go together, or an adapter that is missing or does not fit.
    """
    from ahn import cells
    from ahn.adapter import NONE, chosen
    from ahn.adapter_files import read_adapter
    from ahn.bases import torch_device, torch_dtype

    torch_dtype(args.dtype, torch_device(args.device))
    if args.cell is not None:
        cells.check_name(args.cell)
    name = chosen(base, adapter, args.cell)
    trained = read_adapter(name) if name else None
    heads = trained and trained.retrieval
    kept = (header.get("archive") or {}).get("heads")
    if header and kept is not None and kept != (heads and heads.digest):
        raise MemoryFileError(f"{args.memory}: its archive has keys of other retrieval heads than those of the adapter")
    if not header:
        _check_store(args, base, trained.config if trained else AHNConfig(None))
        if getattr(args, "archive", None) == "keys" and heads is None:
            raise ConfigError("{archive}: the adapter names no retrieval heads: expected 'text'", archive="keys")
    return os.fspath(name) if name else NONE


def check_asked(args: argparse.Namespace, header: dict[str, Any], tokenizer: Any, question: str) -> None:
    """Raises ConfigError if the memory of this header, or one made with `args` where it is empty, cannot be asked this.
    Where the window is not known yet, its limits are not checked."""
    from ahn.memory.archive import Archive
    from ahn.recall import Recall, check

    config = AHNConfig.from_dict(header["config"]) if header else AHNConfig(None, window=args.window or sys.maxsize)
    has_archive = header.get("archive") is not None if header else args.archive != "none"
    archive = Archive() if has_archive else None
    if header and archive is not None:
        archive.tokenizer = header["archive"].get("tokenizer")
    memory: Any = Expected(archive, config)
    check(tokenizer, memory, question, Recall(args.recall, args.finder, args.rounds))


def _check_store(args: argparse.Namespace, base: str, own: AHNConfig) -> None:
    """Raises ConfigError if the options of the store do not go together. `own`: settings of the adapter."""
    from ahn import zoo

    if args.store or args.store_size or args.store_span or args.lossless:
        size, span = args.store_size or own.store_size, args.store_span or own.store_span
        if args.lossless and not args.store_size:
            size = own.replace(store_span=1).with_lossless(args.lossless, args.sinks).store_size
        _options.check_store(args, args.store or own.store, size, span, zoo.with_store(base))


def header_of(memory: str, args: argparse.Namespace) -> dict[str, Any]:
    from ahn.memory.archive import kind_of
    from ahn.memory.file_format import peek

    header = peek(memory)
    config = AHNConfig.from_dict(header["config"])
    if args.exact is not None and args.memory == memory:
        raise ConfigError(f"--exact: {memory} was read with a window of {config.window:,}; leave the option out")
    archive = kind_of(header.get("archive"))
    if getattr(args, "archive", None) not in (None, archive):
        raise ConfigError(f"--archive {args.archive}: {memory} was read with --archive {archive}; leave the option out")
    for name in SEEN_IN_MEMORY:
        given, kept = getattr(args, name), getattr(config, name)
        if given is not None and given != kept:
            was = args.named(name, kept)
            raise ConfigError(f"{args.named(name, given)}: {memory} was read with {was}; leave the option out")
    kept = str(header["dtype"]).removeprefix("torch.")
    if args.dtype not in (None, "auto", kept):
        raise ConfigError(f"--dtype {args.dtype}: {memory} was read with --dtype {kept}; leave the option out")
    return header
