"""Read a document once into a memory file, to ask about it later.

  ahn read book.txt -o book.ahn

Ctrl-C ends the reading and keeps what was read so far.
"""

from __future__ import annotations

import argparse

from ahn.cli import _options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document", metavar="FILE", help="text, Markdown, HTML or PDF; - for standard input")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the memory file to write")
    _options.add_model(parser)


def run(args: argparse.Namespace) -> None:
    from ahn.cli._session import console, read_document_into

    _, summary = read_document_into(args)
    console.print(f"read    {summary}")
    console.print(f'now     ahn ask --memory {args.output} "..."')
