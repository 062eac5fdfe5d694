"""The Hugging Face Trainer around the distillation: steps, checkpoints, and faults that end a run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ahn import cells
from ahn.adapter_files import read_adapter, write_adapter
from ahn.engine.patch import patched
from ahn.errors import AdapterError, TrainingError, some
from ahn.hf.augment import set_window
from ahn.hf.weights import adapter_of, apply
from ahn.memory.handle import layers_of
from ahn.train import checkpoints, distill, gates, windows
from ahn.train.progress import Progress
from ahn.train.recipe import Recipe
from ahn.train.rows import Rows

logger = logging.getLogger(__name__)


class Distiller(nn.Module):
    """The model and its loss as one module, so that data-parallel wrappers see the whole step."""

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind  # kind: of the loss, see `distill.loss`

    def forward(self, input_ids: Tensor, counts: Tensor | None) -> dict[str, Tensor]:
        """The loss; without `counts` the last hidden states [B, T, D]."""
        if counts is None:
            return {"hidden": self.model.get_decoder()(input_ids, use_cache=False).last_hidden_state}
        return {"loss": distill.loss(self.model, input_ids, counts, self.kind)}


class MemoryTrainer(Trainer):
    """Trains the cells of a Distiller. Its checkpoints hold the adapter, not the base."""

    label = "step"  # precedes the number of a step in messages

    def __init__(self, recipe: Recipe, model: Any, rows: Rows) -> None:
        arguments = _arguments(recipe, type(model.get_decoder().layers[0]).__name__)
        super().__init__(model=Distiller(model, recipe.loss), args=arguments, train_dataset=rows)
        self.recipe = recipe
        self.batch: dict[str, Tensor] = {}  # of the last step
        self.loss: Tensor | None = None  # of the last step, of this process
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(self.label, recipe.batch * recipe.length * self.args.world_size))

    @property
    def augmented(self) -> Any:
        return self.accelerator.unwrap_model(self.model).model

    def train(self, *args: Any, **options: Any) -> Any:
        """Train with layers that are compiled, if the recipe says so; the step of a GateTrainer is not."""
        with self._compiled():
            return super().train(*args, **options)

    def _compiled(self) -> AbstractContextManager[None]:
        fast = self.recipe.compile and self.args.device.type == "cuda"
        return compiled_layers(self.augmented) if fast else nullcontext()

    def run(self, start: Path | None) -> None:
        """Take all steps, or those that follow a checkpoint. Raises TrainingError, see `ahn.train.run.train`."""
        reached = TrainerState()
        if start is not None:
            apply(read_adapter(start), self.augmented)
            reached = TrainerState.load_from_json(str(start / TRAINER_STATE_NAME))
        if reached.global_step >= self.recipe.steps:  # otherwise the Trainer would take one step more
            self.state = reached
            return
        try:
            self.train(resume_from_checkpoint=None if start is None else str(start))
        except (OSError, RuntimeError) as error:
            if isinstance(error, TrainingError) or not (
                reason := str(error) if isinstance(error, OSError) else _lost(error)
            ):
                raise
            at = f"{self.label} {self.state.global_step + 1}"
            raise TrainingError(f"{at}: {reason}; {self.last_good()}") from error
        except KeyboardInterrupt as interrupt:
            at = f"{self.label} {self.state.global_step + 1}"
            raise KeyboardInterrupt(f"interrupted at {at}; {self.last_good()}") from interrupt

    def draw(self) -> tuple[int, int, int]:
        """Window, sinks and size of the store in this step."""
        recipe = self.recipe
        step = self.state.global_step
        return self.with_store(*windows.draw(recipe.seed, step, recipe.length, recipe.lossless, recipe.sinks))

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        size = self.draw()
        set_window(self.augmented, *size)
        loss = model(**inputs)["loss"]
        if self.args.world_size == 1:
            return loss
        # The Trainer weighs processes equally, but the loss is a mean over tokens, and their numbers differ.
        mine = inputs["counts"][:, sum(size) :].sum()
        return loss * (self.args.world_size * mine / self.accelerator.reduce(mine, "sum").clamp(min=1))

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Tensor:
        with self.forward_mode():
            self.batch, self.loss = inputs, super().training_step(model, inputs, *args, **options)
        return self.loss

    def forward_mode(self) -> AbstractContextManager[None]:
        """Within this context the model attends as this stage of the training needs it."""
        return nullcontext()

    def _get_grad_norm(self, *args: Any, **options: Any) -> Any:
        """The Trainer calls this last before the optimiser's step. Raises TrainingError instead of a step with NaN."""
        norm = super()._get_grad_norm(*args, **options)
        assert self.loss is not None
        self._check_finite(self.loss, norm)
        return norm

    def _check_finite(self, *values: Any) -> None:
        """Raises TrainingError in all processes if a number in any of them is not finite: they stop together."""
        whole = [value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value) for value in values]
        sound = torch.stack([value.isfinite().all().to(self.args.device) for value in whole]).all()
        if not self.accelerator.reduce((~sound).float(), "sum").item():
            return
        names = [name for name, parameter in self.augmented.named_parameters() if not _is_finite(parameter)]
        why = f"{some(names)} hold such numbers" if names else "a smaller lr may help"
        raise TrainingError(
            f"{self.label} {self.state.global_step + 1}: the loss or its gradient is NaN or infinite, and training "
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
        """Write the adapter alone. All processes call this, because sharded weights are gathered; the first writes."""
        set_window(self.augmented, self.recipe.window, self.recipe.kept_sinks, self.recipe.store_size)
        adapter = adapter_of(self.augmented)
        if self.args.should_save:
            write_adapter(adapter, output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # as the Trainer does it, but without a copy of the base
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, but only if the model gives finite numbers with these weights."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with torch.no_grad(), self.forward_mode():
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
                shutil.rmtree(folder, ignore_errors=True)  # frees its disk space
            free = f"{shutil.disk_usage(self.args.output_dir).free / 2**20:,.0f} MiB of the disk are free"
            raise TrainingError(f"{folder}: cannot be written: {error} ({free}); {self.last_good()}") from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `run` has loaded the adapter, before the weights were sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, but keep the learning rate and weight decay of the recipe, even if the checkpoint has others."""
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
        """The checkpoint to go on from if the run ends here, in words."""
        folder = checkpoints.latest(Path(self.args.output_dir))
        return f"to go on from {folder}: the same command with --resume" if folder else "no checkpoint was written yet"


class GateTrainer(MemoryTrainer):
    """Trains the gates of the stores instead (`ahn.train.gates`), always with the recipe's own window and sinks."""

    label = "gates"

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

    def forward_mode(self) -> AbstractContextManager[None]:
        done = min(self.state.global_step / max(self.recipe.steps - 1, 1), 1.0)
        return gates.attending(self.augmented, gates.warmth_at(done))


def _arguments(recipe: Recipe, layer_class: str) -> TrainingArguments:
    """The recipe as the Trainer's arguments. `layer_class`: name of the modules that FSDP shards one by one."""
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


@contextmanager
def compiled_layers(model: Any) -> Iterator[None]:
    """Within, the frozen layers are compiled; afterwards they are as before. In the memories everything but the
    kernels is compiled, and stays so."""
    precision = torch.get_float32_matmul_precision()
    for memory in layers_of(model):
        memory.compile_for_training()
    with ExitStack() as stack:
        for layer in model.get_decoder().layers:
            stack.enter_context(patched(layer, "forward", torch.compile(layer.forward)))
        model.enable_input_require_grads()  # so that the first layer is compiled like the others
        stack.callback(model.disable_input_require_grads)
        torch.set_float32_matmul_precision("high")  # for the float32 recurrences of the cells
        stack.callback(torch.set_float32_matmul_precision, precision)
        yield


def _is_finite(weight: Tensor) -> bool:
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return not local.is_floating_point() or bool(local.isfinite().all())


def _lost(error: BaseException) -> str | None:
    """How a GPU or the connection between processes failed, in words. None if the error is about something else."""
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{said} Expected: a smaller batch or length, checkpointing: true, or fsdp: true on several GPUs"
    known = (torch.AcceleratorError, torch.distributed.DistError)
    signs = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error", "by peer")
    if isinstance(error, known) or any(sign in said for sign in signs):
        return f"a GPU was lost, or the connection to another process: {said}"
    return None
