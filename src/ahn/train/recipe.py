"""A training run as a YAML file. Every key is checked; `key=value` on the command line overrides the file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ahn import stores, yaml_file
from ahn.config import RENAMED, AHNConfig, renamed
from ahn.errors import ConfigError
from ahn.registry import nearest
from ahn.train import windows

LOSSES = ("kl", "ce", "kl+ce", "attention")

logger = logging.getLogger("ahn")


@dataclass(frozen=True)
class Recipe:
    """A training run: the base, the data, the memory and how it is trained.

    Args:
        base: base model (`ahn.from_pretrained`). cell: name of the cell. output: folder of checkpoints and adapter.
        data: sources (`ahn.train.sources`). limit: tokens of each source, at most; None: all.
        length: tokens of a row. batch: rows a step and device. steps: optimiser steps.
        lr, warmup, weight_decay, clip: AdamW's learning rate; the share of the steps over which it rises, before it
            falls as a cosine; its weight decay (none on the cells' decay parameters); the largest norm of the gradient.
        loss: "kl" (paper); "ce"; "kl+ce", the mean of both; or "attention": each layer learns the output of full
            attention (`ahn.train.distill.transfer`), which is fast and meant as a start for "kl".
        start: an adapter to start from, with the same settings of the memory; with gate_steps it need not have gates.
            None: a new memory.
        lossless, sinks: sizes to draw from for each batch. One of each makes them fixed.
        window, kept_sinks: the sizes that the finished adapter suggests.
        sink_positions, memory_positions, feature_maps, window_gate, store, store_size, store_span: see AHNConfig. In
            training the store takes the same share of each drawn window as store_size of window + store_size.
        gate_steps, gate_lr: steps that train the gates of a store (`ahn.train.gates`), and their learning rate. They
            come before the steps of the cells and use window and kept_sinks. With steps: 0 only gates are trained.
        checkpointing: recompute activations instead of keeping them. compile: compile the frozen layers.
        fsdp: shard the base over the GPUs of `torchrun`'s processes (FSDP2), for bases that do not fit one.
        save_every: steps between checkpoints. log_every: steps between log lines. seed: of everything
            that is drawn.
        report_to: loggers of the Trainer, used where they are installed.
    """

    base: str
    output: str
    data: tuple[str, ...]
    cell: str = "gated_deltanet"
    limit: int | None = None
    length: int = 4096
    batch: int = 8
    steps: int = 500
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    loss: str = "kl"
    start: str | None = None
    lossless: tuple[int, ...] = windows.LOSSLESS
    sinks: tuple[int, ...] = windows.SINKS
    window: int = 1920
    kept_sinks: int = 128
    sink_positions: str = "clipped"
    memory_positions: str = "rope"
    feature_maps: int = 0
    window_gate: bool = False
    store: str | None = None
    store_size: int = 0
    store_span: int = 1
    gate_steps: int = 0
    gate_lr: float = 2e-3
    checkpointing: bool = False
    compile: bool = True
    fsdp: bool = False
    save_every: int = 100
    log_every: int = 10
    seed: int = 0
    report_to: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            _check_type(key.name, str(key.type), getattr(self, key.name))
        for name in ("length", "batch", "save_every", "log_every"):
            _expect(name, getattr(self, name), getattr(self, name) >= 1, "an integer of at least 1")
        least = 0 if self.gate_steps else 1
        _expect("steps", self.steps, self.steps >= least, f"an integer of at least {least}")
        _expect("gate_steps", self.gate_steps, self.gate_steps >= 0, "an integer of at least 0")
        if self.gate_steps and self.store is None:
            raise ConfigError(f"gate_steps={self.gate_steps} without a store: expected the name of a store, or 0")
        if self.gate_steps and self.store is not None and not stores.get(self.store).trained:
            raise ConfigError(f"gate_steps={self.gate_steps}: store={self.store!r} has nothing to train: expected 0")
        if self.gate_steps and self.fsdp:
            raise ConfigError("gate_steps with fsdp=True: gates are trained with a whole base: expected DDP")
        for name in ("lr", "clip", "gate_lr"):
            _expect(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a number above 0")
        _expect("warmup", self.warmup, 0 <= self.warmup <= 1, "a share of the steps, 0 to 1")
        _expect("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a number of at least 0")
        _expect("limit", self.limit, self.limit is None or self.limit >= 1, "an integer of at least 1, or null")
        _expect("kept_sinks", self.kept_sinks, self.kept_sinks >= 0, "an integer of at least 0")
        _expect("seed", self.seed, 0 <= self.seed < 2**32, "an integer of 0 to 2**32 - 1")
        _expect("sinks", list(self.sinks), min(self.sinks, default=-1) >= 0, "integers of at least 0")
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r}: expected one of {', '.join(LOSSES)}")
        if self.loss == "attention" and self.fsdp:
            raise ConfigError("loss='attention' with fsdp=True: its layers learn apart from each other: expected DDP")
        if not self.data:
            raise ConfigError("data=[]: expected at least one source")
        window = min(size - sinks for size, sinks in windows.pairs(self.length, self.lossless, self.sinks))
        if self.store is not None:
            most = window // 2  # half for the store, half for the window
            _expect("store_span", self.store_span, self.store_span <= most, f"at most {most}, half the least window")
        self.memory()

    def of_gates(self) -> Recipe:
        """The recipe of the stage that trains the gates, in a folder of its own."""
        return dataclasses.replace(
            self, output=str(Path(self.output) / "gates"), steps=self.gate_steps, lr=self.gate_lr, loss="kl",
            weight_decay=0.0, gate_steps=0,
        )  # fmt: skip

    def memory(self) -> AHNConfig:
        """The settings of the memory. Raises ConfigError."""
        return AHNConfig(
            self.cell,
            self.window,
            self.kept_sinks,
            sink_positions=self.sink_positions,
            memory_positions=self.memory_positions,
            feature_maps=self.feature_maps,
            window_gate=self.window_gate,
            store=self.store,
            store_size=self.store_size,
            store_span=self.store_span,
        )


def describe() -> str:
    """The keys of a recipe and their defaults, for `--help`."""
    meanings = inspect.cleandoc(Recipe.__doc__ or "").partition("Args:\n")[2]
    required = ("base", "output", "data")
    defaults = [
        f"{key.name}={json.dumps(key.default)}" for key in dataclasses.fields(Recipe) if key.name not in required
    ]
    lines = textwrap.wrap(
        "  ".join(defaults), 110, initial_indent="    ", subsequent_indent="    ", break_long_words=False
    )
    return "\n".join(["keys of a recipe:", meanings, "", "defaults:", *lines])


_TYPES: dict[str, tuple[type, str]] = {
    "str": (str, "text"),
    "int": (int, "an integer"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
}


def _check_type(name: str, declared: str, value: Any) -> None:
    """Raises ConfigError unless `value` is of the type written in the class above."""
    inner = declared.removeprefix("tuple[").partition(",")[0].partition(" ")[0]
    if inner not in _TYPES:
        return
    kind, words = _TYPES[inner]
    if declared.startswith("tuple"):
        for item in value:
            _expect(name, list(value), type(item) is kind, f"a list, each {words}")
    elif not (value is None and declared.endswith("None")):
        _expect(name, value, type(value) is kind, words)


def _expect(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r}: expected {allowed}")


def load(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Raises ConfigError naming the key, the value and what is allowed."""
    return from_dict(yaml_file.read(path, "recipe", changes))


def from_dict(values: dict[str, Any]) -> Recipe:
    """A recipe from keys and values. Old names of keys are read with a warning. Raises ConfigError."""
    old, values = RENAMED.keys() & values, renamed(values, "the recipe")
    for key in sorted(old):
        logger.warning("the recipe's %s is called %s now", key, RENAMED[key])
    known = {field.name: field for field in dataclasses.fields(Recipe)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in the recipe{nearest(key, known)}")
    missing = [key for key in ("base", "output", "data") if key not in values]
    if missing:
        raise ConfigError(f"the recipe has no {', '.join(missing)}")
    values = {key: _typed(known[key], value) for key, value in values.items()}
    return Recipe(**values)


def _typed(field: Any, value: Any) -> Any:
    """A value from YAML in the type of its field."""
    if field.type.startswith("tuple"):
        return tuple(_at_home(item) for item in (value if isinstance(value, list) else [value]))
    if field.type == "float" and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError as error:
            raise ConfigError(f"{field.name}={value!r}: expected a number") from error
    return _at_home(value)


def _at_home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) else value
