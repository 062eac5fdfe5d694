"""Compare ways to remember on benchmarks: one command, one folder of results.

  ahn eval --base qwen2.5-0.5b --adapter A --tasks ruler --length 8192 --lossless 1024 --output results
  ahn eval --list

Every combination of task, length and policy is run on the same prompts. What is done already is not done again, so an
interrupted run goes on where it was. On several GPUs: torchrun --nproc-per-node 8 -m ahn eval ... `ahn report` makes
tables and plots of the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ahn.cli import _options
from ahn.errors import ConfigError


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
    parser.add_argument("--output", type=Path, metavar="FOLDER", default="results", help=f"{shown}")
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
    group.add_argument("--finder", metavar="F", default="fused", help=f"how passages are found, for recall {shown}")
    group.add_argument("--context", choices=("memory", "alone", "both"), default="memory")
    group.add_argument("--twice", action="store_true")
    group.add_argument("--rounds", type=int, choices=(1, 2), default=1, help=f"of finding, for recall {shown}")
    group.add_argument("--yarn", type=float, metavar="F", help="for full: extend the base's positions F times")
    group.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> None:
    from ahn.eval import tasks

    if args.list:
        print("\n".join(_listing()))
        return
    if not args.tasks:
        raise ConfigError("--tasks: expected at least one; `ahn eval --list` shows them")
    wanted = tasks.expand(args.tasks)
    from ahn.eval import policies

    for name in args.policies or ():
        policies.check_name(name)
    if args.data is not None and not args.data.exists():
        raise ConfigError(f"--data {args.data}: no such file or folder")
    if args.output.exists() and not args.output.is_dir():
        raise ConfigError(f"--output {args.output}: is no folder")

    import transformers

    from ahn.adapter import chosen
    from ahn.bases import base_config
    from ahn.eval import report, results, runner
    from ahn.eval.policies.base import Recalled, exact_sizes

    transformers.logging.set_verbosity_error()
    adapter = None if (found := chosen(args.base, args.adapter)) is None else str(found)
    names = args.policies or ["window", *(["ahn"] if adapter else [])]
    window, sinks = exact_sizes(base_config(args.base), adapter, args.lossless, args.sinks)
    options = runner.Options(
        base=args.base,
        window=window,
        sinks=sinks,
        adapter=adapter,
        store=_stored(args, names, adapter, window),
        dtype=args.dtype,
        device=args.device,
        yarn=args.yarn,
        recall=Recalled(args.recall, args.finder, args.rounds, args.context, args.twice),
        data=args.data,
        seed=args.seed,
        limit=args.limit,
        batch=args.batch,
    )
    from ahn.cli._session import console

    folders = runner.run(wanted, names, args.length or [None], options, args.output, console.print)
    from ahn.eval.processes import first_process

    if first_process():
        print(report.brief([results.load(folder) for folder in folders]).text())
        console.print(f"differences, costs, and what other runs left in {args.output}: ahn report {args.output}")


def _stored(args: argparse.Namespace, names: list[str], adapter: str | None, window: int) -> Any:
    """The store asked for, else the adapter's own, with the share of the window that it has there."""
    from ahn import zoo
    from ahn.config import AHNConfig
    from ahn.eval import policies
    from ahn.eval.policies.base import Stored, trained

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


def _listing() -> Iterator[str]:
    from ahn.eval import policies, tasks

    for group, names in tasks.groups().items():
        sets = ", ".join(name.partition("/")[2] for name in names)
        yield f"{group:<24}{sets}"
    yield ""
    for name in policies.names():
        cls = policies.get(name)
        yield f"{name:<24}{(cls.__doc__ or '').strip().splitlines()[0]}"
