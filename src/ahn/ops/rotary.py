"""Rotary positions: queries and keys rotated to other positions, with the base's own rotation.

Letters: B batch, N heads, C tokens, H head size; R rows of positions: 1 where all of the batch are at the same
position, else B.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ahn.errors import ConfigError
from ahn.ops import dispatch

FUNCTION = "apply_rotary_pos_emb"  # the name of the function that rotates queries and keys in each family of bases
CHANGING = ("dynamic", "longrope")  # rotary types whose frequencies depend on the length of the text


class Rotary:
    """Rotates queries that already carry their rotary position to another distance, with the base's own rotation.

    Rotations compose, so rotating by the angle of `delta` moves a query from position t to t + delta. The frequencies
    and the layout of the dimensions are the base's: nothing here knows a family.

    Raises:
        ConfigError: the base's rotation cannot be composed.
    """

    def __init__(self, decoder: nn.Module, attention: Any) -> None:
        self.rotate: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor] = self.plain_rotate  # or a compiled form
        self.embedding: Any = getattr(decoder, "rotary_emb", None)
        self.apply: Any = getattr(family_of(attention), FUNCTION, None)
        self.halves = self.apply is not None and rotates_halves(self.apply)
        self.simple = self.halves and self._is_simple()
        if self.embedding is None or self.apply is None or not self._composes(attention):
            raise ConfigError(
                "sink_positions='clipped' needs rotary positions that can be rotated further, this base's cannot: "
                "use sink_positions='absolute'"
            )

    @property
    def frequencies(self) -> Tensor | None:
        """[R / 2] float32: angles of one position, by which the halves of R dimensions are rotated into each other.
        None: the base's rotation is another one."""
        return self.embedding.inv_freq.float() if self.simple else None

    def angles(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of a rotation by `delta` positions [R, C], float32, of unit length even if the base scales."""
        scaling = getattr(self.embedding, "attention_scaling", 1.0)
        cos, sin = self.embedding(torch.empty(0, dtype=torch.float32, device=delta.device), delta)
        return cos / scaling, sin / scaling

    def plain_rotate(self, q: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """q [B, N, C, H] rotated by `angles`, in float32; with partial rotation only the first dimensions."""
        if self.halves and self._in_one_kernel(q):
            from ahn.ops.kernels import rotary as triton_rotary

            return triton_rotary.rotate(q, *angles)
        width = angles[0].shape[-1]
        rotating, rest = q[..., :width], q[..., width:]
        rotated = self.apply(rotating.float(), rotating[:, :0].float(), *angles)[0].to(q.dtype)
        return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated

    def rotate_by(self, q: Tensor, delta: Tensor) -> Tensor:
        """q [B, N, C, H] rotated by `delta` positions [R, C]."""
        if self.simple and self._in_one_kernel(q):
            from ahn.ops.kernels import rotary as triton_rotary

            assert self.frequencies is not None
            return triton_rotary.rotate_by(q, delta, self.frequencies)
        return self.rotate(q, self.angles(delta))

    def _in_one_kernel(self, q: Tensor) -> bool:
        gradients = torch.is_grad_enabled() and q.requires_grad
        return not torch.compiler.is_compiling() and dispatch.pick_rotation(q.device.type, gradients).name == "triton"

    def _is_simple(self) -> bool:
        """Whether angles are the positions times `inv_freq`, at all lengths."""
        found = getattr(self.embedding, "inv_freq", None)
        changes = getattr(self.embedding, "rope_type", "default") in CHANGING
        if not isinstance(found, Tensor) or found.dim() != 1 or changes or found.device.type == "meta":
            return False
        delta = torch.tensor([[0, 1, -37, 5000]], device=found.device)
        try:
            cos, sin = self.angles(delta)
        except (TypeError, ValueError, RuntimeError):
            return False
        by = torch.cat([delta[..., None] * found.float()] * 2, -1)
        return by.shape == cos.shape and torch.allclose(
            torch.stack([cos, sin]), torch.stack([by.cos(), by.sin()]), atol=1e-3
        )

    def _composes(self, attention: Any) -> bool:
        device = attention.o_proj.weight.device
        if device.type == "meta":
            return True
        q = torch.randn(1, 1, 1, attention.head_dim, device=device, generator=torch.Generator(device).manual_seed(0))
        try:
            with dispatch.on(device):
                there = self.rotate(q, self.angles(torch.tensor([[23]], device=device)))
                back = self.rotate(there, self.angles(torch.tensor([[-23]], device=device)))
        except (TypeError, ValueError, RuntimeError):
            return False
        return torch.allclose(back, q, atol=1e-4)


def family_of(attention: Any) -> Any:
    """The module of transformers that defines an attention module, and the function with which it rotates."""
    return sys.modules[type(attention).__module__]


def rotates_halves(rotate: Callable[..., Any]) -> bool:
    """Whether a base's function rotates the halves of a head into each other; tried out."""
    q, k, cos, sin = torch.randn(4, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    try:
        found = rotate(q, k, cos[0], sin[0])
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = [t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k)]
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
