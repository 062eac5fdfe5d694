"""Are the gradients right on this machine? Compared with plain float32 torch before a run starts, because gated chunk
kernels are known to be wrong with some Triton versions on Hopper."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ahn import cells
from ahn.errors import AHNError
from ahn.ops import dispatch
from ahn.ops.banded import attend_window
from ahn.train.gates import attend_plainly

TOKENS = 321  # more than five blocks, and not a whole number of them
ATTENTION_TOLERANCE = 2e-2


class Difference(NamedTuple):
    """||fast - plain|| / ||plain|| of one output or gradient, and the largest allowed."""

    name: str
    value: float
    allowed: float


def check(
    cell: str, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, feature_maps: int = 0,
    gates: bool = False,
) -> list[Difference]:  # fmt: skip
    """Compare outputs and every gradient of the cell, of the attention, and with `gates` of the one that the gates of a
    store are trained by, with their plain forms.

    Raises:
        AHNError: one is off by more than its tolerance; names it.
    """
    found = _cell(cell, heads, head_dim, device, dtype, feature_maps)
    if device.type == "cuda":
        found += _attention(heads, head_dim, device, dtype)
    if gates and dispatch.pick_soft_slots(torch.empty(0, head_dim, device=device, dtype=dtype)).name == "triton":
        found += _gates(heads, head_dim, device, dtype)
    wrong = [d for d in found if not d.value <= d.allowed]
    if wrong:
        rows = "; ".join(f"{d.name} is off by {d.value:.1e}, allowed {d.allowed:.0e}" for d in wrong)
        raise AHNError(f"{cell} on {device}, {dtype}: {rows}")
    return found


def _cell(
    name: str, heads: int, size: int, device: torch.device, dtype: torch.dtype, feature_maps: int
) -> list[Difference]:
    kind = cells.get(name)

    def run(plain: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        cell = kind(heads * size, heads, size, torch.float32, device)
        cell.extend(feature_maps, window_gate=False)
        torch.nn.init.normal_(cell.o_proj.weight, std=size**-0.5)
        q, k, v = (torch.randn(2, heads, TOKENS, size, device=device).to(dtype).requires_grad_() for _ in range(3))
        x = torch.randn(2, TOKENS, heads * size, device=device).to(dtype).requires_grad_()
        of_cell = cell.gates(cell.gate_inputs(x))
        state = torch.zeros(2, heads, cell.key_size, size, device=device)
        form = cell.naive(*cell.keys(q, k), v.float(), of_cell, state) if plain else cell.scan(q, k, v, of_cell, state)
        out = cell.output(form[0], x)
        (out.float() * torch.randn(out.shape, device=device)).sum().backward()
        leaves = {"q": q, "k": k, "v": v, "x": x, **dict(cell.named_parameters())}
        return {"output": out} | {f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None}

    # the outputs' own arithmetic in half precision is in both; what may differ is the recurrence
    return _compare(f"{name}, ", run(plain=False), run(plain=True), 2 * kind.tolerance[dtype])


def _attention(heads: int, size: int, device: torch.device, dtype: torch.dtype) -> list[Difference]:
    from ahn.ops import flex

    sinks, window = 40, 150

    def run(plain: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        q, q_sinks, k, v = (torch.randn(2, heads, TOKENS, size, device=device).to(dtype) for _ in range(4))
        leaves = {"q": q, "q for sinks": q_sinks, "k": k, "v": v}
        for leaf in leaves.values():
            leaf.requires_grad_()
        if plain:
            pairs = (k[:, :, :sinks], v[:, :, :sinks]), (k, v)
            start = torch.zeros(1, dtype=torch.long, device=device)
            out, norm = attend_window(q, q_sinks, *pairs, start, window, size**-0.5)
        else:
            out, norm = flex.attend_sequence(q, q_sinks, k, v, sinks, window, size**-0.5)
        total = (out.float() * torch.randn(out.shape, device=device)).sum()
        (total + (norm * torch.randn(norm.shape, device=device)).sum()).backward()
        return {"output": out, "normaliser": norm} | {
            f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None
        }

    return _compare("attention, ", run(plain=False), run(plain=True), ATTENTION_TOLERANCE)


def _gates(heads: int, size: int, device: torch.device, dtype: torch.dtype) -> list[Difference]:
    from ahn.ops.kernels import soft_retention

    sinks, window, blocks = 10, 50, 16

    def run(plain: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, heads, TOKENS, size, device=device).to(dtype) for _ in range(3))
        leaves = {"q": q, "k": k, "v": v, "weights": -torch.rand(2, heads, blocks, TOKENS, device=device)}
        if plain:
            leaves = {name: leaf.float() for name, leaf in leaves.items()}
        q, k, v, kept = (leaf.requires_grad_() for leaf in leaves.values())
        out = (attend_plainly if plain else soft_retention.attend)(q, k, v, kept, sinks, window, size**-0.5)
        (out.float() * torch.randn(out.shape, device=device)).sum().backward()
        return {"output": out} | {f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None}

    return _compare("gates, ", run(plain=False), run(plain=True), ATTENTION_TOLERANCE)


def _compare(prefix: str, fast: dict[str, Tensor], plain: dict[str, Tensor], allowed: float) -> list[Difference]:
    return [
        Difference(prefix + name, ((fast[name].float() - t.float()).norm() / t.float().norm()).item(), allowed)
        for name, t in plain.items()
    ]
