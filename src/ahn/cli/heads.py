"""Choose the heads by which a base finds passages, and write them to an adapter.

  ahn heads --base qwen.gguf --data squad-train.jsonl.xz -o heads
  ahn heads --base qwen.gguf --adapter qwen-deltanet --data squad-train.jsonl.xz -o qwen-deltanet-heads

The questions are those of the task qa/squad. With --adapter the new folder has its weights too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ahn.cli import _options


def arguments(parser: argparse.ArgumentParser) -> None:
    one = _options.at_least(1)
    parser.add_argument("--base", required=True, metavar="B", help="hub id, folder or .gguf file")
    parser.add_argument("--adapter", default="none", metavar="A", help="a trained memory to add them to")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="articles with questions, as SQuAD's")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the adapter to write")
    shown = "(default: %(default)s)"
    parser.add_argument("--length", type=one, default=16_384, metavar="N", help=f"tokens of a text {shown}")
    parser.add_argument("--lossless", type=one, default=2048, metavar="N", help=f"tokens kept exactly {shown}")
    parser.add_argument("--questions", type=one, default=96, metavar="N", help=f"how many {shown}")
    parser.add_argument("--bytes", type=one, default=128, metavar="N", help=f"of keys, a token {shown}")
    parser.add_argument("--seed", type=_options.at_least(0), default=0, metavar="N", help="of the choice of questions")
    parser.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> None:
    import transformers
    from rich.progress import Progress

    from ahn.adapter import NONE, from_pretrained
    from ahn.adapter_files import write_adapter
    from ahn.bases import load_tokenizer
    from ahn.cli._console import console
    from ahn.dialogue import Dialogue
    from ahn.errors import ConfigError
    from ahn.eval.prompts import encode
    from ahn.eval.tasks import get
    from ahn.hf.weights import adapter_of
    from ahn.train.heads import EACH, choose_heads, few_texts

    transformers.logging.set_verbosity_error()
    if not args.data.is_file():
        raise ConfigError(f"--data {args.data}: no such file; expected articles with questions, as SQuAD's")
    tokenizer = load_tokenizer(args.base)
    examples = get("qa/squad").examples(
        tokenizer=tokenizer, length=args.length, data=args.data, seed=args.seed, limit=None
    )
    chosen, dialogue = few_texts(examples, args.questions, EACH, args.seed), Dialogue(tokenizer)
    work = [(encode(tokenizer, example, dialogue), example) for example in chosen]
    sizes = {"lossless": args.lossless} if args.adapter != NONE else {"window": max(1, args.lossless - 64), "sinks": 64}
    model = from_pretrained(args.base, args.adapter, dtype=args.dtype, device=args.device, **sizes)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("questions", total=len(work))
        model.ahn_retrieval = choose_heads(
            model, tokenizer, work, args.bytes, lambda done, total: bar.update(task, completed=done)
        )
    found = adapter_of(model)
    write_adapter(found, args.output)
    named = ", ".join(f"{layer}.{head}" for layer, head in model.ahn_retrieval.heads)
    console.print(f"heads   {named} (layer.head); {model.ahn_retrieval.bytes_per_token:.0f} bytes a token")
    console.print(f"saved   {args.output}")
