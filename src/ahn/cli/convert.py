"""Convert the authors' checkpoint to an adapter of ours, or merge a trained memory with its base.

  ahn convert AHN-GDN-for-Qwen-2.5-Instruct-3B -o adapter

With --base the folder is a model of its own: ahn ask --base FOLDER needs nothing else.
"""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub id, the authors' or ours")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="the folder to write")
    parser.add_argument("--base", metavar="B", help="put this base's weights and tokenizer into the folder too")


def run(args: argparse.Namespace) -> None:
    from ahn.adapter import convert

    folder = convert(args.checkpoint, args.output, args.base)
    base = folder if args.base else "BASE"
    adapter = "" if args.base else f" --adapter {folder}"
    print(f'wrote {folder}; try it with: ahn ask --base {base}{adapter} --document FILE "..."')
