"""A whole run: its output folder, its stages (gates, then cells), and resuming either."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from ahn.adapter_files import Adapter, read_adapter
from ahn.config import renamed
from ahn.errors import ConfigError
from ahn.files import atomic
from ahn.hf.weights import apply
from ahn.train import checkpoints
from ahn.train.prepare import build
from ahn.train.recipe import Recipe
from ahn.train.trainer import GateTrainer, MemoryTrainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run a recipe and return the folder of the trained adapter.

    Args:
        resume: continue from the newest whole checkpoint in the output folder. Without a checkpoint, start.

    Raises:
        ConfigError: the output folder cannot be made, another run writes into it, or it holds a run's checkpoints and
            `resume` is false.
        BaseModelError, DocumentError: see `build`.
        TrainingError: a loss or gradient is not finite, the disk is full, or a GPU was lost or has too little memory.
            Names the checkpoint to go on from.
    """
    output = Path(recipe.output)
    _check_output(output)
    folder = Path(recipe.of_gates().output) if recipe.gate_steps else output
    start, gate_start = (checkpoints.latest(where) if resume else None for where in (output, folder))
    if resume and start is None and gate_start is None:
        logger.warning("%s: no checkpoint to go on from; starting", output)
    elif not resume and (checkpoints.found(output) or checkpoints.found(folder)):
        raise ConfigError(
            f"output={recipe.output!r}: holds the checkpoints of a run: expected --resume, or a new folder"
        )
    trainer = build(recipe)
    with _alone_in(output) if trainer.is_world_process_zero() else nullcontext():
        return _train(recipe, trainer, start, gate_start)


def _train(recipe: Recipe, trainer: MemoryTrainer, start: Path | None, gate_start: Path | None) -> Path:
    """Run both stages, each from its checkpoint if there is one; a stage that is finished is skipped."""
    output, first = Path(recipe.output), trainer.is_world_process_zero()
    if first:
        checkpoints.sweep(output)
        checkpoints.sweep(output / "gates")
        _note_recipe(recipe, output, resumed=bool(start or gate_start))
    if recipe.start is not None and start is None and gate_start is None:
        apply(_first_weights(recipe), trainer.augmented, new_store=recipe.gate_steps > 0)
    if recipe.gate_steps and start is None:
        of_gates = GateTrainer(recipe.of_gates(), trainer.augmented, trainer.train_dataset)
        of_gates.run(gate_start)
        if first:
            _write(output / "gates.json", json.dumps(of_gates.state.log_history, indent=1) + "\n")
    trainer.run(start)
    trainer.save_model(str(output / "adapter"))
    if first:
        _write(output / "log.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
    return output / "adapter"


def _check_output(output: Path) -> None:
    """Raises ConfigError if the folder cannot be made or written into. Creates nothing."""
    try:
        there = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"output={os.fspath(output)!r}: {there} is no folder")
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise ConfigError(f"output={os.fspath(output)!r}: cannot be written: {error.strerror}") from error


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Lock the output folder until the process ends, even if it is killed. Raises ConfigError if another run has it."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise ConfigError(f"output={os.fspath(output)!r}: another run writes there: expected a new folder") from error


def _first_weights(recipe: Recipe) -> Adapter:
    """The adapter that a recipe starts from. Raises AdapterError; ConfigError if its memory has other settings."""
    assert recipe.start is not None
    adapter, config = read_adapter(recipe.start), recipe.memory()
    for key in ("cell", "sink_positions", "memory_positions", "feature_maps", "window_gate"):
        theirs, ours = getattr(adapter.config, key), getattr(config, key)
        if theirs != ours:
            raise ConfigError(f"start={recipe.start!r}: it has {key}={theirs!r}: expected {ours!r} as in the recipe")
    return adapter


def _note_recipe(recipe: Recipe, output: Path, resumed: bool) -> None:
    """Write `recipe.json`. A resumed run says how its recipe differs from the one before."""
    values, path = dataclasses.asdict(recipe), output / "recipe.json"
    if resumed and path.is_file():
        before, now = renamed(json.loads(path.read_text()), str(path)), json.loads(json.dumps(values))
        different = [f"{key}: {before.get(key)} before, {now[key]} now" for key in now if before.get(key) != now[key]]
        if different:
            logger.warning("going on with another recipe: %s", "; ".join(different))
    output.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(values, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)
