"""Show versions, cells, stores, shipped adapters, and which kernels are used and why."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import chain, repeat

# Variables that change how fast this package is; it sets some of them itself. AHN_KERNEL is shown with the kernels.
ENVIRONMENT = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"),
    *("FLA_CACHE_MODE", "FLA_CONFIG_DIR", "TRITON_INTERPRET"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    import platform

    import torch
    import transformers

    from ahn import cells, stores, zoo
    from ahn.named_bases import NAMED
    from ahn.ops import fla
    from ahn.version import __version__

    device = f"cuda, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    rows = [
        ("ahn", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
        ("device", f"{device}, {threads} CPU thread{'s' if threads > 1 else ''}"),
        ("cells", ", ".join(cells.names())),
        ("stores", ", ".join(stores.names())),
        *zip(chain(["adapters"], repeat("")), map(_adapter, zoo.names()), strict=False),
        ("default base", _default_base()),
        *((name, f"--base {name}: {base.needs}") for name, base in NAMED.items()),
        ("environment", ", ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ)),
    ]
    _print(rows)
    setting = os.environ.get("AHN_KERNEL")
    print("\nkernels" + (f", AHN_KERNEL={setting}" if setting else ""))
    _print([(f"  {operation}", kernel, f"({reason})") for operation, kernel, reason in report()])
    loaded = "loaded" if fla.library.loaded else "not loaded yet"
    print(f"  flash-linear-attention: {loaded}, {fla.library.forms}")


def report() -> list[tuple[str, str, str]]:
    """(operation, kernel, reason) of every choice on this machine, for `ahn info`. Raises ConfigError, see
    `dispatch.check_setting`."""
    import torch

    from ahn import cells
    from ahn.ops import dispatch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    like = torch.empty(0, 64, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    rows = [
        ("reading: sinks and window", *dispatch.pick_attention(like)),
        ("reading: rotations", *dispatch.pick_rotation(device)),
        ("reading: narrow window, store", *dispatch.pick_band(like)),
        ("reading: eviction", *dispatch.pick_eviction(device)),
        ("training: sinks and window", *dispatch.pick_whole_sequence(device, 64, 4096)),
        ("training: gates of a store", *dispatch.pick_soft_slots(like)),
    ]
    rows += [
        (f"{name}, many tokens", *dispatch.pick_cell(cells.get(name).fla_operation, like)) for name in cells.names()
    ]
    return [
        *rows,
        ("reading: between products", *dispatch.pick_between_many(device, dispatch.LONG)),
        ("one token: attention, cell", *dispatch.pick_one_token(device)),
        ("one token: all layers", *dispatch.pick_decoding(device)),
        ("one token: products", *dispatch.pick_products(device, 1)),
        ("one token: between products", *dispatch.pick_between(device)),
        ("one token: launches", *dispatch.pick_launches(device)),
    ]


def _adapter(name: str) -> str:
    from ahn.zoo import store

    return f"{name} (with a {store(name)} store)" if store(name) else name


def _default_base() -> str:
    from ahn.bases import DEFAULT_BASE, base_config
    from ahn.errors import BaseModelError

    try:
        config = base_config(DEFAULT_BASE)
    except BaseModelError as error:
        return f"{DEFAULT_BASE}, not available: {error}"
    size = f"{config.num_hidden_layers} layers, {config.max_position_embeddings:,} positions"
    return f"{DEFAULT_BASE}, available ({size})"


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
