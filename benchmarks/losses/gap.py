"""The share of the gap between the window alone and full attention that a memory closes, on held-out books.

    python benchmarks/loss.py gap BOOKS.jsonl[.xz] [--adapter FOLDER ...] [--base smollm2-135m] [--tokens 8192]

Mean next-token loss (nats) over the second half of the first `--tokens` tokens of each book that is long enough, for
full attention, sinks and window, and each adapter, at several lossless sizes.

Each adapter is measured twice: with its own memory and, as the control, with the memory of another book. The gain over
the control is due to the content of the memory. The gain of the control itself is only that of a better-fitted model.
The last row is a longer window without a memory. It holds as many bytes as the window and the state of the largest
memory.

The window without a memory is measured with sinks at their true distance, as in the paper, and at the clipped distance
that is the default here (docs/decisions.md). Shares are given of the gap between each of the two and full attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ahn import zoo
from common import SINKS, put_on, records, set_lossless, write

PAPER, CLIPPED, LONGER = "sinks and window, absolute", "sinks and window, clipped", "a longer window, clipped"


NAME = "gap"
TINY = "{books} --base {base} --adapter {adapter} --tokens 256 --lossless 72"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("books")
    parser.add_argument("--adapter", nargs="*", default=zoo.names())
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--lossless", type=int, nargs="+", default=[256, 512, 1024, 2048])


def run(options: argparse.Namespace) -> None:
    import torch

    import ahn
    from ahn.hf.hooks import full_attention
    from losses._positions import mean_loss

    tokenizer = ahn.load_tokenizer(options.base)
    found = (tokenizer(record["text"]).input_ids[: options.tokens + 1] for record in records(options.books))
    books = torch.tensor([ids for ids in found if len(ids) == options.tokens + 1])
    model = ahn.from_pretrained(options.base, "none", window=16, sinks=0)
    with full_attention(model):
        full = mean_loss(model, books)
    print(f"{len(books)} books, positions {options.tokens // 2:,} to {options.tokens - 1:,}; full attention {full:.4f}")
    print(f"{'':<40}" + "".join(f"{size:>26,}" for size in options.lossless))
    rows: list[dict[str, Any]] = []
    window: dict[str, dict[int, float]] = {PAPER: {}, CLIPPED: {}}
    longer = 0
    for memory in [PAPER, CLIPPED, *options.adapter, LONGER]:
        alone = memory in (PAPER, CLIPPED, LONGER)
        name = put_on(model, None if alone else memory, "absolute" if memory == PAPER else "clipped")
        longer = max(longer, state_in_tokens(model))
        more = longer if memory == LONGER else 0
        name = (f"{memory} (+{more})" if more else memory) if alone else name
        cells = []
        for size in options.lossless:
            set_lossless(model, size + more, SINKS)
            loss = mean_loss(model, books)
            if memory in window:
                window[memory][size] = loss

            def closed(key: str, loss: float, size: int = size) -> dict[str, float]:
                pairs = ((key, PAPER), (f"{key}_of_clipped", CLIPPED))
                bases = ((key, window[base][size]) for key, base in pairs if size in window[base])
                return {key: round((base - loss) / (base - full), 4) for key, base in bases}

            row = {"memory": memory if alone else Path(memory).name, "lossless": size + more, "loss": round(loss, 4)}
            row |= closed("closed", loss)
            cells.append(f"{loss:.4f} {row['closed']:>4.0%} {row.get('closed_of_clipped', 0):>4.0%}")
            if model.ahn_config.cell is not None:
                with memory_of_another(model):
                    control = mean_loss(model, books)
                row |= {"control": round(control, 4), **closed("control_closed", control)}
                cells[-1] += f" ({row['control_closed_of_clipped']:>3.0%})"
            rows.append(row)
        print(f"{name:<40}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
        about = {"base": options.base, "tokens": options.tokens, "books": len(books), "full": round(full, 4)}
        path = write(options.name, **about, rows=rows)
    print("shares of the two gaps that are closed; in brackets, of the second with the memory of another book")
    print(path)


def state_in_tokens(model: Any) -> int:
    """The number of tokens whose keys and values fit into the bytes of a layer's float32 state."""
    from ahn.memory.handle import layers_of

    base, (layer, *_) = model.config, layers_of(model)
    if layer.state_shape is None:
        return 0
    heads, keys, size = layer.state_shape
    return heads * keys * size * 4 // (2 * base.num_key_value_heads * size * model.dtype.itemsize)


@contextmanager
def memory_of_another(model: Any) -> Iterator[None]:
    """Within, each row of a batch of whole sequences reads what another row has written."""
    from ahn.memory.handle import layers_of

    layers = layers_of(model)
    for layer in layers:
        forms = layer.last.forms
        prepare = forms.prepare

        def swapped(q: Any, k: Any, v: Any, inputs: Any, *rest: Any, prepare: Any = prepare) -> Any:
            return prepare(q, k.roll(1, 0), v.roll(1, 0), inputs.roll(1, 0), *rest)

        forms.prepare = swapped
    try:
        yield
    finally:
        for layer in layers:
            layer.last.forms.prepare = layer.last.prepare
