"""Tells whether a model still has the weights that a cache was made with, without reading them all.

Torch counts the changes of each tensor, so comparing the counters finds changes in place. It misses changes made
through `.data`. To find those, a few numbers of each tensor are compared when a memory is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NUMBERS = 8  # numbers of each parameter, spread over it
Sample = list[tuple[list[int], Tensor]]  # for each dtype and device: indices of parameters, and their numbers in a row


class State(NamedTuple):
    """The weights and settings of a model, as far as they can be told in a millisecond."""

    counts: list[tuple[int, int]]  # identity of each parameter, and how often it was changed
    switches: list[Any]  # scales of attention, and how peft's adapters are set
    places: list[int]  # addresses of the parameters, which differ between devices


def state(model: nn.Module) -> State:
    """The state of a model. It differs after a parameter was replaced, changed in place or moved, a scale of attention
    was changed, or adapters of peft were switched."""
    counts: list[tuple[int, int]] = []
    switches: list[Any] = []
    places: list[int] = []
    for module in _modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                counts.append((id(parameter), 0 if parameter.is_inference() else parameter._version))
                if type(parameter) is nn.Parameter:  # subclasses may have no address
                    places.append(parameter.data_ptr())
        if isinstance(scaling := vars(module).get("scaling"), int | float):
            switches.append(scaling)
        if (adapters := _adapters(module)) is not None:
            switches.append(adapters)
    return State(counts, switches, places)


def adapters(model: nn.Module) -> dict[str, Any]:
    """The setting of peft's adapters by layer. Empty without adapters."""
    return {name: found for name, module in model.named_modules() if (found := _adapters(module)) is not None}


def _adapters(module: nn.Module) -> list[Any] | None:
    """The active adapters of a peft layer with their scales, and the merged ones. None for any other module.

    For disabled adapters it is always ["disabled"].
    """
    children = module._modules
    if "base_layer" not in children and "original_module" not in children:
        return None
    if getattr(module, "disable_adapters", False):
        return ["disabled"]
    active = getattr(module, "active_adapters", [])
    active, scales = [active] if isinstance(active, str) else list(active), getattr(module, "scaling", {})
    return [[[name, scales.get(name)] for name in active], list(getattr(module, "merged_adapters", []))]


@torch.compiler.disable
@torch.no_grad()
def sample(model: nn.Module) -> Sample:
    """Eight numbers of each parameter that has at least eight, spread over it. Does not wait for the device."""
    groups: dict[Any, tuple[list[int], list[Tensor]]] = {}
    parameters = [p for module in _modules(model) for p in module._parameters.values() if p is not None]
    for index, p in enumerate(parameters):
        if type(p) is nn.Parameter and p.numel() >= NUMBERS and not p.is_meta and p.is_contiguous():
            which, numbers = groups.setdefault((p.dtype, p.device), ([], []))
            which.append(index)
            numbers.append(p.as_strided((NUMBERS,), (p.numel() // NUMBERS,), p.storage_offset()))
    return [(which, torch.cat(numbers)) for which, numbers in groups.values()]


def same(one: Sample, other: Sample) -> bool:
    """Whether two samples of a model are equal, even if they are from different devices."""
    return _bytes(one) == _bytes(other)


def _bytes(found: Sample) -> dict[int, bytes]:
    rows: dict[int, bytes] = {}
    for which, numbers in found:
        parts = numbers.cpu().view(torch.uint8).view(len(which), -1).numpy()
        rows |= {index: part.tobytes() for index, part in zip(which, parts, strict=True)}
    return rows


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of the model. A shared module comes once for each place, which is much faster than `modules()`."""
    waiting: list[nn.Module | None] = [model]
    while waiting:
        if (module := waiting.pop()) is not None:
            waiting.extend(module._modules.values())
            yield module
