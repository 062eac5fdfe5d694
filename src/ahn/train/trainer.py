"""The Hugging Face Trainer around the distillation: loop, resume, logging, several GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import ahn
from ahn.adapter import apply, base_shape, read_adapter, save_adapter
from ahn.augmentation import augment, layers_of, set_window
from ahn.bases import base_config, load_base, load_tokenizer
from ahn.config import AHNConfig
from ahn.train import data, distill, windows
from ahn.train.check import Difference, check
from ahn.train.recipe import Recipe

logger = logging.getLogger(__name__)


class Distiller(nn.Module):
    """The model and its loss as one module, so that data-parallel wrappers see the whole step."""

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, input_ids: Tensor, counts: Tensor) -> dict[str, Tensor]:
        return {"loss": distill.loss(self.model, input_ids, counts, self.kind)}


class MemoryTrainer(Trainer):
    """Trains the cells of a Distiller; checkpoints hold the adapter, not the base."""

    def __init__(self, recipe: Recipe, **options: Any) -> None:
        super().__init__(**options)
        self.recipe = recipe

    @property
    def augmented(self) -> Any:
        return self.accelerator.unwrap_model(self.model).model

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        recipe = self.recipe
        size = windows.draw(recipe.seed, self.state.global_step, recipe.length, recipe.lossless, recipe.sinks)
        set_window(self.augmented, *size)
        return model(**inputs)["loss"]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        cell = ahn.cells.get(self.recipe.cell)
        return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] not in cell.decay_parameters]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        set_window(self.augmented, self.recipe.window, self.recipe.kept_sinks)
        save_adapter(self.augmented, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        apply(read_adapter(resume_from_checkpoint), self.augmented)


def build(recipe: Recipe) -> MemoryTrainer:
    """Model, data and trainer of a recipe. Raises BaseModelError, ConfigError, DocumentError."""
    torch.manual_seed(recipe.seed)
    model = load_base(recipe.base)
    config = AHNConfig(recipe.cell, recipe.window, recipe.kept_sinks, sink_positions=recipe.sink_positions)
    augment(model, config)
    model.ahn_names["base"] = recipe.base
    for layer in layers_of(model):
        if layer.cell is not None:
            layer.cell.float()  # the weights that are trained; the base stays in its dtype
    rows = data.rows(list(recipe.data), load_tokenizer(recipe.base), recipe.length, recipe.limit, recipe.seed)
    logger.info("%s rows of %s tokens", len(rows), recipe.length)
    if recipe.compile and model.device.type == "cuda":
        compile_layers(model)
    if recipe.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.train()  # checkpointing is off in eval mode; there is no dropout to turn on
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
        save_steps=recipe.save_every,
        save_total_limit=2,
        seed=recipe.seed,
        data_seed=recipe.seed,
        report_to=[name for name in recipe.report_to if importlib.util.find_spec(name)],
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        dataloader_num_workers=0,
    )
    return MemoryTrainer(recipe, model=Distiller(model, recipe.loss), args=arguments, train_dataset=rows)


def compile_layers(model: Any) -> None:
    """Compile the frozen layers and what is around the memory's kernels."""
    model.enable_input_require_grads()  # so that the first layer is compiled as the others are
    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward)
    for memory in layers_of(model):
        memory.compile_pieces()


def check_machine(recipe: Recipe) -> list[Difference]:
    """Compare this machine's gradients with plain torch at the base's head size (`ahn.train.check`)."""
    base = base_shape(base_config(recipe.base))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    return check(
        recipe.cell, min(base["num_heads"], 4), base["head_dim"], device, torch.bfloat16 if cuda else torch.float32
    )


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run a recipe and return the folder of the trained adapter."""
    trainer = build(recipe)
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")
    trainer.train(resume_from_checkpoint=resume or None)
    trainer._save(str(output / "adapter"))
    (output / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    return output / "adapter"
