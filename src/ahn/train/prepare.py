"""From a recipe to a trainer that is ready to start: the rows, the base with a new memory, and checks of both."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers.integrations import INTEGRATION_TO_CALLBACK

from ahn.adapter_files import base_shape
from ahn.bases import base_config, load_base, load_tokenizer
from ahn.errors import BaseModelError, ConfigError, DocumentError
from ahn.hf.augment import augment
from ahn.hub import cache_folder
from ahn.memory.handle import layers_of
from ahn.registry import did_you_mean
from ahn.train import data, windows
from ahn.train.check import Difference, Heads, check
from ahn.train.recipe import Recipe
from ahn.train.rows import Rows
from ahn.train.trainer import MemoryTrainer


def build(recipe: Recipe) -> MemoryTrainer:
    """Read the data, load the base and return the trainer of a recipe.

    The first process prints on standard error how much will be trained on how much.

    Raises:
        BaseModelError, ConfigError, DocumentError: the base, the recipe or the data do not fit each other. Said before
            the base is loaded.
    """
    machine = machine_of(recipe)
    _check_loggers(recipe)
    tokenizer, kept = load_tokenizer(recipe.base), cache_folder() / "rows"
    rows = data.rows(list(recipe.data), tokenizer, recipe.length, recipe.limit, recipe.seed, kept)
    found, least = len(rows), min(windows.allowed(recipe.length, recipe.lossless))
    rows = rows.where(rows.counts[:, least:].any(1))  # most rows of a long document with few questions teach nothing
    _check_rows(rows, recipe, base_config(recipe.base).get_text_config(), machine.num_processes)
    trainer = trainer_of(recipe, base_of(recipe, machine.device), rows)
    if machine.is_main_process:
        print(_plan(recipe, rows, found - len(rows), trainer.augmented, machine), file=sys.stderr)
    return trainer


def machine_of(recipe: Recipe) -> PartialState:
    """This process among those of the run, and its device. Raises ConfigError if they cannot share a base."""
    machine = PartialState(cpu=not torch.cuda.is_available())  # of the process's own GPU, if torchrun started several
    if recipe.fsdp and machine.num_processes == 1:
        raise ConfigError("fsdp=True: one process has nobody to share with: expected torchrun --nproc-per-node N ...")
    if recipe.fsdp and machine.distributed_type == DistributedType.MULTI_CPU:
        raise ConfigError("fsdp=True: accelerate shards over GPUs only, and these processes have none")
    return machine


def base_of(recipe: Recipe, device: torch.device) -> Any:
    """The base of a recipe, where and in which dtype it is trained. Raises BaseModelError."""
    if recipe.fsdp:  # each layer goes from the memory of the host to the GPUs in shards
        return load_base(recipe.base, torch.bfloat16 if device.type == "cuda" else None, "cpu")
    return load_base(recipe.base, device=device)


def trainer_of(recipe: Recipe, model: Any, rows: Rows) -> MemoryTrainer:
    """The trainer of a recipe that gives this base a new memory, the same for the same seed, and trains it on `rows`.

    Args:
        model: a base without a memory (`base_of`). It is changed.
    """
    torch.manual_seed(recipe.seed)
    augment(model, recipe.memory())
    model.ahn_names["base"] = recipe.base
    for layer in layers_of(model):
        if layer.cell is not None:
            layer.cell.float()  # the weights that are trained; the base stays in its dtype
        if layer.store is not None:
            layer.store.requires_grad_(False)  # its gates are trained by a GateTrainer
    if recipe.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.train()  # checkpointing is off in eval mode; there is no dropout to turn on
    return MemoryTrainer(recipe, model, rows)


def check_machine(recipe: Recipe) -> list[Difference]:
    """Compare this machine's gradients with plain torch at the base's head size (`ahn.train.check`)."""
    base = base_shape(base_config(recipe.base))
    cuda = torch.cuda.is_available()
    device = PartialState(cpu=not cuda).device
    dtype = torch.bfloat16 if cuda else torch.float32
    heads = Heads(min(base["num_heads"], 4), base["head_dim"], device, dtype)
    return check(recipe.cell, heads, recipe.feature_maps, gates=recipe.gate_steps > 0)


def _check_loggers(recipe: Recipe) -> None:
    for name in recipe.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to: unknown logger {name!r}: {did_you_mean(name, INTEGRATION_TO_CALLBACK)}")


def _check_rows(rows: Rows, recipe: Recipe, base: Any, processes: int) -> None:
    """Raises if these rows cannot train this base, given by its transformers config."""
    if not len(rows):
        least = min(windows.allowed(recipe.length, recipe.lossless))
        raise DocumentError(
            f"no token is to be predicted behind the first {least} of {recipe.length}: expected answers further back, "
            "longer rows, or a smaller lossless size"
        )
    top, size = int(rows.ids.max()), base.vocab_size
    if top >= size:
        raise BaseModelError(
            f"{recipe.base}: its tokenizer gives the token {top}, its embedding has {size} rows: "
            "expected a tokenizer of this base"
        )
    if len(rows) < recipe.batch * processes:
        raise DocumentError(
            f"the data fill {len(rows)} rows of {recipe.length} tokens: expected at least the {recipe.batch} x "
            f"{processes} rows of one step (batch x processes); a smaller batch or length may do"
        )
    context = getattr(base, "max_position_embeddings", None) or recipe.length
    if recipe.loss != "ce" and recipe.length > context:
        raise ConfigError(
            f"length={recipe.length}: the base, which is the teacher, has {context} positions: expected at most those"
        )
    if max(windows.allowed(recipe.length, recipe.lossless)) > context:
        raise ConfigError(f"lossless={list(recipe.lossless)}: the base has {context} positions: expected at most those")


def _plan(recipe: Recipe, rows: Rows, idle: int, model: Any, machine: PartialState) -> str:
    """The size of a run in words: weights, rows (`idle` others were left out), steps."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    processes = f" x {machine.num_processes}" if machine.num_processes > 1 else ""
    counting = rows.counts[:, min(windows.allowed(recipe.length, recipe.lossless)) :]
    taken = recipe.batch * machine.num_processes
    stages = [(recipe.gate_steps, " for the store's gates"), (recipe.steps, "")]
    said = ", then ".join(
        f"{steps:,} steps of {taken:,} rows{purpose}: {steps * taken / len(rows):.2g} passes over the data"
        for steps, purpose in stages
        if steps
    )
    return (
        f"{recipe.base} with {recipe.cell}: {trained:,} weights to train, on {machine.device.type}{processes}\n"
        f"{len(rows):,} rows of {recipe.length:,} tokens; of those behind the lossless ones "
        f"{counting.float().mean().item():.1%} are to be predicted"
        f"{f' ({idle:,} rows without any are left out)' if idle else ''}\n"
        f"{said}"
    )
