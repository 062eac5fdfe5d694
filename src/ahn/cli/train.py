"""Train a memory by self-distillation: the base with full attention teaches itself with window and memory."""

from __future__ import annotations

import argparse
import os


def arguments(parser: argparse.ArgumentParser) -> None:
    from ahn.train.recipe import describe

    parser.epilog = describe()
    parser.add_argument("recipe", help="YAML file; see recipes/")
    parser.add_argument(
        "changes", nargs="*", default=[], metavar="key=value", help="settings that go before the file's"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--check", action="store_true", help="only compare this machine's gradients with plain torch")


def run(args: argparse.Namespace) -> None:
    from ahn.train import recipe

    plan = recipe.load(args.recipe, args.changes)
    from torch import distributed

    from ahn.train.prepare import check_machine
    from ahn.train.run import train
    from ahn.train.sources import check_there

    first = int(os.environ.get("RANK", 0)) == 0  # torchrun starts several processes; only this one prints
    if not args.check:
        check_there(list(plan.data))
    compared = check_machine(plan)
    for row in compared:
        if first and (args.check or row.value > row.allowed / 2):
            print(f"{row.name:<46}{row.value:>10.1e}  allowed {row.allowed:.0e}")
    if args.check and first:
        print(f"all {len(compared)} are within what is allowed")
    if not args.check:
        adapter = train(plan, args.resume)
        if first:
            print(f"adapter in {adapter}")
        if distributed.is_initialized():
            distributed.destroy_process_group()  # NCCL complains of processes that just end
