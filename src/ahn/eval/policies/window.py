"""Sinks and window: what has left the window is gone."""

from __future__ import annotations

from ahn.eval.kept import exact_part
from ahn.eval.policies.base import Policy
from ahn.hf.augment import augment


class Window(Policy):
    """Sinks and window alone: the baseline of all differences.

    It keeps the lossless tokens that the memory keeps, and so holds fewer bytes, by the cell's state and gates.
    """

    name = "window"

    def prepare(self) -> None:
        augment(self.model, exact_part(self.kept))
