"""The weights of a model's memory: copied from an adapter, gathered into one, and saved beside the base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.adapter_files import Adapter, base_shape, check_shape, write_adapter
from ahn.config import AHNConfig
from ahn.errors import AdapterError, some
from ahn.hf.architecture import set_unlimited
from ahn.memory.handle import handle_of, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CELLS = ".ahn."  # in the names of a model's weights that are the memory's
STORE = "store."  # in front of the names of a store's weights
FORM = ("cell", "layers", "memory_positions", "feature_maps", "window_gate")  # what weights are made for
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights


def save_with_base(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """`save_pretrained` of an augmented model: the base as transformers saves it, and the memory as an adapter beside
    it. `ahn.from_pretrained` loads both, plain transformers the base alone. Arguments as of transformers.

    Raises:
        AdapterError: the memory holds NaN, or the folder cannot be written; no base is then without its memory.
    """
    folder = Path(save_directory)
    hub = {key: options.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in options}
    weights = model.state_dict() if state_dict is None else state_dict
    base = {name: tensor for name, tensor in weights.items() if CELLS not in name}
    memory = _gathered(model)
    if is_main_process:
        write_adapter(memory, folder)
    set_unlimited(model, False)  # plain transformers loads a base that is limited
    try:
        type(model).save_pretrained(model, folder, is_main_process, base, **options)
    finally:
        set_unlimited(model, True)
    if push_to_hub:  # which saves once more, into a folder of its own
        model.push_to_hub(hub.pop("repo_id", folder.name), **hub)


def adapter_of(model: PreTrainedModel) -> Adapter:
    """The trained weights and settings of an augmented model's memory, on the CPU. Weights that are sharded over
    processes are gathered: all of them must call this. Raises AdapterError if the model has neither cells nor
    retrieval heads."""
    config = getattr(model, "ahn_config", None)
    if config is None or not (_parameters(model) or model.ahn_retrieval):
        raise AdapterError("the model has no cells, only sinks and window: there is nothing to save")
    return _gathered(model)


def _gathered(model: PreTrainedModel) -> Adapter:
    config, parameters = model.ahn_config, _parameters(model)
    whole: dict[str, Any] = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()
    }
    tensors = {name: p.detach().cpu().contiguous() for name, p in whole.items()}
    return Adapter(config, base_shape(model.config), tensors, model.ahn_names["base"], retrieval=model.ahn_retrieval)


def apply(adapter: Adapter, model: PreTrainedModel, new_store: bool = False) -> None:
    """Copy an adapter's weights into an augmented model, after all checks. Raises AdapterError.

    `new_store`: the model's store may have weights that the adapter has not, because they are to be trained.
    """
    config: AHNConfig = model.ahn_config
    source = adapter.source
    check_shape(adapter, base_shape(model.config))
    for name in FORM:
        ours, theirs = getattr(config, name), getattr(adapter.config, name)
        if ours != theirs:
            raise AdapterError(f"{source}: adapter for {name}={theirs!r}, the model has {name}={ours!r}")
    parameters, tensors = _parameters(model), adapter.tensors
    if config.store != adapter.config.store:  # cells serve any store, the weights of a store only their own
        tensors = {name: tensor for name, tensor in tensors.items() if f".{STORE}" not in name}
    missing, extra = sorted(parameters.keys() - tensors), sorted(tensors.keys() - parameters)
    if new_store:
        missing = [name for name in missing if f".{STORE}" not in name]
    if missing and all(f".{STORE}" in name for name in missing):
        raise AdapterError(
            f"{source}: has no weights for {{store}}, which is a trained one (the adapter is for "
            f"{adapter.config.store!r})",
            store=config.store,
        )
    if missing:
        raise AdapterError(f"{source}: {len(missing)} tensors missing: {some(missing)}")
    if extra:
        raise AdapterError(f"{source}: {len(extra)} tensors too many: {some(extra)}")
    parameters = {name: parameter for name, parameter in parameters.items() if name in tensors}
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise AdapterError(
                f"{source}: {name} has shape {list(tensor.shape)}, the base needs {list(parameter.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"{source}: {name} is of {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        if not tensor.to(parameter.dtype).isfinite().all():
            raise AdapterError(
                f"{source}: {name} holds NaN or infinite numbers, or too large ones for {parameter.dtype}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    handle = handle_of(model)
    handle.retrieval, handle.names["adapter"] = adapter.retrieval, source
    handle.adapter = object()  # memories that were read with other weights are refused from now on


def _parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    found: dict[str, torch.nn.Parameter] = {}
    for i, layer in enumerate(layers_of(model)):
        if layer.cell is not None:
            found |= {f"layers.{i}.{name}": parameter for name, parameter in layer.cell.named_parameters()}
        if layer.store is not None:
            found |= {f"layers.{i}.{STORE}{name}": parameter for name, parameter in layer.store.named_parameters()}
    return found
