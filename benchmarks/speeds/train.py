"""How fast a memory trains, beside the time that its matrix products alone would take.

    python benchmarks/speed.py train [--recipe FILE.yaml] [--shape qwen2.5-3b] [--steps 20] [--profile] [key=value ...]
    python benchmarks/speed.py train --shape qwen2.5-3b cell=deltanet length=8192 batch=4 "lossless=[1024,2048,4096]"

Takes the steps of `ahn train` on random tokens, with the keys of its recipes: draw a window, teacher, student,
backward, clipping, AdamW. `--shape` (a name of `ahn cost`) is a Qwen2 with random weights. Under torchrun tokens/s
counts the tokens of all processes; the floor and the peak are those of one process.

The floor is the time that the matrix products of a step take at the rate measured on one of 8,192 x 8,192. They are
those of the teacher's and the student's forward, of the student's backward (by activations; in the cells by weights
too), and three of the head on the tokens that count. Recomputed activations are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from common import matmul_rate, now, peak_bytes, random_model, write

NAME = "train"
TINY = (
    "base={base} length=128 batch=1 lossless=[48] sinks=[8] window=40 kept_sinks=8 compile=false --steps 2 --warmup 1"
)

RECIPE: dict[str, Any] = {
    "base": "smollm2-135m",
    "output": str(Path(tempfile.gettempdir()) / "ahn-speed"),
    "data": ["random tokens"],
    "report_to": [],
}


def flops(shape: Any, recipe: Any, window: int, sinks: int) -> int:
    """FLOPs of the matrix products of one step: a multiply-add counts as 2."""
    from ahn.cost import cost

    config = recipe.memory().without_store()  # a token in the store costs as much as one in the window
    table = cost(shape, recipe.length, config.replace(window=window, sinks=sinks))
    terms = {term.name: term for term in (*table.mixing.terms, *table.rest.terms)}
    linear = terms["projections"].full + terms["MLP"].full
    attention = terms["attention"]
    cells = sum(term.memory for name, term in terms.items() if name.startswith(("memory", "window gate")))
    products = 2 if recipe.loss == "ce" else 3
    head = products * 2 * shape.V * shape.D * table.written
    teacher = linear + attention.full if recipe.loss != "ce" else 0
    return recipe.batch * (teacher + 2 * linear + 3 * attention.memory + 3 * cells + head)


def build(recipe: Any, shape: Any | None) -> Any:
    """The trainer of a recipe on random tokens, with a random base if a `shape` is given."""
    import torch

    from ahn.train.prepare import base_of, machine_of, trainer_of
    from ahn.train.rows import Rows

    device = machine_of(recipe).device
    model = random_model(shape, device) if shape else base_of(recipe, device)
    ids = torch.randint(model.config.vocab_size, (16 * recipe.batch, recipe.length), dtype=torch.int32)
    return trainer_of(recipe, model, Rows(ids, torch.ones_like(ids, dtype=torch.bool)))


class Clock(TrainerCallback):
    """Times `steps` steps after `warmup` others, notes their windows, and can profile the next three."""

    def __init__(self, model: Any, warmup: int, steps: int, profile: bool) -> None:
        self.model, self.warmup, self.steps = model, warmup, steps
        self.configs: list[Any] = []
        self.profiler = profiler() if profile else None

    def on_step_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        import torch

        if state.global_step == 0:
            self.began = now(self.model.device)
        if state.global_step == self.warmup:
            self.start = now(self.model.device)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        if self.warmup < state.global_step <= self.warmup + self.steps:
            self.configs.append(self.model.ahn_config)
        if state.global_step == self.warmup + self.steps:
            self.end = now(self.model.device)
            self.peak = peak_bytes()
            if self.profiler is not None:
                self.profiler.start()


def measure(recipe: Any, shape: Any | None, steps: int, warmup: int, profile: bool) -> dict[str, Any]:
    from ahn.cost import Shape

    more = 3 if profile else 0
    trainer = build(dataclasses.replace(recipe, steps=warmup + steps + more, save_every=10**9), shape)
    model = trainer.augmented
    shape = Shape.from_config(model.config)
    clock = Clock(model, warmup, steps, profile)
    trainer.add_callback(clock)
    trainer.train()
    if clock.profiler is not None:
        now(model.device)
        clock.profiler.stop()
        order = f"self_{'cuda' if model.device.type == 'cuda' else 'cpu'}_time_total"
        print(clock.profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70))
    seconds, processes = clock.end - clock.start, trainer.args.world_size
    products = sum(flops(shape, recipe, config.window, config.sinks) for config in clock.configs)
    rate = matmul_rate(model.device)
    floor = products / rate
    return {
        "processes": processes,
        "fsdp": recipe.fsdp,
        "tokens_per_s": round(processes * steps * recipe.batch * recipe.length / seconds, 1),
        "step_s": round(seconds / steps, 4),
        "floor_s": round(floor / steps, 4),
        "of_floor": round(floor / seconds, 4),
        "matmul_tflops": round(rate / 1e12, 3),
        "step_tflop": round(products / steps / 1e12, 6),
        "peak_gib": round(clock.peak / 2**30, 3),
        "warmup_s": round(clock.start - clock.began, 1),
        "lossless": [config.lossless for config in clock.configs],
    }


def profiler() -> Any:
    import torch
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--recipe")
    parser.add_argument("--shape", help="random weights of this shape instead of the recipe's base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print the 25 operations that take the most time")


def run(options: argparse.Namespace) -> None:
    import yaml

    from ahn.cost import shape_of
    from ahn.train.recipe import from_dict, load

    if options.recipe:
        recipe = load(options.recipe, options.changes)
    else:
        pairs = (change.partition("=") for change in options.changes)
        recipe = from_dict(RECIPE | {key: yaml.safe_load(value) for key, _, value in pairs})
    shape = shape_of(options.shape) if options.shape else None
    row = measure(recipe, shape, options.steps, options.warmup, options.profile)
    if int(os.environ.get("RANK", "0")):
        return
    base = Path(options.shape or recipe.base).name.removesuffix(".json")
    settings = {
        "base": base,
        **{
            key: getattr(recipe, key)
            for key in ("cell", "length", "batch", "loss", "checkpointing", "compile", "sink_positions")
        },
        "lossless_drawn_from": recipe.lossless,
        "sinks_drawn_from": recipe.sinks,
    }
    print(f"{'base':<24}{'cell':<16}{'batch':>12}{'tokens/s':>10}{'step s':>9}{'floor s':>9}{'of floor':>10}{'GiB':>8}")
    print(
        f"{base:<24}{recipe.cell:<16}{f'{recipe.batch} x {recipe.length:,}':>12}{row['tokens_per_s']:>10,.0f}"
        f"{row['step_s']:>9.3f}{row['floor_s']:>9.3f}{row['of_floor']:>10.1%}{row['peak_gib']:>8.1f}"
    )
    print(f"matrix products: {row['matmul_tflops']:.3g} TFLOP/s measured, {row['step_tflop']:.3g} TFLOP a step")
    print(write(options.name, **settings, **row))
