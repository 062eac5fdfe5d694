"""Compare ways to remember on benchmarks: one command, one folder of results.

  ahn eval --base qwen2.5-0.5b --adapter A --tasks ruler --length 8192 --lossless 1024 --output results
  ahn eval --suite comparison.yaml data=FOLDER
  ahn eval --list

Every combination of task, length and policy is run on the same prompts. Finished examples are not done again, so an
interrupted run continues where it was. --together 8 shares the work among 8 processes, on as many GPUs as there are.
`ahn report` makes tables and plots of the results.

A suite is a YAML file. Its keys are these options, and `runs`, a list with the keys that differ from run to run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ahn.cli import _guard, _options
from ahn.errors import AHNError, ConfigError
from ahn.registry import nearest

if TYPE_CHECKING:
    from ahn.eval.options import Options
    from ahn.eval.work import Work

UNFINISHED = 75  # exit code where --seconds ended a run: the same command goes on
OUTPUT = Path("results")
OF_ALL = ("output", "seconds", "together")  # options that hold for all runs of a suite


def arguments(parser: argparse.ArgumentParser) -> None:
    one, shown = _options.at_least(1), "(default: %(default)s)"
    parser.add_argument("--list", action="store_true", help="show tasks and policies")
    parser.add_argument("--tasks", nargs="+", metavar="T", default=[], help="tasks, suites or groups of tasks")
    parser.add_argument(
        "--policies",
        nargs="+",
        metavar="P",
        help="default: window, and with a memory ahn; store needs --store and --store-size (--list shows all)",
    )
    parser.add_argument("--length", nargs="+", type=one, metavar="N", help="tokens of a prompt (default: the task's)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the benchmarks' data (default: from the hub)")
    parser.add_argument("--limit", type=one, metavar="N", help="examples of each task, at most")
    parser.add_argument("--batch", type=one, metavar="N", default=1, help=f"examples read at once, at most {shown}")
    parser.add_argument("--seed", type=_options.at_least(0), default=0, metavar="N", help=f"of what is drawn {shown}")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"(default: the suite's, else {OUTPUT})")
    group = parser.add_argument_group("many runs")
    group.add_argument("--suite", metavar="FILE", help="run what a YAML file says")
    group.add_argument("changes", nargs="*", default=[], metavar="key=value", help="keys to change in all runs")
    group.add_argument("--seconds", type=float, metavar="S", help=f"begin nothing after these; exit code {UNFINISHED}")
    group.add_argument("--together", type=one, metavar="N", default=1, help=f"processes that share the work {shown}")
    group = parser.add_argument_group("model and memory")
    group.add_argument("--base", metavar="B", default="smollm2-135m", help=f"hub id, folder or .gguf file {shown}")
    group.add_argument(
        "--adapter",
        metavar="A",
        help="trained memory: folder, hub id, the name of a shipped one, or none (default: the base's)",
    )
    group.add_argument("--lossless", type=one, metavar="N", help="tokens kept exactly, sinks included")
    group.add_argument("--sinks", type=_options.at_least(0), metavar="N", help="first tokens of these")
    _options.add_store(group, "its share in the adapter", "the adapter's for its own store, else 1")
    group.add_argument(
        "--recall", type=one, metavar="N", default=512, help=f"tokens read again, for recall and rag {shown}"
    )
    _options.add_finder(group, "how passages are found, for recall")
    group.add_argument("--rounds", type=int, choices=(1, 2), default=1, help=f"of finding, for recall {shown}")
    group.add_argument("--yarn", type=float, metavar="F", help="for full: extend the base's positions F times")
    group.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...")


class Planned(NamedTuple):
    """The prompts of one run, its policies and its options."""

    works: list[Work]
    policies: list[str]
    options: Options


def run(args: argparse.Namespace) -> int | None:
    if args.list:
        print("\n".join(_listing()))
        return None
    from ahn.eval.processes import first_process, several, start

    if args.together > 1 and not several():
        return start(args.together, ["-m", "ahn", *sys.argv[1:]])

    import transformers

    from ahn.cli._console import console
    from ahn.eval import compare, report, results, runner, suite

    transformers.logging.set_verbosity_error()
    if args.suite is None:
        if args.changes:
            raise ConfigError(f"{args.changes[0]!r}: keys go with --suite")
        plan = suite.Suite([], None, None, None)
        runs = [args]
    else:
        plan = suite.load(args.suite, args.changes)
        _check_alone(args)
        runs = [_parsed(keys, args.suite) for keys in plan.runs]
    output = args.output or plan.output or OUTPUT
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: is no folder")
    prompts: dict[tuple[Any, ...], list[Work]] = {}
    planned = [_planned(one, prompts) for one in runs]

    end = time.monotonic() + (float("inf") if args.seconds is None else args.seconds)
    control = runner.Control(console.print, lambda: time.monotonic() > end)
    folders, failed = [], []
    titles = plan.titles()
    for number, (works, names, options) in enumerate(planned, 1):
        if len(planned) > 1 and first_process():
            console.print(titles[number - 1])
        try:
            folders += runner.run_prepared(works, names, options, output, control)
        except Exception as error:  # one run that fails must not cost the others
            if len(planned) == 1 or several():
                raise
            failed.append(f"run {number}: {_guard.reason(error)}")
            console.print(failed[-1])
        if first_process():
            suite.write_summary(plan, [results.load(folder) for folder in dict.fromkeys(folders)])
    if first_process():
        found = [results.load(folder) for folder in dict.fromkeys(folders)]
        groups = compare.grouped(found) if args.suite else []
        for group in groups:
            every = [one for of in group.results.values() for by in of.values() for one in by.values()]
            print(f"{group.title}\n{report.brief(every).text()}")
        if not groups:
            print(report.brief(found).text())
        console.print(f"differences, costs and all results of this folder: ahn report {output}")
    if failed:
        raise AHNError(f"{len(failed)} of {len(planned)} runs failed: {'; '.join(failed)}")
    if time.monotonic() > end:
        console.print("time is over: the same command continues from here")
        return UNFINISHED
    return None


def _planned(args: argparse.Namespace, prompts: dict[tuple[Any, ...], list[Work]]) -> Planned:
    """The plan of one run, checked before a model is loaded. `prompts` holds those of earlier runs; more are added."""
    from ahn.eval import policies, tasks

    if not args.tasks:
        raise ConfigError("--tasks: expected at least one; `ahn eval --list` shows them")
    wanted = tasks.expand(args.tasks)
    for name in args.policies or ():
        policies.check_name(name)
    if args.data is not None and not args.data.exists():
        raise ConfigError(f"--data {args.data}: no such file or folder")

    from ahn.adapter import chosen
    from ahn.bases import base_config
    from ahn.eval import runner, work
    from ahn.eval.kept import exact_sizes
    from ahn.eval.options import Options
    from ahn.recall import Recall

    adapter = None if (found := chosen(args.base, args.adapter)) is None else str(found)
    names = args.policies or ["window", *(["ahn"] if adapter else [])]
    window, sinks = exact_sizes(base_config(args.base), adapter, args.lossless, args.sinks)
    options = Options(
        base=args.base,
        window=window,
        sinks=sinks,
        adapter=adapter,
        store=_stored(args, names, adapter, window),
        dtype=args.dtype,
        device=args.device,
        yarn=args.yarn,
        recall=Recall(args.recall, args.finder, args.rounds),
        data=args.data,
        seed=args.seed,
        limit=args.limit,
        batch=args.batch,
        share=getattr(args, "share", None),
    )
    _check_finding(args, names, window)
    runner.check(names, options)
    lengths = args.length or [None]
    key = args.base, args.data, args.seed, args.limit, *args.tasks, *lengths
    if key not in prompts:
        prompts[key] = work.prepare(wanted, lengths, options)
    return Planned(prompts[key], names, options)


class _KeyParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _known() -> _KeyParser:
    """The parser of one run."""
    parser = _KeyParser(add_help=False, allow_abbrev=False)
    arguments(parser)
    return parser


def _check_alone(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that would be ignored because a suite is given."""
    for key, default in vars(_known().parse_args([])).items():
        value = getattr(args, key)
        if key not in ("suite", "changes", *OF_ALL) and value != default:
            given = value if not isinstance(value, list) else f"[{','.join(map(str, value))}]"
            raise ConfigError(f"--{key.replace('_', '-')}: with --suite, write {key}={given}")


