"""Sinks and window. Tokens that left the window are lost."""

from __future__ import annotations

from ahn.eval.kept import exact_part
from ahn.eval.policies.base import Policy
from ahn.hf.augment import augment


class Window(Policy):
    """Sinks and window alone: the baseline of all differences.

    It keeps as many lossless tokens as the memory does. So it holds fewer bytes, without the cell's state and gates.
    """

    name = "window"

    def prepare(self) -> None:
        augment(self.model, exact_part(self.kept))
