"""The `ahn` command. Each file of this folder without a leading underscore is one subcommand.

Such a file has a docstring (its help), `arguments(parser)`, and `run(args)`, which may return an exit code. It imports
torch and transformers inside `run` only, so that help comes at once. Another package adds one through the entry-point
group "ahn.cli": my_command = "my_package.my_module".
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from ahn.cli import _guard, _options
from ahn.ops import dispatch
from ahn.registry import nearest, points
from ahn.version import __version__

BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for any error, 130 after Ctrl-C.

    An error is one line on standard error. With AHN_DEBUG=1 in the environment it is raised instead.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    named = None
    try:
        try:
            _guard.open_streams()
            args = _parse(argv)
            named = args.named
            dispatch.check_setting()
            return args.run(args) or 0
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        after_echo = "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C
        print(f"{after_echo}{str(interrupt) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has closed it (`ahn info | head`)
        return 0
    except SystemExit:  # from argparse, which has printed the reason
        raise
    except BaseException as error:  # each library has its own types; those of Rust's panics are no Exception
        if os.environ.get(_guard.DEBUG, "0") != "0":
            raise
        command = f" {argv[0]}" if argv and argv[0] in names() else ""
        with suppress(OSError):  # standard error can be full, too
            print(f"ahn{command}: error: {_guard.reason(error, named)}", file=sys.stderr)
        return BAD_INPUT


def names() -> list[str]:
    """The subcommands, from the files in this folder and from entry points."""
    return sorted(_modules())


def _modules() -> dict[str, Callable[[], Any]]:
    """A function for each subcommand that imports it. Other packages cannot replace those of this folder."""
    here = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    own = {name: partial(import_module, f"{__name__}.{name}") for name in here}
    return {point.name: point.load for point in points(__name__)} | own


def _parse(argv: list[str]) -> argparse.Namespace:
    about = "Read text longer than a model's context in constant memory, and ask."
    parser = _Parser(prog="ahn", description=about, formatter_class=_Overview)
    parser.add_argument("--version", action="version", version=f"ahn {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", parser_class=_CommandParser
    )
    known = names()
    for name, load in sorted(_modules().items()):
        module = load()
        assert module.__doc__, f"{module.__name__} has no docstring"
        summary = module.__doc__.strip().splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=_Help)
        module.arguments(command)
        command.set_defaults(run=module.run, named=_options.namer(command))
    if not argv:
        parser.print_help()
        parser.exit(BAD_INPUT)
    if not argv[0].startswith("-") and argv[0] not in known:
        parser.error(f"unknown command {argv[0]!r}: expected one of {', '.join(known)}{nearest(argv[0], known)}")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == "":  # as of a variable of the shell that is not set
            parser.error(f"{args.named(name, repr(value))}: expected some text")
    return args


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


class _Overview(argparse.HelpFormatter):
    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(
            action
        )  # argparse ignores the indent of commands and would put long names on lines of their own
        self._action_max_length = max(self._action_max_length, 4 + max(map(len, names())))


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse hides errors of this write

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {_guard.shortened(message)}\n")


class _Plain(str):
    """A word after `--`, which is never an option."""


class _CommandParser(_Parser):
    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._mixing:
            return super().parse_known_args(args, namespace)
        words = list(args or ())
        end = words.index("--") if "--" in words else len(words)
        # checked first, because argparse would complain about the argument that the mistyped option should provide
        for word in words[:end]:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                self.error(f"unknown option {option}{nearest(option, self._option_string_actions)}")
        self._mixing = True
        try:  # options may stand between other words, as in `ahn train recipe.yaml --resume steps=900`
            plain = map(_Plain, words[end + 1 :])  # argparse would drop `--` in the first of two passes
            return self.parse_known_intermixed_args([*words[:end], *plain], namespace)
        finally:
            self._mixing = False

    def _parse_optional(self, arg_string: str) -> Any:
        return None if isinstance(arg_string, _Plain) else super()._parse_optional(arg_string)
