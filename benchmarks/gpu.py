"""Reading and decoding on a GPU, each number beside its floor; transformers' full attention as the baseline.

    python benchmarks/gpu.py [--seconds 540] [--only qwen2.5-3b ...] [--authors SCRIPT] [--profile]
    python benchmarks/gpu.py --tiny          # a tiny shape with tiny lengths, on any device: does it run at all?

The base has the shape of a real one and random weights, bfloat16. The cells of the table are measured in order of
importance until `--seconds` have passed, and the file in results/ is written after each.

Floors: what the method has to move or multiply, over what this device does in the best case. Reading: the matrix
products (`ahn cost`, logits of the last token only) over the measured rate of one of 8,192 x 8,192 x 8,192. Decoding:
the weights once a step and, for each row, keys, values, gate inputs and twice the state (read and written), over the
measured bandwidth of a large copy, or the products of the step over the rate, whichever is longer.

Caches that are only decoded from are filled with random numbers instead of being read. `--authors SCRIPT` measures
their code beside ours: `python SCRIPT LENGTH` prints one JSON line with prefill_s, peak_gib and decode_ms.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ahn.cache import PAST
from common import now, write
from train import matmul_rate, random_model

WINDOW, SINKS = 32640, 128
STEPS = 64  # decoded for one time of decoding
K = 1024


def coder() -> Any:
    """The shape of Qwen2.5-Coder-0.5B, which the paper has no row for."""
    from ahn.cost import Shape

    return Shape(24, 896, 14, 2, 64, 4864, 151936, tied=True)


def copy_rate(device: Any, repeats: int = 20) -> float:
    """Bytes a second of a large copy, read and written."""
    import torch

    count = 2**30 if device.type == "cuda" else 2**24
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    start = now(device)
    for _ in range(repeats):
        target.copy_(source)
    return 2 * count * repeats / (now(device) - start)


class Floors:
    """Seconds below which the method cannot be on this device. `cell` "full" is full attention."""

    def __init__(self, shape: Any, device: Any, itemsize: int, lossless: tuple[int, int]) -> None:
        self.shape, self.itemsize, (self.window, self.sinks) = shape, itemsize, lossless
        self.matmul, self.copy = matmul_rate(device), copy_rate(device)

    def cost(self, cell: str, length: int) -> Any:
        from ahn.config import AHNConfig
        from ahn.cost import cost

        config = AHNConfig(None if cell == "full" else cell, self.window, self.sinks)
        return cost(self.shape, length, config, self.itemsize)

    def read_flops(self, cell: str, batch: int, length: int) -> int:
        table = self.cost(cell, length)
        flops = table.mixing.full if cell == "full" else table.mixing.memory
        mlp = next(term.full for term in table.rest.terms if term.name == "MLP")
        return batch * (flops + mlp + 2 * self.shape.V * self.shape.D)

    def read(self, cell: str, batch: int, length: int) -> float:
        return self.read_flops(cell, batch, length) / self.matmul

    def decode_bytes(self, cell: str, batch: int, length: int) -> int:
        table, shape = self.cost(cell, length), self.shape
        parameters = table.parameters.full if cell == "full" else table.parameters.memory
        weights = parameters - (0 if shape.tied else shape.V * shape.D)  # of the embedding one row is read
        state = 0 if cell == "full" else 2 * 4 * shape.layers * shape.N * shape.H**2
        kept = 2 * shape.layers * shape.M * shape.H * (length if cell == "full" else min(length, self.lossless))
        return self.itemsize * (weights + batch * kept) + batch * state

    @property
    def lossless(self) -> int:
        return self.window + self.sinks

    def decode(self, cell: str, batch: int, length: int) -> float:
        """Of one step of `batch` rows behind `length` tokens."""
        step = self.read_flops(cell, batch, length + 1) - self.read_flops(cell, batch, length)
        step += batch * 2 * self.shape.V * self.shape.D
        return max(self.decode_bytes(cell, batch, length) / self.copy, step / self.matmul)


def fill(model: Any, cell: str, batch: int, length: int) -> Any:
    """A cache as after `length` tokens, of random numbers."""
    import torch
    from transformers import DynamicCache

    import ahn

    config, like = model.config, {"dtype": model.dtype, "device": model.device}
    kv_heads, size = config.num_key_value_heads, config.head_dim
    if cell == "full":
        cache = DynamicCache()
        for index in range(config.num_hidden_layers):
            kv = torch.randn(2, batch, kv_heads, length, size, **like)
            cache.update(kv[0], kv[1], index)
        return cache
    cache = ahn.AHNCache(model)
    token = torch.empty(batch, kv_heads, 1, size, **like)
    for attention, memory in zip(model.get_decoder().layers, cache.layers, strict=True):
        memory.reserve(length, token, attention.self_attn.ahn.state_shape)
        for tensor in memory.tensors.values():
            tensor.normal_()
    cache.tokens_seen, cache._seen, cache._batch = length, [length], batch
    return cache


def decode(model: Any, cache: Any, batch: int, steps: int, device: Any) -> dict[str, float]:
    """Greedy, the model called token by token, nothing waited for: milliseconds a step, median of runs of `steps`,
    and the seconds of the first two steps, in which kernels are built and graphs captured."""
    import torch

    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def run(count: int) -> float:
        nonlocal ids
        start = now(device)
        for _ in range(count):
            ids = model(ids, **{PAST: cache}, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return now(device) - start

    first = run(2)
    times = [run(steps) / steps for _ in range(5)]
    return {"decode_ms": 1000 * statistics.median(times), "decode_first_s": first}


def generate(model: Any, cache: Any, steps: int) -> dict[str, float]:
    """The same through `ahn.generate`, that is transformers' `generate`: milliseconds a token."""
    import torch

    import ahn

    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    options = {"do_sample": False, "pad_token_id": 0}
    ahn.generate(model, ids, cache, max_new_tokens=4, **options)
    start = now(model.device)
    ahn.generate(model, ids, cache, max_new_tokens=steps, **options)
    return {"generate_ms": 1000 * (now(model.device) - start) / steps}


