"""Talk about a document or a memory file, or about nothing in particular.

  ahn chat --memory book.ahn

Ctrl-C stops an answer; /quit, /exit or Ctrl-D leaves.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress

from ahn.cli import _options
from ahn.errors import ConfigError

HELP = "/quit, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help says so"
LEAVE = ("exit", "quit", "/exit", "/quit")


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--document", metavar="FILE", help="text, Markdown, HTML or PDF")
    source.add_argument("--memory", metavar="FILE", help="a memory made by ahn read")
    parser.add_argument("-o", "--output", metavar="FILE", help="keep what was read of the document in a memory file")
    _options.add_answer(parser)
    _options.add_model(parser)


def run(args: argparse.Namespace) -> None:
    from ahn.cli._session import Session, console, read_document_into

    if args.document == "-":
        raise ConfigError("--document -: questions come from standard input; expected a file")
    if args.output and not args.document:
        raise ConfigError(f"-o {args.output}: goes with --document")
    if args.document:
        session, summary = read_document_into(args)
        console.print(f"read    {summary}")
    else:
        session = Session(args, args.memory)
        if args.memory:
            console.print(f"memory  {session.cache.tokens_seen:,} tokens; {session.held}")

    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        console.print(HELP)
        with suppress(ImportError):
            import readline  # noqa: F401 - importing it gives input() line editing and history
    first = session.dialogue.question if args.document or args.memory else session.dialogue.start
    answer = None
    while (text := _next(prompt)) is not None:
        ids = first(text) if answer is None else session.dialogue.turn(text, answer.ids[0])
        answer = session.answer(ids, args.max_new_tokens)
        console.print(f"{answer.summary}; {session.held}", style="dim")


def _next(prompt: str) -> str | None:
    """The next question, or None at the end."""
    from ahn.cli._session import console

    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return None
        if text in LEAVE:
            return None
        if text == "/help":
            console.print(HELP)
        elif text:
            return text
