"""When a question counts as answered by a text: a limit on signals of support (`ahn.recall.support`).

An adapter keeps it with its retrieval heads, as it was measured with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ahn.errors import ConfigError


@dataclass(frozen=True)
class Calibration:
    """Args:
        signals: their names. weights: one for each. threshold: an answer is supported where the weighted sum of the
            signals is at least this.

    Raises:
        ConfigError: no signals, another number of weights, or numbers that are not finite.
    """

    signals: tuple[str, ...]
    weights: tuple[float, ...]
    threshold: float

    def __post_init__(self) -> None:
        numbers = [*self.weights, self.threshold]
        if (
            not self.signals
            or len(self.signals) != len(self.weights)
            or not all(isinstance(n, str) for n in self.signals)
        ):
            raise ConfigError(f"{self}: expected names of signals, and as many weights")
        if any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers):
            raise ConfigError(f"{self}: expected finite numbers")

    def margin(self, found: Mapping[str, float]) -> float | None:
        """The weighted sum less the threshold: below 0 the text does not support an answer. None where a signal is not
        known, say because the memory has no keys."""
        if not all(name in found for name in self.signals):
            return None
        pairs = zip(self.signals, self.weights, strict=True)
        return sum(weight * found[name] for name, weight in pairs) - self.threshold

    def to_dict(self) -> dict[str, Any]:
        return {"signals": list(self.signals), "weights": list(self.weights), "threshold": self.threshold}

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """Inverse of `to_dict`. Raises ConfigError."""
        try:
            return cls(tuple(values["signals"]), tuple(values["weights"]), values["threshold"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"calibration {values!r}: expected signals, weights and a threshold") from error
