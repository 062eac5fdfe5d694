"""Memory and time of `ahn read` over a long text, with a tiny random model: reading and tokenising are left.

python benchmarks/speed.py stream --megabytes 1 20 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import TINY_TEXT, write, write_tiny_base

NAME = "stream"
TINY = "--megabytes 1"
WORDS = TINY_TEXT.split()
TOKENS = "import sys; from ahn.memory.file_format import peek; print(peek(sys.argv[1])['tokens_seen'])"


def write_text(path: Path, megabytes: int) -> None:
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


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 20])


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_tiny_base(Path(name) / "base", size=8, layers=1)
        rows = [measure(Path(name), megabytes) for megabytes in options.megabytes]
    print(json.dumps(rows, indent=1))
    print(write(options.name, rows=rows))
