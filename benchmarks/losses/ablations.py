"""Finds the form of the memory that closes most of the gap at equal cost, in short runs that differ in one thing.

    python benchmarks/loss.py ablations RUNS.json BOOKS.jsonl[.xz] --valid BOOKS.jsonl[.xz] [--name ablations]

RUNS is a list like benchmarks/losses/ablations.json. An entry has a `name` and the keys of a recipe that differ from
the defaults (cell, memory_positions, feature_maps, window_gate, lr, loss, lossless, sinks, batch, steps). Each run is
measured on held-out books, from position `--length` / 2 on: the share of the gap between the window alone and full
attention that is closed, and that share with the memory of another book (see gap.py). With `--far N`, also the gain
over the window alone in the second half of N tokens, several times the length of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from common import SINKS, records, write
from losses.gap import memory_of_another

NAME = "ablations"
TINY = "{runs} {books} --valid {books} --base {base} --length 1200 --batch 1 --steps 2"

DEFAULTS: dict[str, Any] = {"cell": "deltanet", "sinks": [32, 64, 128, 512]}
SIZES = (256, 512, 1024)  # lossless tokens


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs")
    parser.add_argument("books")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--far", type=int, help="tokens of a text to measure on, beyond the length of training")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after these")


def run(options: argparse.Namespace) -> None:
    import torch

    import ahn
    from ahn.bases import load_base
    from ahn.hf.augment import detach, set_window
    from ahn.hf.hooks import full_attention
    from ahn.train import data
    from ahn.train.recipe import from_dict
    from losses._positions import mean_loss

    began = time.monotonic()
    defaults = DEFAULTS | {"batch": options.batch, "steps": options.steps}
    defaults |= {"lossless": [options.length // share for share in (8, 4, 2)]}
    defaults |= {"base": options.base, "output": "none", "data": [options.books], "length": options.length}
    runs = [(run.pop("name"), from_dict(defaults | run)) for run in json.loads(Path(options.runs).read_text())]
    tokenizer = ahn.load_tokenizer(options.base)
    tokens = max(recipe.steps * recipe.batch for _, recipe in runs) * options.length
    rows = data.rows([options.books], tokenizer, options.length, tokens)
    most = 8 * max(options.length, options.far or 0)
    whole = [tokenizer(record["text"][:most], verbose=False).input_ids for record in records(options.valid)]
    books = torch.tensor([ids[: options.length + 1] for ids in whole if len(ids) > options.length])
    far = torch.tensor([ids[: options.far + 1] for ids in whole if options.far and len(ids) > options.far])
    model = load_base(options.base)
    ahn.augment(model, ahn.AHNConfig(None, 16, 0))
    with full_attention(model):
        full = mean_loss(model, books)

    def losses() -> dict[int, float]:
        found = {}
        for size in SIZES:
            set_window(model, size - SINKS, SINKS)
            found[size] = mean_loss(model, books)
        return found

    def far_loss() -> float:
        set_window(model, 512 - SINKS, SINKS)
        return mean_loss(model, far)

    window = losses()
    far_window = far_loss() if len(far) else None
    found: list[dict[str, Any]] = []
    print(f"full attention {full:.4f}; window " + ", ".join(f"{s:,}: {loss:.4f}" for s, loss in window.items()))
    head = "".join(f"{size:>16,}" for size in SIZES)
    print(f"{'closed (with the memory of another)':<36}{head}{'far gain':>9}{'tokens/s':>10}")
    for name, recipe in runs:
        if time.monotonic() - began > options.seconds:
            print(f"{name}: no time left")
            continue
        detach(model)
        speed = train(model, recipe, rows)
        closed = {size: (window[size] - loss) / (window[size] - full) for size, loss in losses().items()}
        with memory_of_another(model):
            control = {size: (window[size] - loss) / (window[size] - full) for size, loss in losses().items()}
        cells = "".join(f"{f'{closed[size]:.1%} ({control[size]:.0%})':>16}" for size in SIZES)
        gain = None if far_window is None else far_window - far_loss()
        print(f"{name:<36}{cells}{'' if gain is None else f'{gain:.4f}':>9}{speed:>10,.0f}", flush=True)
        row = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in ("output", "data", "base")}
        row |= {"name": name, "closed": closed, "control": control, "far_gain": gain, "tokens_per_s": round(speed)}
        found.append(row)
        measured = {"books": len(books), "full": full, "window": window, "far": options.far, "far_texts": len(far)}
        write(options.name, base=options.base, **measured, rows=found)


def train(model: Any, recipe: Any, rows: Any) -> float:
    """Train new cells on a detached base; returns tokens/s of the second half."""
    import torch

    import ahn
    from ahn.hf.augment import detach, set_window
    from ahn.hf.weights import adapter_of, apply
    from ahn.memory.handle import layers_of
    from ahn.train import distill, windows

    torch.manual_seed(recipe.seed)
    config = recipe.memory()
    ahn.augment(model, config)
    cuda = model.device.type == "cuda"
    for layer in layers_of(model):
        layer.cell.float()
        if cuda:
            torch.set_float32_matmul_precision("high")  # as in ahn.train
            layer.compile_for_training()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    exempt = ahn.cells.get(recipe.cell).decay_parameters
    decays = [p for name, p in named.items() if name.rpartition(".")[2] not in exempt]
    others = [p for name, p in named.items() if name.rpartition(".")[2] in exempt]
    groups = [{"params": decays, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.lr, fused=cuda)
    warm = max(1, int(recipe.warmup * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warm) / recipe.steps))
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
    start = 0.0
    for step in range(recipe.steps):
        set_window(model, *windows.draw(recipe.seed, step, recipe.length, recipe.lossless, recipe.sinks))
        at = order[torch.arange(step * recipe.batch, (step + 1) * recipe.batch) % len(order)]
        ids, counts = rows.ids[at].long().to(model.device), rows.counts[at].to(model.device)
        loss = distill.loss(model, ids, counts, recipe.loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), recipe.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step == recipe.steps // 2:
            loss.item()
            start = time.monotonic()
    loss.item()
    seconds = time.monotonic() - start
    adapter = adapter_of(model)
    detach(model)
    ahn.augment(model, config)  # drops code that was compiled for the shapes of training
    apply(adapter, model)
    return (recipe.steps - 1 - recipe.steps // 2) * recipe.batch * recipe.length / seconds
