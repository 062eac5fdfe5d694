"""The Hugging Face Trainer around the distillation: loop, resume, logging, several GPUs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, save_fsdp_optimizer
from filelock import FileLock, Timeout
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ahn import cells
from ahn.adapter_files import Adapter, base_shape, read_adapter, write_adapter
from ahn.bases import base_config, load_base, load_tokenizer
from ahn.config import RENAMED
from ahn.errors import AdapterError, BaseModelError, ConfigError, DocumentError, TrainingError, some
from ahn.files import atomic
from ahn.hf.augment import augment, set_window
from ahn.hf.weights import adapter_of, apply
from ahn.hub import cache_folder
from ahn.memory.handle import layers_of
from ahn.registry import did_you_mean
from ahn.train import checkpoints, data, distill, gates, windows
from ahn.train.check import Difference, check
from ahn.train.progress import Progress
from ahn.train.recipe import Recipe

logger = logging.getLogger(__name__)


class Distiller(nn.Module):
    """The model and its loss as one module, so that data-parallel wrappers see the whole step."""

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, input_ids: Tensor, counts: Tensor | None) -> dict[str, Tensor]:
        """The loss; without `counts` the last hidden states [B, T, D]."""
        if counts is None:
            return {"hidden": self.model.get_decoder()(input_ids, use_cache=False).last_hidden_state}
        return {"loss": distill.loss(self.model, input_ids, counts, self.kind)}


class MemoryTrainer(Trainer):
    """Trains the cells of a Distiller; checkpoints hold the adapter, not the base."""

    what = "step"  # before its number, for people

    def __init__(self, recipe: Recipe, model: Any, rows: data.Rows) -> None:
        arguments = _arguments(recipe, type(model.get_decoder().layers[0]).__name__)
        super().__init__(model=Distiller(model, recipe.loss), args=arguments, train_dataset=rows)
        self.recipe = recipe
        self.batch: dict[str, Tensor] = {}  # of the last step
        self.loss: Tensor | None = None  # of the last step, of this process
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(self.what, recipe.batch * recipe.length * self.args.world_size))

    @property
    def augmented(self) -> Any:
        return self.accelerator.unwrap_model(self.model).model

    def train(self, *args: Any, **options: Any) -> Any:
        """Layers are compiled only now: gates are trained by other forwards, for each of which they would be again."""
        if self.recipe.compile and self.args.device.type == "cuda":
            compile_layers(self.augmented)
        return super().train(*args, **options)

    def run(self, start: Path | None) -> None:
        """All steps, or those behind a checkpoint. Raises TrainingError, see `train`."""
        reached = TrainerState()
        if start is not None:
            apply(read_adapter(start), self.augmented)
            reached = TrainerState.load_from_json(str(start / TRAINER_STATE_NAME))
        if reached.global_step >= self.recipe.steps:  # the Trainer would take one step more
            self.state = reached
            return
        try:
            self.train(resume_from_checkpoint=None if start is None else str(start))
        except (OSError, RuntimeError) as error:
            if isinstance(error, TrainingError) or not (
                reason := str(error) if isinstance(error, OSError) else _lost(error)
            ):
                raise
            at = f"{self.what} {self.state.global_step + 1}"
            raise TrainingError(f"{at}: {reason}; {self.last_good()}") from error
        except KeyboardInterrupt as interrupt:
            at = f"{self.what} {self.state.global_step + 1}"
            raise KeyboardInterrupt(f"interrupted at {at}; {self.last_good()}") from interrupt

    def draw(self) -> tuple[int, int, int]:
        """Window, sinks and places of the store of this step."""
        recipe = self.recipe
        step = self.state.global_step
        return self.with_store(*windows.draw(recipe.seed, step, recipe.length, recipe.lossless, recipe.sinks))

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        size = self.draw()
        set_window(self.augmented, *size)
        loss = model(**inputs)["loss"]
        if self.args.world_size == 1:
            return loss
        # processes are averaged with equal weight, but the mean is over tokens, and some have more of them that count
        mine = inputs["counts"][:, sum(size) :].sum()
        return loss * (self.args.world_size * mine / self.accelerator.reduce(mine, "sum").clamp(min=1))

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Tensor:
        with self.forms():
            self.batch, self.loss = inputs, super().training_step(model, inputs, *args, **options)
        return self.loss

    def forms(self) -> AbstractContextManager[None]:
        """Within, the model attends as this step wants it."""
        return nullcontext()

    def _get_grad_norm(self, *args: Any, **options: Any) -> Any:
        """The Trainer's last call before the optimiser's step. Raises TrainingError in place of a step with NaN."""
        norm = super()._get_grad_norm(*args, **options)
        assert self.loss is not None
        self._check_finite(self.loss, norm)
        return norm

    def _check_finite(self, *values: Any) -> None:
        """Raises TrainingError unless all numbers are finite in all processes, which so stop together."""
        whole = [value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value) for value in values]
        sound = torch.stack([value.isfinite().all().to(self.args.device) for value in whole]).all()
        if not self.accelerator.reduce((~sound).float(), "sum").item():
            return
        names = [name for name, parameter in self.augmented.named_parameters() if not _is_finite(parameter)]
        why = f"{some(names)} hold such numbers" if names else "a smaller lr may help"
        raise TrainingError(
            f"{self.what} {self.state.global_step + 1}: the loss or its gradient is NaN or infinite, and training "
            f"stopped before that step ({why}); {self.last_good()}"
        )

    def with_store(self, window: int, sinks: int) -> tuple[int, int, int]:
        """Window, sinks and store of as many lossless tokens as `window` + `sinks`."""
        recipe = self.recipe
        if recipe.store is None:
            return window, sinks, 0
        share = recipe.store_size / (recipe.window + recipe.store_size)
        store = min(max(recipe.store_span, round(window * share)), window - recipe.store_span)
        return window - store, sinks, store

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        cell = cells.get(self.recipe.cell)
        return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] not in cell.decay_parameters]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone. All processes come here, because sharded weights are gathered; the first one writes."""
        set_window(self.augmented, self.recipe.window, self.recipe.kept_sinks, self.recipe.store_size)
        adapter = adapter_of(self.augmented)
        if self.args.should_save:
            write_adapter(adapter, output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # as the Trainer does, without its copy of the base
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written only if the model with these weights still gives finite numbers."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with torch.no_grad(), self.forms():
            ids = self._prepare_inputs(self.batch)["input_ids"]
            self._check_finite(self.model(input_ids=ids, counts=None)["hidden"])
        try:
            if self.args.should_save:
                checkpoints.unseal(folder)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has written its random state
            if self.args.should_save:
                checkpoints.seal(folder)
                checkpoints.rotate(Path(self.args.output_dir))
        except (OSError, RuntimeError, AdapterError) as error:  # torch.save has no type of its own
            if _lost(error):
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # gives the disk its space back
            free = f"{shutil.disk_usage(self.args.output_dir).free / 2**20:,.0f} MiB of the disk are free"
            raise TrainingError(f"{folder}: cannot be written: {error} ({free}); {self.last_good()}") from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `train` has loaded the adapter, before the weights were sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The recipe's rate and weight decay count, not the ones the checkpoint was written with."""
        if checkpoint is None:
            return
        ours = [{key: group[key] for key in ("initial_lr", "weight_decay")} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = self.lr_scheduler
        schedule.base_lrs = [group["initial_lr"] for group in ours]
        for group, own, shape in zip(self.optimizer.param_groups, ours, schedule.lr_lambdas, strict=True):
            group.update(own, lr=own["initial_lr"] * shape(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def last_good(self) -> str:
        """What a run that ends here can go on from, for messages."""
        folder = checkpoints.latest(Path(self.args.output_dir))
        return f"to go on from {folder}: the same command with --resume" if folder else "no checkpoint was written yet"


class GateTrainer(MemoryTrainer):
    """Trains the gates of the stores instead (`ahn.train.gates`), with the window that the recipe suggests to use."""

    what = "gates"

    def train(self, *args: Any, **options: Any) -> Any:
        mine = gates.parameters(self.augmented)
        others = [p for p in self.augmented.parameters() if p.requires_grad]
        for parameter in others:
            parameter.requires_grad_(False)
        for parameter in mine:
            parameter.requires_grad_(True)
        try:
            return Trainer.train(self, *args, **options)
        finally:
            for parameter in mine:
                parameter.requires_grad_(False)
                parameter.grad = None
            for parameter in others:
                parameter.requires_grad_(True)

    def draw(self) -> tuple[int, int, int]:
        return self.recipe.window, self.recipe.kept_sinks, self.recipe.store_size

    def forms(self) -> AbstractContextManager[None]:
        done = min(self.state.global_step / max(self.recipe.steps - 1, 1), 1.0)
        return gates.attending(self.augmented, gates.warmth_at(done))


def build(recipe: Recipe) -> MemoryTrainer:
    """Model, data and trainer of a recipe. Raises BaseModelError, ConfigError, DocumentError."""
    machine = PartialState(cpu=not torch.cuda.is_available())  # of the process's own GPU, if torchrun started several
    if recipe.fsdp and machine.num_processes == 1:
        raise ConfigError("fsdp=True: one process has nobody to share with: expected torchrun --nproc-per-node N ...")
    if recipe.fsdp and machine.distributed_type == DistributedType.MULTI_CPU:
        raise ConfigError("fsdp=True: accelerate shards over GPUs only, and these processes have none")
    _check_loggers(recipe)
    tokenizer, kept = load_tokenizer(recipe.base), cache_folder() / "rows"
    rows = data.rows(list(recipe.data), tokenizer, recipe.length, recipe.limit, recipe.seed, kept)
    found, least = len(rows), min(windows.allowed(recipe.length, recipe.lossless))
    rows = rows.where(rows.counts[:, least:].any(1))  # in a long document with few questions many teach nothing
    _check_rows(rows, recipe, base_config(recipe.base).get_text_config(), machine.num_processes)
    torch.manual_seed(recipe.seed)
    model = _model(recipe, machine.device)
    if machine.is_main_process:
        print(_plan(recipe, rows, found - len(rows), model, machine), file=sys.stderr)
    if recipe.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.train()  # checkpointing is off in eval mode; there is no dropout to turn on
    return MemoryTrainer(recipe, model, rows)


def _model(recipe: Recipe, device: torch.device) -> Any:
    """The base with new cells."""
    if recipe.fsdp:  # from the memory of the host each layer goes to the GPUs in shards
        model = load_base(recipe.base, torch.bfloat16 if device.type == "cuda" else None, "cpu")
    else:
        model = load_base(recipe.base, device=device)
    augment(model, recipe.memory())
    model.ahn_names["base"] = recipe.base
    for layer in layers_of(model):
        if layer.cell is not None:
            layer.cell.float()  # the weights that are trained; the base stays in its dtype
        if layer.store is not None:
            layer.store.requires_grad_(False)  # its gates are trained apart
    return model


def _check_loggers(recipe: Recipe) -> None:
    for name in recipe.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to: unknown logger {name!r}: {did_you_mean(name, INTEGRATION_TO_CALLBACK)}")


def _arguments(recipe: Recipe, layer_class: str) -> TrainingArguments:
    """The recipe in the Trainer's words. `layer_class`: what FSDP shards one by one."""
    loggers = set(recipe.report_to) & set(get_available_reporting_integrations())
    for name in sorted(set(recipe.report_to) - loggers):
        logger.warning("report_to: nothing is written for %s, which is not installed here", name)
    arguments = TrainingArguments(
        output_dir=recipe.output,
        per_device_train_batch_size=recipe.batch,
        max_steps=recipe.steps,
        learning_rate=recipe.lr,
        warmup_steps=int(recipe.warmup * recipe.steps),
        lr_scheduler_type="cosine",
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        logging_steps=recipe.log_every,
        disable_tqdm=True,  # Progress has a bar
        save_steps=recipe.save_every,
        seed=recipe.seed,
        data_seed=recipe.seed,
        report_to=sorted(loggers),
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        dataloader_drop_last=True,  # a step is always of the same rows, however many processes share them
        ddp_find_unused_parameters=False,
        fsdp=recipe.fsdp,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": [layer_class]},
    )
    if arguments.n_gpu > 1:  # the Trainer would copy the model to all of them in every step (DataParallel)
        arguments._n_gpu = 1
        logger.warning("training on one of %s GPUs; docs/training.md says how to use more", torch.cuda.device_count())
    return arguments


def _plan(recipe: Recipe, rows: data.Rows, idle: int, model: Any, machine: PartialState) -> str:
    """What is about to happen, for people."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    processes = f" x {machine.num_processes}" if machine.num_processes > 1 else ""
    counting = rows.counts[:, min(windows.allowed(recipe.length, recipe.lossless)) :]
    taken = recipe.batch * machine.num_processes
    stages = [(recipe.gate_steps, " for the store's gates"), (recipe.steps, "")]
    said = ", then ".join(
        f"{steps:,} steps of {taken:,} rows{what}: {steps * taken / len(rows):.2g} passes over the data"
        for steps, what in stages
        if steps
    )
    return (
        f"{recipe.base} with {recipe.cell}: {trained:,} weights to train, on {machine.device.type}{processes}\n"
        f"{len(rows):,} rows of {recipe.length:,} tokens; of those behind the lossless ones "
        f"{counting.float().mean().item():.1%} are to be predicted"
        f"{f' ({idle:,} rows without any are left out)' if idle else ''}\n"
        f"{said}"
    )


def compile_layers(model: Any) -> None:
    """Compile the frozen layers and what is around the memory's kernels."""
    torch.set_float32_matmul_precision("high")  # of the cells' recurrences; the base is in bfloat16 anyhow
    model.enable_input_require_grads()  # so that the first layer is compiled as the others are
    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward)
    for memory in layers_of(model):
        memory.compile_for_training()


def _check_rows(rows: data.Rows, recipe: Recipe, base: Any, processes: int) -> None:
    """What cannot be trained is said before the base, of this transformers config, is loaded."""
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


def check_machine(recipe: Recipe) -> list[Difference]:
    """Compare this machine's gradients with plain torch at the base's head size (`ahn.train.check`)."""
    base = base_shape(base_config(recipe.base))
    cuda = torch.cuda.is_available()
    device = PartialState(cpu=not cuda).device
    dtype = torch.bfloat16 if cuda else torch.float32
    heads, gates_too = min(base["num_heads"], 4), recipe.gate_steps > 0
    return check(recipe.cell, heads, base["head_dim"], device, dtype, recipe.feature_maps, gates_too)


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run a recipe and return the folder of the trained adapter.

    Args:
        resume: go on from the newest whole checkpoint in the output folder; without one, start.

    Raises:
        ConfigError: the output folder cannot be made, or holds another run and `resume` is false.
        BaseModelError, DocumentError: see `build`.
        TrainingError: a loss or gradient is not finite, the disk is full, a GPU was lost or has too little memory;
            says what to go on from.
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
    """All stages of a run, each from its checkpoint if it has one."""
    output, first = Path(recipe.output), trainer.is_world_process_zero()
    if first:
        checkpoints.sweep(output)
        checkpoints.sweep(output / "gates")
        _note_recipe(recipe, output, changed=bool(start or gate_start))
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
    """Raises ConfigError if no folder can be there, or nothing be written into it. Leaves nothing behind."""
    try:
        there = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"output={os.fspath(output)!r}: {there} is no folder")
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise ConfigError(f"output={os.fspath(output)!r}: cannot be written: {error.strerror}") from error


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Raises ConfigError if another run writes into this folder. The lock ends with the process, however that ends."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise ConfigError(f"output={os.fspath(output)!r}: another run writes there: expected a new folder") from error


def _first_weights(recipe: Recipe) -> Adapter:
    """The adapter that a recipe starts from. Raises AdapterError, ConfigError if it is of another form."""
    assert recipe.start is not None
    adapter, config = read_adapter(recipe.start), recipe.memory()
    for key in ("cell", "sink_positions", "memory_positions", "feature_maps", "window_gate"):
        theirs, ours = getattr(adapter.config, key), getattr(config, key)
        if theirs != ours:
            raise ConfigError(f"start={recipe.start!r}: it has {key}={theirs!r}: expected {ours!r} as in the recipe")
    return adapter


def _note_recipe(recipe: Recipe, output: Path, changed: bool) -> None:
    values, path = dataclasses.asdict(recipe), output / "recipe.json"
    if changed and path.is_file():
        before, now = json.loads(path.read_text()), json.loads(json.dumps(values))
        before = {RENAMED.get(key, key): value for key, value in before.items()}
        different = [f"{key}: {before.get(key)} before, {now[key]} now" for key in now if before.get(key) != now[key]]
        if different:
            logger.warning("going on with another recipe: %s", "; ".join(different))
    output.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(values, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)


def _is_finite(weight: Tensor) -> bool:
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return not local.is_floating_point() or bool(local.isfinite().all())


def _lost(error: BaseException) -> str | None:
    """What happened to the device or to the connection between them; None if the error is about something else."""
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{said} Expected: a smaller batch or length, checkpointing: true, or fsdp: true on several GPUs"
    known = (torch.AcceleratorError, torch.distributed.DistError)
    signs = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error", "by peer")
    if isinstance(error, known) or any(sign in said for sign in signs):
        return f"a GPU was lost, or the connection to another process: {said}"
    return None
