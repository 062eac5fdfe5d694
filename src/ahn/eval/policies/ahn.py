"""Sinks, window and a trained memory, and what is stored beside it."""

from __future__ import annotations

from typing import Any

from ahn.adapter import check_gates
from ahn.eval.policies.base import Kept, Policy, digest, memory_part, trained
from ahn.hf.augment import augment
from ahn.hf.weights import apply


class Ahn(Policy):
    """Sinks, window and the memory of any adapter, ours or the authors', with a store if one is named."""

    name = "ahn"
    needs_adapter = True
    uses_store = True

    @classmethod
    def _check(cls, base: Any, longest: int, kept: Kept) -> None:
        super()._check(base, longest, kept)
        if kept.store is not None and kept.adapter is not None:
            check_gates(kept.store.name, trained(kept.adapter))

    @classmethod
    def _settings(cls, kept: Kept) -> dict[str, Any]:
        assert kept.adapter is not None
        found = super()._settings(kept)
        found |= {"cell": trained(kept.adapter).config.cell, "adapter_digest": digest(kept.adapter)}
        return found if kept.store is None else found | {"store": kept.store._asdict()}

    def prepare(self) -> None:
        assert self.adapter is not None
        config = memory_part(self.window, self.sinks, self.adapter)
        augment(self.model, config if self.store is None else self.store.fill(config))
        apply(trained(self.adapter), self.model)
        self.model.eval()

    @property
    def parameters_added(self) -> int:
        return sum(p.numel() for name, p in self.model.named_parameters() if ".ahn." in name)
