"""Talk about a document or a memory file, or about nothing in particular.

  ahn chat --memory book.ahn

Ctrl-C stops an answer, or clears the line; /quit, /exit or Ctrl-D leaves. Pasted lines are
one message. From a pipe, each line is a message.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ahn.cli import _options
from ahn.errors import ConfigError
from ahn.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ahn.cli._session import Answer

HELP = "/quit, /exit or Ctrl-D leaves, Ctrl-C stops an answer or clears the line, /help says so"
ANY = "?"  # the shortest question
COMMANDS = ("/exit", "/help", "/quit")


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--document",
        metavar="FILE",
        action="append",
        help="a document, folder or pattern, can be given again",
    )
    source.add_argument("--memory", metavar="FILE", help="a memory made by ahn read")
    parser.add_argument("-o", "--output", metavar="FILE", help="keep what was read of the document in a memory file")
    _options.add_force(parser)
    _options.add_archive(parser)
    _options.add_recall(parser)
    _options.add_answer(parser)
    _options.add_model(parser)


def run(args: argparse.Namespace) -> None:
    from ahn.cli._console import console, counted
    from ahn.cli._reading import read_document_into
    from ahn.cli._session import Session
    from ahn.recall import Found, as_text, finders

    finders.check_name(args.finder)
    if "-" in (args.document or ()):
        raise ConfigError("--document -: questions come from standard input; expected a file")
    if args.output and not args.document:
        raise ConfigError(f"-o {args.output}: goes with --document")
    if args.document:
        session, summary = read_document_into(args, question=ANY)
        console.print(f"read    {summary}")
    else:
        session = Session(args, args.memory, ANY if args.memory else None)
        if not args.memory:
            session.introduce()
        else:
            console.print(f"memory  {counted(session.cache.tokens_seen, 'token')}; {session.held}")

    line = _line_reader()
    opened = bool(args.document or args.memory)
    dialogue, answer = session.dialogue, None

    def turn(before: Answer | None, text: str, passages: str = "") -> Tensor:
        if before is not None:
            return dialogue.turn(text, before.ids[0], passages)
        return dialogue.question(text, passages) if opened else dialogue.start(text)

    while (text := _next(line)) is not None:
        # support is judged only if there is a document to answer from
        try:
            found = session.find(text, args, partial(turn, answer), judge=opened) if opened or answer else Found()
        except ConfigError as error:  # too long a question
            console.print(error.told(args.named))
            continue
        if found.supported or args.guess:
            recalled = turn(answer, text, as_text(found.sources)) if found.sources else None
            answer = session.turn(turn(answer, text), recalled, args.max_new_tokens)
        else:
            answer = session.say(turn(answer, text))
        if args.sources:
            session.show(found, text, args)
        console.print(f"{answer.summary}; {session.held}", style="dim")


def _line_reader() -> Callable[[], str]:
    """Returns the next message at each call; raises EOFError at the end, KeyboardInterrupt after Ctrl-C."""
    if not sys.stdin.isatty():
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    from ahn.cli._console import console

    console.print(HELP)
    session: PromptSession[str] = PromptSession("> ", output=create_output(sys.stderr))
    return session.prompt


def _next(line: Callable[[], str]) -> str | None:
    """The next question, or None at the end."""
    from ahn.cli._console import console

    while True:
        try:
            text = line().strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            continue
        found = re.fullmatch(r"(/\w*)([ \t].*)?", text)
        command = found[1] if found else ""  # the rest of the line is ignored
        if text in ("exit", "quit") or command in ("/exit", "/quit"):
            return None
        if command == "/help":
            console.print(HELP)
        elif command:
            console.print(f"unknown command {command}: expected {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
        elif text:
            return text
