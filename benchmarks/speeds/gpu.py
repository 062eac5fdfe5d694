"""Reading and decoding on a GPU, each number beside its floor; transformers' full attention as the baseline.

    python benchmarks/speed.py gpu [--seconds 540] [--only decode:1 qwen2.5-3b:full ...] [--authors SCRIPT] [--profile]
    python benchmarks/speed.py gpu --base FILE.gguf    # real weights: the time of `ahn read` and `ahn ask`

The base has the shape of a real one and random weights in bfloat16. The cells of the table are measured in order of
importance until `--seconds` have passed. The file in results/ is written after each cell. A cell that fails is noted
with its error and with the numbers that it measured before. Only an error that CUDA does not recover from ends the run.

A floor is the work that the method cannot avoid, divided by the best rate of this device.
- Reading: the matrix products (`ahn cost`, logits of the last token only), at the measured rate of one of 8,192 x 8,192
  x 8,192.
- Decoding: the bytes of a step at the measured bandwidth of a large copy, or its products at that rate, whichever takes
  longer. The bytes are the weights and, for each row, keys, values and twice the state (read and written).

A cell may have a store. In `gated_deltanet+learned` 74% of the window's slots belong to the store. Its gate is random,
so it keeps arbitrary tokens. `--lossless` sets sinks and window together, for all cells.

Decoding alone starts from a cache of random numbers; no text is read for it. Full attention decodes with transformers'
default cache, which copies all keys and values for each token. "load" saves a memory, then times reading the file and
the first token after a question (`ahn.generate`). The system still holds that file in its own cache.

`--authors SCRIPT` measures the code of the paper's authors beside ours: `python SCRIPT LENGTH` prints one JSON line
with prefill_s, peak_gib and decode_ms.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ahn.cli.info import report
from ahn.compat import PAST
from common import BOOK, matmul_rate, now, random_model, write
from speeds._floors import Ceilings, Floors, config_of
from speeds._measures import ANSWER, ask, copy_rate, decode, fill, generate, load, read
from speeds._table import K, cells_of_table, coder, line

NAME, TINY = "gpu", "--seconds 600 --tiny"

LOSSLESS, SINKS = 32768, 128
STEPS = 64  # decoded in one measurement
HANGS = 60  # seconds that a run may take beyond `--seconds` before it is ended


def profiled(call: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60))


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.options, self.began = options, time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sinks = 8 if options.tiny else SINKS
        self.window = (48 if options.tiny else options.lossless) - self.sinks
        self.ceilings = Ceilings(matmul_rate(self.device), copy_rate(self.device))
        self.kernels = [list(row) for row in report()]
        self.model: Any = None
        self.loaded = ""
        self.floors: Floors
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.began)

    def put(self, name: str, cell: str) -> None:
        """Make the base of this shape the model, with the memory of this cell, or without one if it is "full"."""
        import torch

        import ahn
        from ahn.cost import PAPER, Shape

        if name != self.loaded:
            self.model, self.loaded = None, ""
            gc.collect()
            if self.device.type == "cuda":
                torch.compiler.reset()  # a function is compiled for eight shapes at most
            tiny = Shape(2, 64, 4, 2, 16, 96, 128, tied=True)
            shape = {**PAPER, "tiny": tiny, "qwen2.5-coder-0.5b": coder()}[name]
            self.model, self.loaded = random_model(shape, self.device), name
            self.floors = Floors(shape, self.model.dtype.itemsize, self.window, self.sinks, self.ceilings)
        if hasattr(self.model, "ahn_config"):
            ahn.detach(self.model)
            gc.collect()  # frees the graph of the previous cell and its buffers
        if cell == "full":
            self.model.set_attn_implementation("sdpa")
        else:
            ahn.augment(self.model, config_of(cell, self.window, self.sinks))
            for parameter in self.model.parameters():
                if parameter.dim() == 3 and not parameter.any():
                    parameter.data.normal_(std=0.02)  # a trained memory has no zeros there

    def put_real(self) -> Any:
        """Make the base with real weights the model; its memory is untrained, which costs as much as a trained one.

        Returns:
            the tokenizer.
        """
        import ahn
        from ahn.cost import Shape

        base = self.options.base
        if not self.loaded:
            small = {"window": self.window, "sinks": self.sinks} if self.options.tiny else {}
            self.model, self.loaded = ahn.from_pretrained(base, cell=self.options.cell, **small), base
            config = self.model.ahn_config
            self.window, self.sinks = config.window, config.sinks
            shape = Shape.from_config(self.model.config)
            self.floors = Floors(shape, self.model.dtype.itemsize, self.window, self.sinks, self.ceilings)
        return ahn.load_tokenizer(base)

    def measure(self, row: dict[str, Any]) -> None:
        """Fill in a row in place, so that numbers measured before an error stay in it."""
        import torch

        with torch.no_grad():
            getattr(self, "_" + row["what"])(row, *(row[name] for name in ("shape", "cell", "batch", "length")))

    def _read(self, row: dict[str, Any], name: str, cell: str, batch: int, length: int) -> None:
        self.put(name, cell)
        start = now(self.device)
        read(self.model, cell, batch, self._as_long(cell, batch, length), 1)  # builds kernels
        row["first_s"] = now(self.device) - start
        self._reset_peak()
        found, cache = read(self.model, cell, batch, length, 1 if length > 256 * K else 3)
        row |= found
        self._note_peak(row)
        row["tokens_per_s"] = batch * length / found["prefill_s"]
        row["floor_s"] = self.floors.read(cell, batch, length)
        row["of_floor"] = row["floor_s"] / found["prefill_s"]
        if cell != "full":
            self._note_cache(row, cache)
        if self.options.profile:
            cache = None
            profiled(lambda: read(self.model, cell, batch, min(length, 64 * K), 1))

    def _as_long(self, cell: str, batch: int, length: int) -> int:
        """Length of a short text whose chunks have all the lengths that the chunks of a long one have."""
        from ahn.engine.prefill import chunks

        enough = 2 * (self.window + self.sinks)
        if length <= enough or cell == "full":
            return min(length, enough)
        chunk = chunks(self.model, batch, 0).size
        return min(length, enough + (length - enough) % chunk)

    def _decode(self, row: dict[str, Any], name: str, cell: str, batch: int, length: int) -> None:
        import torch

        self.put(name, cell)
        cache = fill(self.model, cell, batch, length)
        steps = 8 if self.options.tiny else STEPS
        self._reset_peak()
        row |= decode(self.model, cache, batch, steps, self.device)
        self._note_peak(row)
        row["floor_ms"] = 1000 * self.floors.decode(cell, batch, length)
        row["of_floor"] = row["floor_ms"] / row["decode_ms"]
        row["gib_a_step"] = self.floors.decode_bytes(cell, batch, length) / 2**30
        if cell != "full":
            frame = self.model._ahn
            row["graph"] = "no" if frame.graph is None else "yes"
            if frame.no_graph:
                row["no_graph"] = frame.no_graph
            if batch == 1:
                row |= generate(self.model, cache, steps)
        if self.options.profile:
            ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
            one = {PAST: cache, "use_cache": True, "logits_to_keep": 1}
            profiled(lambda: [self.model(ids, **one) for _ in range(4)])

    def _load(self, row: dict[str, Any], name: str, cell: str, batch: int, length: int) -> None:
        self.put(name, cell)
        row |= load(self.model, fill(self.model, cell, batch, length))

    def _ask(self, row: dict[str, Any], name: str, cell: str, batch: int, length: int) -> None:
        import torch

        from ahn.documents import read_document

        tokenizer = self.put_real()
        config = self.model.ahn_config
        row |= {"memory": config.cell, "window": config.window, "sinks": config.sinks}
        words = tokenizer(read_document(BOOK), verbose=False).input_ids
        ids = torch.tensor([(words * (length // len(words) + 1))[:length]])
        start = now(self.device)
        read(self.model, config.cell, 1, min(length, 2 * config.lossless), 1)  # builds kernels
        row["first_s"] = now(self.device) - start
        self._reset_peak()
        row |= ask(self.model, tokenizer, ids)
        self._note_peak(row)
        row["floor_s"] = self.floors.read(config.cell, 1, length)
        row["of_floor"] = row["floor_s"] / row["prefill_s"]
        row["answer_floor_s"] = ANSWER * self.floors.decode(config.cell, 1, length)

    def _reset_peak(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _note_peak(self, row: dict[str, Any]) -> None:
        import torch

        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30

    def _note_cache(self, row: dict[str, Any], cache: Any) -> None:
        held = row["batch"] * self.floors.cost(row["cell"], row["length"]).held_bytes
        row |= {"cache_gib": cache.nbytes / 2**30, "cache_over_model": cache.nbytes / held - 1}
        if not cache.nbytes:
            raise RuntimeError("the cache is empty: the model read past its memory")

    def recovers(self) -> bool:
        """Whether the device still works in this process. After an illegal memory access it does not."""
        import torch

        try:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def run(self) -> bool:
        """Measure the table. False if an error of the device ended it early."""
        self.save()  # the device is described in the file, and only a working one can be asked
        cells, spent = cells_of_table(self.options), {"": 0.0}
        for number, cell in enumerate(cells):
            if self.left() < spent.get(cell.what, max(spent.values())):
                self.skipped.append(f"{cell}: {self.left():.0f} s are left")
                continue
            start, row, works = time.monotonic(), dict(cell._asdict()), True
            try:
                self.measure(row)
            except Exception as error:  # a cell that does not fit, or breaks, must not cost the others
                if self.options.raises:
                    raise
                row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
                print(traceback.format_exc(limit=-4)[-3000:], file=sys.stderr)
            if "error" in row:
                self.model, self.loaded = None, ""  # its state is unknown after an error
                works = self.recovers()
            spent[cell.what] = max(spent.get(cell.what, 0), time.monotonic() - start)
            self.note(row)
            if not works:
                self.skipped += [f"{left}: the device does not recover from that error" for left in cells[number + 1 :]]
                self.save()
                return False
        if not self.options.base:
            self.authors()
        self.save()
        return True

    def note(self, row: dict[str, Any]) -> None:
        self.rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
        print(line(self.rows[-1]), flush=True)
        self.save()

    def authors(self) -> None:
        if not self.options.authors:
            self.skipped.append("the authors' code: no --authors script was given")
            return
        self.model = None
        gc.collect()
        self._reset_peak()
        for length in (64 * K, 128 * K):
            command = [sys.executable, self.options.authors, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                self.skipped.append(f"the authors' code: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
                return
            self.note({"shape": "authors", "length": length, **json.loads(done.stdout.splitlines()[-1])})

    def save(self) -> Path:
        ceilings = {"copy_tb_per_s": self.ceilings.copy / 1e12, "matmul_tflops": self.ceilings.matmul / 1e12}
        return write(
            self.options.name, window=self.window, sinks=self.sinks, ceilings=ceilings, kernels=self.kernels,
            rows=self.rows, skipped=self.skipped,
        )  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    words = "only cells with all of these words: shape, cell, what, batch, length"
    parser.add_argument(
        "--seconds",
        type=float,
        default=540,
        help="begin no cell that may take longer than is left of these (%(default)s)",
    )
    parser.add_argument("--only", nargs="+", metavar="WORD:WORD", help=words)
    parser.add_argument("--base", help="real weights: a name, folder or GGUF file that `ahn read --base` takes")
    parser.add_argument("--cell", default="gated_deltanet", help="with --base (%(default)s)")
    parser.add_argument("--lossless", type=int, default=LOSSLESS, help="sinks and window (%(default)s tokens)")
    parser.add_argument("--authors", metavar="SCRIPT", help="script that measures the authors' code")
    parser.add_argument("--profile", action="store_true", help="print the 25 kernels that take the most time")
    parser.add_argument("--raises", action="store_true", help="stop at the first error instead of noting it")


def run(options: argparse.Namespace) -> None:
    import torch

    if not (options.tiny or options.base or torch.cuda.is_available()):
        sys.exit("no GPU here: the 3B shape would take hours; --tiny or --base FILE runs on any device")
    faulthandler.dump_traceback_later(options.seconds + HANGS, exit=True)  # the file is written after each row
    bench = Bench(options)
    whole = bench.run()
    faulthandler.cancel_dump_traceback_later()
    print("\n".join(f"skipped {line}" for line in bench.skipped))
    print(bench.save(), flush=True)
    if not whole:
        os._exit(1)  # destructors would call the broken device, and abort