def read(model: Any, cell: str, batch: int, length: int, repeats: int) -> tuple[dict[str, float], Any]:
    """Seconds (median) and peak of reading random tokens, and the cache."""
    import torch

    import ahn

    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    times, cache = [], None
    for _ in range(repeats):
        del cache
        cache = None
        start = now(model.device)
        if cell == "full":
            cache = model(ids, logits_to_keep=1, use_cache=True)[PAST]
        else:
            cache = ahn.read(model, ids, ahn.AHNCache(model))
        times.append(now(model.device) - start)
    return {"prefill_s": statistics.median(times)}, cache


def cells_of_table(options: argparse.Namespace) -> list[tuple[str, str, str, int, int]]:
    """(shape, cell, what, batch, length), the most important first."""
    if options.tiny:
        return [
            ("tiny", cell, what, batch, length)
            for cell in ("gated_deltanet", "full", "deltanet", "mamba2")
            for what, batch, length in (("decode", 1, 300), ("decode", 2, 300), ("read", 1, 500))
        ]
    main, gdn = "qwen2.5-3b", "gated_deltanet"
    table = [(main, gdn, "decode", 1, 128 * K), (main, gdn, "read", 1, 64 * K), (main, gdn, "read", 1, 128 * K)]
    table += [(main, "full", "read", 1, 64 * K), (main, "full", "read", 1, 128 * K)]
    table += [(main, gdn, "decode", batch, 128 * K) for batch in (8, 32)]
    table += [(main, gdn, "decode", 1, length) for length in (16 * K, 1024 * K)]
    table += [(main, gdn, "read", 1, 1024 * K)]
    table += [(main, cell, "decode", 1, 128 * K) for cell in ("deltanet", "mamba2")]
    table += [(main, cell, "read", 1, 128 * K) for cell in ("deltanet", "mamba2")]
    table += [("qwen2.5-coder-0.5b", gdn, what, 1, 128 * K) for what in ("decode", "read")]
    for shape in ("qwen2.5-7b", "qwen2.5-14b"):
        table += [(shape, cell, what, 1, 128 * K) for cell in (gdn, "full") for what in ("decode", "read")]
        table += [(shape, gdn, "decode", 8, 128 * K)]
    return [cell for cell in table if not options.only or cell[0] in options.only]


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
        self.lossless = (40, 8) if options.tiny else (WINDOW, SINKS)
        self.model: Any = None
        self.loaded = ""
        self.floors: Floors
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.began)

    def put(self, name: str, cell: str) -> None:
        """The base of this shape, with the memory of this cell or with none."""
        import ahn
        from ahn.cost import PAPER, Shape

        if name != self.loaded:
            self.model = None
            gc.collect()
            tiny = Shape(2, 64, 4, 2, 16, 96, 128, tied=True)
            shape = {**PAPER, "tiny": tiny, "qwen2.5-coder-0.5b": coder()}[name]
            self.model, self.loaded = random_model(shape, self.device), name
            self.floors = Floors(shape, self.device, self.model.dtype.itemsize, self.lossless)
        if hasattr(self.model, "ahn_config"):
            ahn.detach(self.model)
        if cell == "full":
            self.model.set_attn_implementation("sdpa")
        else:
            window, sinks = self.lossless
            ahn.augment(self.model, ahn.AHNConfig(cell, window, sinks))
            for parameter in self.model.parameters():
                if parameter.dim() == 3 and not parameter.any():
                    parameter.data.normal_(std=0.02)  # as if it were trained

    def measure(self, name: str, cell: str, what: str, batch: int, length: int) -> dict[str, Any]:
        import torch

        self.put(name, cell)
        row = {"shape": name, "cell": cell, "what": what, "batch": batch, "length": length}
        cuda = self.device.type == "cuda"
        cache: Any = None
        with torch.no_grad():
            if what == "read":
                warm = min(length, 2 * sum(self.lossless))
                start = now(self.device)
                _, cache = read(self.model, cell, batch, warm, 1)  # builds kernels
                row["first_s"] = now(self.device) - start
                cache = None
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                found, cache = read(self.model, cell, batch, length, 1 if length > 256 * K else 3)
                row |= found
                if cuda:
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                row["tokens_per_s"] = batch * length / found["prefill_s"]
                row["floor_s"] = self.floors.read(cell, batch, length)
                row["of_floor"] = row["floor_s"] / found["prefill_s"]
                if hasattr(cache, "nbytes"):
                    held = self.floors.cost(cell, length).held_bytes
                    row |= {"cache_gib": cache.nbytes / 2**30, "cache_over_model": cache.nbytes / held - 1}
            else:
                cache = fill(self.model, cell, batch, length)
                steps = 8 if self.options.tiny else STEPS
                row |= decode(self.model, cache, batch, steps, self.device)
                if batch == 1 and cell != "full":
                    row |= generate(self.model, cache, steps)
                row["floor_ms"] = 1000 * self.floors.decode(cell, batch, length)
                row["of_floor"] = row["floor_ms"] / row["decode_ms"]
                row["gib_a_step"] = self.floors.decode_bytes(cell, batch, length) / 2**30
            if self.options.profile and cuda:
                ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
                one = {PAST: cache, "use_cache": True, "logits_to_keep": 1}
                if what == "read":
                    profiled(lambda: read(self.model, cell, batch, min(length, 64 * K), 1))
                else:
                    profiled(lambda: [self.model(ids, **one) for _ in range(4)])
        return row

    def run(self) -> None:
        longest = 0.0
        for cell in cells_of_table(self.options):
            if self.left() < longest:
                self.skipped.append(f"{' '.join(map(str, cell))}: {self.left():.0f} s are left")
                continue
            start = time.monotonic()
            try:
                row = self.measure(*cell)
            except Exception as error:  # one that does not fit, or breaks, must not cost the others
                row = {**dict(zip(("shape", "cell", "what", "batch", "length"), cell, strict=True))}
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                if self.options.raises:
                    raise
            gc.collect()
            longest = max(longest, time.monotonic() - start)
            self.rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
            print(" ".join(f"{k}={v}" for k, v in self.rows[-1].items()), flush=True)
            self.save()
        self.authors()
        self.save()

    def authors(self) -> None:
        if not self.options.authors:
            self.skipped.append("the authors' code: no --authors script was given")
            return
        self.model = None
        for length in (64 * K, 128 * K):
            command = [sys.executable, self.options.authors, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                self.skipped.append(f"the authors' code: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
                return
            self.rows.append({"shape": "authors", "length": length, **json.loads(done.stdout.splitlines()[-1])})
            print(self.rows[-1], flush=True)

    def save(self) -> Path:
        import ahn

        window, sinks = self.lossless
        ceilings = {"copy_tb_per_s": self.floors.copy / 1e12, "matmul_tflops": self.floors.matmul / 1e12}
        kernels = [list(row) for row in ahn.kernels.report()]
        return write(
            self.options.name, window=window, sinks=sinks, ceilings=ceilings, kernels=kernels, rows=self.rows,
            skipped=self.skipped,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=540, help="no new cell is begun that may not fit (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", help="shapes")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--authors", metavar="SCRIPT")
    parser.add_argument("--profile", action="store_true", help="print the 25 kernels that take the most time")
    parser.add_argument("--raises", action="store_true", help="stop at the first error instead of noting it")
    parser.add_argument("--name", default="gpu")
    bench = Bench(parser.parse_args())
    bench.run()
    print("\n".join(f"skipped {line}" for line in bench.skipped))
    print(bench.save())


if __name__ == "__main__":
    main()
