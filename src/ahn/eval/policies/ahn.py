"""Sinks, window and a trained memory."""

from __future__ import annotations

from typing import Any

from ahn.adapter import apply
from ahn.augmentation import augment
from ahn.cost import cost
from ahn.eval.policies.base import Policy, digest, trained


class Ahn(Policy):
    """Sinks, window and the memory of any adapter, ours or the authors'."""

    name = "ahn"
    needs_adapter = True

    @classmethod
    def settings(
        cls, *, window: int, sinks: int, adapter: str | None = None, yarn: float | None = None
    ) -> dict[str, Any]:
        assert adapter is not None
        found = super().settings(window=window, sinks=sinks, adapter=adapter, yarn=yarn)
        return found | {"cell": trained(adapter).config.cell, "adapter_digest": digest(adapter)}

    def prepare(self) -> None:
        assert self.adapter is not None
        adapter = trained(self.adapter)
        augment(self.model, adapter.config.replace(window=self.window, sinks=self.sinks))
        apply(adapter, self.model)
        self.model.eval()

    def flops(self, tokens: int) -> tuple[int, int]:
        config = self.model.ahn_config
        more = {"key_maps": config.key_maps, "make_room": config.make_room}
        found = cost(self.shape, tokens, self.window, self.sinks, config.cell, **more)
        return found.mixing.memory, found.flops.memory

    @property
    def parameters_added(self) -> int:
        return sum(p.numel() for name, p in self.model.named_parameters() if ".ahn." in name)
