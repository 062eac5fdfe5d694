"""Checks that this machine computes the right gradients, against plain float32 torch, before a run starts.

Gated chunk kernels are known to be wrong with some Triton versions on Hopper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ahn import cells
from ahn.errors import AHNError
from ahn.ops import dispatch
from ahn.ops.banded import attend_window
from ahn.ops.specs import Queries, Window
from ahn.train.gates import attend_plainly

TOKENS = 321  # more than five blocks, and not a whole number of them
ATTENTION_TOLERANCE = 2e-2


class Heads(NamedTuple):
    """The attention heads to compare with: how many of which size, on which device, in which dtype."""

    number: int
    size: int
    device: torch.device
    dtype: torch.dtype

    def random(self, count: int) -> list[Tensor]:
        """`count` tensors [2, heads, TOKENS, size]."""
        return [torch.randn(2, self.number, TOKENS, self.size, device=self.device).to(self.dtype) for _ in range(count)]


class Difference(NamedTuple):
    """||fast - plain|| / ||plain|| of one output or gradient, and the largest that is allowed."""

    name: str
    value: float
    allowed: float


def check(cell: str, heads: Heads, feature_maps: int = 0, gates: bool = False) -> list[Difference]:
    """Compare outputs and every gradient with those of plain torch.

    Compared are the cell, on CUDA the attention, and with `gates` the attention that trains the gates of a store, if it
    has a kernel here.

    Args:
        cell: its name.
        feature_maps: of the cell, see AHNConfig.

    Raises:
        AHNError: one is off by more than its tolerance. Names it.
    """
    found = _cell(cell, heads, feature_maps)
    if heads.device.type == "cuda":
        found += _attention(heads)
    like = torch.empty(0, heads.size, device=heads.device, dtype=heads.dtype)
    if gates and dispatch.pick_soft_slots(like).name == "triton":
        found += _gates(heads)
    wrong = [d for d in found if not d.value <= d.allowed]
    if wrong:
        rows = "; ".join(f"{d.name} is off by {d.value:.1e}, allowed {d.allowed:.0e}" for d in wrong)
        raise AHNError(f"{cell} on {heads.device}, {heads.dtype}: {rows}")
    return found


def _cell(name: str, heads: Heads, feature_maps: int) -> list[Difference]:
    kind = cells.get(name)
    count, size, device, dtype = heads

    def run(plain: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        cell = kind(count * size, count, size, torch.float32, device)
        cell.extend(feature_maps, window_gate=False)
        torch.nn.init.normal_(cell.o_proj.weight, std=size**-0.5)
        q, k, v = (t.requires_grad_() for t in heads.random(3))
        x = torch.randn(2, TOKENS, count * size, device=device).to(dtype).requires_grad_()
        of_cell = cell.gates(cell.gate_inputs(x))
        state = torch.zeros(2, count, cell.key_size, size, device=device)
        form = cell.naive(*cell.keys(q, k), v.float(), of_cell, state) if plain else cell.scan(q, k, v, of_cell, state)
        out = cell.output(form[0], x)
        (out.float() * torch.randn(out.shape, device=device)).sum().backward()
        leaves = {"q": q, "k": k, "v": v, "x": x, **dict(cell.named_parameters())}
        return {"output": out} | {f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None}

    # both compute their outputs in half precision; only the recurrences differ
    return _compare(f"{name}, ", run(plain=False), run(plain=True), 2 * kind.tolerance[dtype])


def _attention(heads: Heads) -> list[Difference]:
    from ahn.ops import flex

    window, scale, device = Window(size=150, sinks=40), heads.size**-0.5, heads.device

    def run(plain: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        q, q_sinks, k, v = heads.random(4)
        leaves = {"q": q, "q for sinks": q_sinks, "k": k, "v": v}
        for leaf in leaves.values():
            leaf.requires_grad_()
        if plain:
            pairs = (k[:, :, : window.sinks], v[:, :, : window.sinks]), (k, v)
            start = torch.zeros(1, dtype=torch.long, device=device)
            out, lse = attend_window(Queries(q, q_sinks, scale), *pairs, start, window)
        else:
            out, lse = flex.attend_sequence(Queries(q, q_sinks, scale), k, v, window)
        total = (out.float() * torch.randn(out.shape, device=device)).sum()
        (total + (lse * torch.randn(lse.shape, device=device)).sum()).backward()
        return {"output": out, "normaliser": lse} | {
            f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None
        }

    return _compare("attention, ", run(plain=False), run(plain=True), ATTENTION_TOLERANCE)


def _gates(heads: Heads) -> list[Difference]:
    from ahn.ops.kernels import soft_retention

    window, blocks, scale, device = Window(size=50, sinks=10), 16, heads.size**-0.5, heads.device

    def run(plain: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        q, k, v = heads.random(3)
        leaves = {"q": q, "k": k, "v": v, "weights": -torch.rand(2, heads.number, blocks, TOKENS, device=device)}
        if plain:
            leaves = {name: leaf.float() for name, leaf in leaves.items()}
        q, k, v, weights = (leaf.requires_grad_() for leaf in leaves.values())
        if plain:
            out = attend_plainly(q, k, v, weights, window, scale)
        else:
            out = soft_retention.attend(q, k, v, weights, window, scale)
        (out.float() * torch.randn(out.shape, device=device)).sum().backward()
        return {"output": out} | {f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None}

    return _compare("gates, ", run(plain=False), run(plain=True), ATTENTION_TOLERANCE)


def _compare(prefix: str, fast: dict[str, Tensor], plain: dict[str, Tensor], allowed: float) -> list[Difference]:
    return [
        Difference(prefix + name, ((fast[name].float() - t.float()).norm() / t.float().norm()).item(), allowed)
        for name, t in plain.items()
    ]
