"""Read documents once into a memory file, to ask about them later.

  ahn read book.txt -o book.ahn
  ahn read letters/ 'notes/*.md' paper.pdf -o all.ahn
  ahn read more.txt --memory book.ahn        append to it, or write another file with -o

A document of the same name and text that a memory holds already is skipped, unless --force is given.
Ctrl-C ends the reading and keeps what was read so far; the same command goes on from there.
"""

from __future__ import annotations

import argparse

from ahn.cli import _options
from ahn.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "document", nargs="+", metavar="FILE", help="documents, folders or patterns, in order; - for standard input"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="the memory file to write (default: that of --memory)")
    parser.add_argument("--memory", metavar="FILE", help="append to what this memory file holds")
    _options.add_force(parser)
    _options.add_archive(parser)
    _options.add_model(parser)


def run(args: argparse.Namespace) -> None:
    from ahn.cli._console import console
    from ahn.cli._reading import NothingNewError, read_document_into

    args.output = args.output or args.memory
    if not args.output:
        raise ConfigError("-o/--output: required, or --memory FILE to append to")
    try:
        _, summary = read_document_into(args, args.memory)
    except NothingNewError:
        if args.output != args.memory:
            raise ConfigError(f"-o {args.output}: not written, because {args.memory} holds all documents") from None
        summary = "nothing new"
    console.print(f"read    {summary}")
    console.print(f'now     ahn ask --memory {args.output} "..."')