def _parsed(keys: dict[str, Any], source: str) -> argparse.Namespace:
    """The keys of a run as the command line would have them. Raises ConfigError."""
    parser, words, share = _known(), [], keys.get("share")
    known = [key for key in vars(parser.parse_args([])) if key not in ("list", "suite", "changes", *OF_ALL)]
    for key, value in keys.items():
        if key == "share":  # of the suite's own making
            continue
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}{nearest(key, known)}")
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, dict | list | bool) for one in values):
            raise ConfigError(f"{source}: {key}: {value!r}: expected text or a number")
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, list):
            words += [option, *map(str, value)]
        elif value is not None:
            words.append(f"{option}={value}")
    try:
        found = parser.parse_args(words)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return argparse.Namespace(**vars(found), share=share)


def _stored(args: argparse.Namespace, names: list[str], adapter: str | None, window: int) -> Any:
    """The store asked for, else the adapter's own, with the share of the window that it has there."""
    from ahn import zoo
    from ahn.config import AHNConfig
    from ahn.eval import policies
    from ahn.eval.kept import Stored, trained

    own = trained(adapter).config if adapter else AHNConfig(None)
    name = args.store or own.store
    if name != own.store:
        own = own.without_store()
    size = args.store_size or round(window * own.store_size / (own.store_size + own.window))
    span = args.store_span or own.store_span
    name = _options.check_store(args, name, size, span, zoo.with_store(args.base))
    if name is None:
        return None
    if args.store and not any(policies.get(policy).uses_store for policy in names):
        raise ConfigError(f"--store {name}: no policy of {', '.join(names)} has one; expected ahn or store among them")
    return Stored(name, size, span)


def _check_finding(args: argparse.Namespace, names: list[str], window: int) -> None:
    """Raises ConfigError for a `--recall` beyond the window, and for an option of finding that no policy takes."""
    from ahn.eval import policies

    if args.recall >= window and any(policies.get(name).recalls for name in names):  # a question has tokens too
        raise ConfigError(
            f"--recall {args.recall}: the window of {window:,} tokens holds the question too: "
            f"expected less than {window:,}"
        )
    if any(policies.get(name).finds for name in names):
        return
    defaults = _known().parse_args([])
    for key in ("finder", "rounds"):
        if (value := getattr(args, key)) != getattr(defaults, key):
            raise ConfigError(f"--{key} {value}: no policy of {', '.join(names)} has it; expected recall among them")


def _listing() -> Iterator[str]:
    from ahn.eval import policies, tasks

    for group, names in tasks.groups().items():
        sets = ", ".join(name.partition("/")[2] for name in names)
        yield f"{group:<24}{sets}"
    yield ""
    for name in policies.names():
        cls = policies.get(name)
        yield f"{name:<24}{(cls.__doc__ or '').strip().splitlines()[0]}"
