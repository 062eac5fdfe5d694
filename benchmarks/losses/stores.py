"""The loss of predictions with each store, at equal budgets. No text is generated, so it is quick.

    python benchmarks/loss.py stores facts.jsonl.xz squad.jsonl.xz [--adapter GATES] [--length 512] [--window 24]
        [--places 32] [--sinks 8] [--stores random attention attention:4 learned learned:4] [--rows 12]

KL(full attention || window and store) in nats a token, over the answers in the last `--rows` rows of each source. The
gates must not have been trained on these rows. There is no cell, so a token that loses its slot is lost. The window
alone has as many tokens as window and store together. `learned` needs an adapter with gates; its cell is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from common import write

NAME = "stores"
TINY = "{chats} --base {base} --length 128 --window 8 --places 8 --sinks 4 --stores random attention:4 --rows 2"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=24)
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--sinks", type=int, default=8)
    parser.add_argument("--stores", nargs="+", default=["random", "attention", "attention:4"])
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--limit", type=int, default=400_000, help="tokens read of each source")


def run(options: argparse.Namespace) -> None:
    import torch

    import ahn
    from ahn.adapter_files import read_adapter
    from ahn.bases import load_base
    from ahn.hf.augment import augment, detach
    from ahn.hf.weights import STORE
    from ahn.memory.handle import layers_of
    from ahn.train import data, distill

    lossless = options.sinks + options.places + options.window
    tokenizer, model = ahn.load_tokenizer(options.base), load_base(options.base)
    texts = {}
    for source in options.sources:
        rows = data.rows([source], tokenizer, options.length, options.limit)
        rows = rows.where(rows.counts[:, lossless:].any(1))
        texts[Path(source).name] = data.Rows(rows.ids[-options.rows :], rows.counts[-options.rows :])
    gates = read_adapter(options.adapter) if options.adapter else None

    def put(store: str | None) -> None:
        if store is None:
            augment(model, ahn.AHNConfig(None, options.window + options.places, options.sinks))
            return
        name, _, span = store.partition(":")
        places = {"store": name, "store_size": options.places, "store_span": int(span or 1)}
        augment(model, ahn.AHNConfig(None, options.window, options.sinks, **places))
        if name == "learned":
            if gates is None:
                sys.exit("--stores learned: expected --adapter with gates")
            for index, layer in enumerate(layers_of(model)):
                weights = layer.store.state_dict()
                layer.store.load_state_dict({key: gates.tensors[f"layers.{index}.{STORE}{key}"] for key in weights})

    found: list[dict[str, Any]] = []
    print(f"{'':<20}" + "".join(f"{name[:24]:>26}" for name in texts))
    for store in [None, *options.stores]:
        put(store)
        losses = {}
        for name, rows in texts.items():
            parts = []
            for low in range(0, len(rows), options.batch):
                ids, counts = (t[low : low + options.batch].to(model.device) for t in (rows.ids, rows.counts))
                with torch.no_grad():
                    parts.append(distill.loss(model, ids.long(), counts).item())
            losses[name] = round(statistics.fmean(parts), 4)
        detach(model)
        found.append({"store": store or "window", "kl": losses})
        print(f"{store or 'window':<20}" + "".join(f"{loss:>26.4f}" for loss in losses.values()), flush=True)
    kept = ("base", "length", "window", "places", "sinks", "rows", "batch", "limit")
    settings: dict[str, Any] = {key: getattr(options, key) for key in kept}
    settings["sources"] = [Path(source).name for source in options.sources]
    print(write(options.name, **settings, table=found))
