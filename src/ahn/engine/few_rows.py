"""Linear layers of few vectors on a CPU, while the batch engine runs.

MKL multiplies 2 to 8 float32 vectors by a weight in twice the time of one vector and more; the weight by the vectors,
as columns, takes about the time of one. bfloat16 has other kernels, for which that is slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ahn.engine.patch import patched
from ahn.engine.probe import is_plain

FEW = range(2, 9)  # vectors


@contextmanager
def weights_first(model: Any) -> Iterator[None]:
    """Within, the plain float32 layers of a model on a CPU multiply the weight by the vectors where these are few."""
    with ExitStack() as undo:
        for module in model.modules():
            if is_plain(module) and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
                undo.enter_context(patched(module, "forward", partial(_forward, module)))
        yield


def _forward(layer: Any, x: Tensor) -> Tensor:
    if x.numel() // x.shape[-1] not in FEW or x.dtype != torch.float32:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    out = (layer.weight @ x.flatten(0, -2).t()).t().contiguous()
    if layer.bias is not None:
        out += layer.bias
    return out.unflatten(0, x.shape[:-1])
