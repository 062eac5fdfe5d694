"""What every result file says besides its numbers."""

from __future__ import annotations

import json
import lzma
import pickle
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NO_STORE = "@none"
UNFINISHED = 75  # exit code of a script whose time was over: the same command goes on
SHARE = 0.74  # of the window's places, for a store
BOOK = Path(__file__).parent.parent / "src" / "ahn" / "data" / "arsene-lupin.txt"


@cache
def environment() -> dict[str, Any]:
    import torch

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "src"], capture_output=True, text=True, cwd=RESULTS.parent.parent
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": (commit.stdout.strip() or None)
        and commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: of(name) for name in ("torch", "transformers", "triton", "flash-linear-attention")},
    }


def position_losses(model: Any, ids: list[int], chunk: int = 512, whole: bool | None = None) -> Any:
    """Next-token loss (nats) at each position but the last, float32 [T - 1]: in one `whole` forward (default on CUDA),
    or read through a cache."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens = torch.tensor([ids], device=model.device)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    with torch.no_grad():
        if tokens.is_cuda if whole is None else whole:
            pieces = decoder(tokens[:, :-1], use_cache=False).last_hidden_state[0].split(chunk)
        else:
            import ahn
            from ahn.compat import PAST

            cache = ahn.AHNCache(model)
            pieces = (decoder(t, **{PAST: cache}).last_hidden_state[0] for t in tokens[:, :-1].split(chunk, 1))
        targets = tokens[0, 1:].split(chunk)
        losses = [
            cross_entropy(head(piece).float(), wanted, reduction="none")
            for piece, wanted in zip(pieces, targets, strict=True)
        ]
    return torch.cat(losses).cpu()


def put_on(model: Any, adapter: str | None, sink_positions: str = "clipped") -> str:
    """Give a model the memory of an adapter, or sinks and window alone, in place of what it has; returns its name.
    `adapter`: a name or folder; with "@none" behind it without the store that it may have, with "@0.74" with that share
    of the window's places for the store."""
    import ahn
    from ahn.adapter_files import read_adapter
    from ahn.hf.weights import apply

    if hasattr(model, "ahn_config"):
        ahn.detach(model)
    if adapter is None:
        ahn.augment(model, ahn.AHNConfig(None, 16, 0, sink_positions=sink_positions))
        return "sinks and window"
    name, _, share = adapter.partition("@")
    found = read_adapter(name)
    config = found.config
    if share == "none":
        config = config.without_store()
    elif share:
        places = config.store_size + config.window
        size = round(float(share) * places)
        config = config.replace(store_size=size, window=places - size)
    ahn.augment(model, config)
    apply(found, model)
    store = f", {config.store} store" if config.store else ""
    return f"{config.cell}{store} ({Path(adapter).name})"


def set_lossless(model: Any, size: int, sinks: int) -> None:
    """As many lossless tokens in all: sinks, and of the rest the store has the share that it has now."""
    from ahn.hf.augment import set_window

    config = model.ahn_config.with_lossless(size, sinks)
    set_window(model, config.window, sinks, config.store_size)


def records(path: str) -> list[dict[str, Any]]:
    """Of a JSON-lines file, xz-compressed or not; ends the program if it cannot be read."""
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.endswith(".xz") else open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError, lzma.LZMAError) as error:
        print(f"{path}: cannot be read: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def write_records(path: str, made: Iterable[dict[str, Any]]) -> None:
    """As `records` reads them."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in made]
    with lzma.open(path, "wt", encoding="utf-8") if path.endswith(".xz") else open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)
    print(f"{path}: {len(lines)} documents")


def keep(file: Path, prompts: list[Any]) -> None:
    """Prompts that were prepared, for a machine whose GPU should not wait for a tokenizer."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(lzma.compress(pickle.dumps(prompts), preset=1))


def kept(file: Path) -> list[Any]:
    """What `keep` wrote."""
    found: list[Any] = pickle.loads(lzma.decompress(file.read_bytes()))
    return found


def run_in_memory(
    work: Sequence[Any], names: Sequence[str], options: Any, output: Path, stop: Callable[[], bool], model: Any
) -> list[Path]:
    """`ahn.eval.runner.run_prepared`, with smaller batches where the memory of the device does not hold them."""
    import torch

    from ahn.eval.runner import run_prepared

    while True:
        try:
            return run_prepared(work, names, options, output, stop=stop, model=model)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if options.batch == 1:
                raise
            options = replace(options, batch=options.batch // 2)
            print(f"{', '.join(names)}: batches of {options.batch}", flush=True)


def now(device: Any) -> float:
    """Seconds, once the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes() -> int:
    """Of the GPU's memory since its statistics were last reset, or resident since the process began."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write(name: str, **content: Any) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    return path


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def recalled(results: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Rows to report of a result of recall.py by (task, policy, span of the learned store, or 0), at its main size."""
    return {
        (row["task"], row["policy"], (row["store"] or {"span": 0})["span"]): row
        for row in results["rows"]
        if row["seed"] == 1
        and row["lossless"] in (None, results["lossless"])
        and (row["store"] is None or row["store"]["name"] == "learned")
    }


def stored(text: str, window: int, share: float = SHARE) -> Any:
    """The `ahn.eval.policies.base.Stored` that "name" or "name:span" means, with a share of the window's places."""
    from ahn.eval.policies.base import Stored

    name, _, span = text.partition(":")
    return Stored(name, round(share * window), int(span or 1))
