"""Memory and time of `ahn read` over a long text, with a tiny random model: what is left is reading and tokenising.

python benchmarks/stream.py --megabytes 1 20 200 -o benchmarks/results/stream.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    *(
        "The",
        "old",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        "and",
        "looked",
        "at",
        "12",
        "mice.",
        "Wo",
        "ist",
        "die",
        "Maus?",
    ),
    *("猫坐在垫子上。", "🐈", "f(x)", "=", "{y:", "3};\n"),
]


def write_base(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_text(path: Path, megabytes: int) -> None:
    import random

    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            file.write(" ".join(draw.choices(WORDS, k=10_000)))


def measure(folder: Path, megabytes: int) -> dict[str, float]:
    text, memory = folder / "text.txt", folder / "text.ahn"
    write_text(text, megabytes)
    options = ["--base", str(folder / "base"), "--window", "64", "--sinks", "4", "--chunk", "8192", "--force"]
    command = [sys.executable, "-m", "ahn", "read", str(text), "-o", str(memory), *options]
    began, first, line = time.monotonic(), 0.0, ""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        first = first or time.monotonic() - began
        print(line, end="", file=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {line}")
    seconds = time.monotonic() - began
    tokens = json.loads(subprocess.check_output([sys.executable, "-c", TOKENS, str(memory)]))
    return {
        "megabytes": megabytes,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "first_line_s": round(first, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


TOKENS = "import sys; from ahn.memory.file import peek; print(peek(sys.argv[1])['tokens_seen'])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 20])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_base(Path(name) / "base")
        rows = [measure(Path(name), megabytes) for megabytes in args.megabytes]
    print(json.dumps(rows, indent=1))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
