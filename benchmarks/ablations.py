"""Which form of the memory closes most of the gap at equal cost: short runs that differ in one thing.

    python benchmarks/ablations.py BOOKS.jsonl[.xz] --valid BOOKS.jsonl[.xz] --runs runs.json [--name ablations]

`runs.json` is a list of {"name", "cell", "memory_positions", "extras", "lr", "loss", "hidden", "lossless", "sinks"},
all but the name optional. Reported: share of the gap between window and full attention that is closed on held-out
books, at positions `--length` / 2 onwards, and at `--far` tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

from common import write


def main() -> None:
    import torch

    import ahn
    from ahn.augmentation import augment, detach, full_attention, layers_of, set_window
    from ahn.bases import load_base
    from ahn.train import data, distill, windows
    from ahn.train.trainer import compile_layers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after these")
    parser.add_argument("--far", type=int, default=0, help="also measure on rows of this many tokens")
    parser.add_argument("--name", default="ablations")
    parser.add_argument("--save")
    options = parser.parse_args()
    began = time.monotonic()
    tokenizer = ahn.load_tokenizer(options.base)
    train = data.rows([options.books], tokenizer, options.length, options.steps * options.batch * options.length)

    def held_out(length: int) -> Any:
        with __import__("lzma").open(options.valid, "rt") as file:
            texts = [json.loads(line)["text"][: length * 8] for line in file]
        ids = [row[:length] for row in tokenizer(texts).input_ids if len(row) >= length]
        return torch.tensor(ids[:16], device=model.device)

    model = load_base(options.base)
    device = model.device
    print(f"{len(train)} rows, {time.monotonic() - began:.0f} s", flush=True)
    near = held_out(options.length)
    far = held_out(options.far) if options.far else None

    def measure(sizes: tuple[int, ...], ids: Any) -> dict[int, float]:
        half = ids.shape[1] // 2
        rows = max(1, 16 * 4096 // ids.shape[1])

        def mean() -> float:  # with gradients on, as what was compiled for the training is used again
            losses = []
            for part in ids.split(rows):
                hidden = model.get_decoder()(part, use_cache=False).last_hidden_state[:, half - 1 : -1]
                for h, t in zip(hidden.detach(), part[:, half:], strict=True):
                    losses.append(torch.nn.functional.cross_entropy(model.lm_head(h).float(), t))
            return torch.stack(losses).mean().item()

        if not sizes:
            with torch.no_grad(), full_attention(model):
                return {0: mean()}
        found = {}
        for size in sizes:
            set_window(model, size - 64, 64)
            found[size] = mean()
        return found

    sizes = (256, 512, 1024)
    far_sizes = (512, 2048)
    augment(model, ahn.AHNConfig(None, 960, 64))
    if model.device.type == "cuda":
        compile_layers(model)
    full, window = measure((), near)[0], measure(sizes, near)
    far_full, far_window = (measure((), far)[0], measure(far_sizes, far)) if far is not None else (0.0, {})
    print(f"full {full:.4f} window {window}; far: full {far_full:.4f} {far_window}", flush=True)
    rows: list[dict[str, Any]] = []
    for run in json.load(open(options.runs)):
        if time.monotonic() - began > options.seconds:
            print(f"{run['name']}: no time left")
            continue
        start = time.monotonic()
        torch.manual_seed(0)
        detach(model)
        config = ahn.AHNConfig(
            run.get("cell", "deltanet"), 960, 64,
            memory_positions=run.get("memory_positions", "rope"), extras=tuple(run.get("extras", ())),
        )  # fmt: skip
        augment(model, config)
        for layer in layers_of(model):
            layer.cell.float()
            if device.type == "cuda":
                layer.compile_pieces()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decay = [p for n, p in named if not n.endswith(("A_log", "dt_bias"))]
        rest = [p for n, p in named if n.endswith(("A_log", "dt_bias"))]
        lr = run.get("lr", 2e-3)
        groups = [{"params": decay, "weight_decay": 0.1}] + ([{"params": rest, "weight_decay": 0.0}] if rest else [])
        optimiser = torch.optim.AdamW(groups, lr=lr, fused=device.type == "cuda")
        steps = run.get("steps", options.steps)
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warm) / (steps - warm))),  # noqa: B023
        )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        timed = 0.0
        for step in range(steps):
            size = windows.draw(
                0,
                step,
                options.length,
                tuple(run.get("lossless", (512, 1024, 2048))),
                tuple(run.get("sinks", (0, 32, 64, 128, 512))),
            )
            set_window(model, *size)
            chosen = order[torch.arange(step * options.batch, (step + 1) * options.batch) % len(order)]
            ids, counts = train.ids[chosen].long().to(device), train.counts[chosen].to(device)
            loss = distill.loss(model, ids, counts, run.get("loss", "kl"), run.get("hidden", 0.0))
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            if step == steps // 2:
                loss.item()
                timed = time.monotonic()
        last = loss.item()
        speed = (steps - 1 - steps // 2) * options.batch * options.length / (time.monotonic() - timed)
        found = measure(sizes, near)
        closed = {str(s): round((window[s] - v) / (window[s] - full), 4) for s, v in found.items()}
        if far is not None:
            found = measure(far_sizes, far)
            closed |= {f"far {s}": round((far_window[s] - v) / (far_window[s] - far_full), 4) for s, v in found.items()}
        rows.append({**run, "closed": closed, "last_loss": round(last, 4), "tokens_per_second": round(speed)})
        print(
            f"{run['name']:<34}" + "".join(f"{k:>9} {v:>6.1%}" for k, v in closed.items())
            + f"  loss {last:.4f}  {speed:>8,.0f} tokens/s  {time.monotonic() - start:.0f} s", flush=True,
        )  # fmt: skip
        print(
            write(
                options.name, base=options.base, length=options.length, batch=options.batch, steps=options.steps,
                full=full, window=window, far_full=far_full, far_window=far_window, rows=rows,
            ), flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
