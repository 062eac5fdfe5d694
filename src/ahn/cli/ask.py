"""Ask a question about a document, or about a memory file that `ahn read` has made.

  ahn ask --document book.txt "Who is the narrator?"
  ahn ask --memory book.ahn "Who is the narrator?"

The answer goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse

from ahn.cli import _options
from ahn.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="+", help="what you want to know")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--document",
        metavar="FILE",
        action="append",
        help="a document, folder or pattern, can be given again; - for standard input",
    )
    source.add_argument("--memory", metavar="FILE", help="a memory made by ahn read")
    parser.add_argument("-o", "--output", metavar="FILE", help="keep what was read of the document in a memory file")
    _options.add_force(parser)
    _options.add_archive(parser)
    _options.add_recall(parser)
    _options.add_answer(parser)
    _options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    from ahn.cli import INTERRUPTED
    from ahn.cli._checks import check_question
    from ahn.cli._console import console, counted
    from ahn.cli._reading import read_document_into
    from ahn.cli._session import Session
    from ahn.recall import finders

    finders.check_name(args.finder)
    question = check_question(" ".join(args.question))
    if args.memory:
        if args.output:
            raise ConfigError(f"-o {args.output}: goes with --document; {args.memory} is a memory already")
        session = Session(args, args.memory, question)
        summary = f"{counted(session.cache.tokens_seen, 'token')} before, kept in {args.memory}; {session.held}"
    else:
        session, summary = read_document_into(args, question=question)
    found = session.find(question, args)
    guess = found.supported or args.guess
    answer = session.answer_from(found, question, args.max_new_tokens) if guess else session.say()
    if args.sources:
        session.show(found, question, args)
    console.print(f"read    {summary}")
    console.print(f"answer  {answer.summary}")
    return INTERRUPTED if answer.stopped else 0
