"""How much of the gap between the window alone and full attention a memory closes, on books it has not seen.

    python benchmarks/gap.py BOOKS.jsonl[.xz] [--adapter FOLDER ...] [--base smollm2-135m] [--tokens 8192]

Mean next-token loss (nats) over the second half of the first `--tokens` tokens of each book that is long enough, for
full attention, sinks and window, and each adapter, at several lossless sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import position_losses, records, write

SINKS = 64


def main() -> None:
    import torch

    import ahn
    from ahn.augmentation import full_attention, set_window

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books")
    parser.add_argument("--adapter", nargs="+", default=ahn.zoo.names())
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--lossless", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--name", default="gap")
    options = parser.parse_args()

    tokenizer = ahn.load_tokenizer(options.base)
    texts = [tokenizer(record["text"]).input_ids[: options.tokens + 1] for record in records(options.books)]
    books = [ids for ids in texts if len(ids) == options.tokens + 1]

    def mean(model: Any) -> float:
        return torch.cat([position_losses(model, ids)[options.tokens // 2 :] for ids in books]).mean().item()

    model = ahn.from_pretrained(options.base, "none", window=16, sinks=0)
    with full_attention(model):
        full = (
            torch.cat([position_losses(model, ids, whole=True)[options.tokens // 2 :] for ids in books]).mean().item()
        )
    print(f"{len(books)} books, positions {options.tokens // 2:,} to {options.tokens - 1:,}; full attention {full:.4f}")
    print(f"{'':<44}" + "".join(f"{size:>16,}" for size in options.lossless))
    rows: list[dict[str, Any]] = []
    window: dict[int, float] = {}
    for adapter in [None, *options.adapter]:
        ahn.detach(model)
        if adapter is None:
            ahn.augment(model, ahn.AHNConfig(None, 16, 0))
        else:
            ahn.load_adapter(model, adapter)
        cells = []
        for size in options.lossless:
            set_window(model, size - SINKS, SINKS)
            loss = mean(model)
            window.setdefault(size, loss)
            closed = (window[size] - loss) / (window[size] - full)
            rows.append({"memory": adapter, "lossless": size, "loss": round(loss, 4), "closed": round(closed, 4)})
            cells.append(f"{loss:>9.4f} {closed:>5.0%} ")
        name = "sinks and window" if adapter is None else f"{model.ahn_config.cell} ({Path(adapter).name})"
        print(f"{name:<44}" + "".join(cells), flush=True)
    print(
        write(options.name, base=options.base, tokens=options.tokens, books=len(books), full=round(full, 4), rows=rows)
    )


if __name__ == "__main__":
    main()
