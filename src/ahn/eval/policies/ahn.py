"""Sinks, window, a trained memory, and a store beside it if one is named."""

from __future__ import annotations

from typing import Any

from ahn.adapter import check_gates
from ahn.eval.kept import Kept, digest, memory_with_store, trained
from ahn.eval.policies.base import Policy
from ahn.hf.augment import augment
from ahn.hf.weights import apply


class Ahn(Policy):
    """Sinks, window and the memory of any adapter, ours or the authors', with a store if one is named."""

    name = "ahn"
    needs_adapter = True
    uses_store = True

    @classmethod
    def check(cls, base: Any, longest: int, kept: Kept) -> None:
        super().check(base, longest, kept)
        if kept.store is not None and kept.adapter is not None:
            check_gates(kept.store.name, trained(kept.adapter))

    @classmethod
    def settings(cls, kept: Kept) -> dict[str, Any]:
        assert kept.adapter is not None
        found = super().settings(kept)
        found |= {"cell": trained(kept.adapter).config.cell, "adapter_digest": digest(kept.adapter)}
        return found if kept.store is None else found | {"store": kept.store._asdict()}

    def prepare(self) -> None:
        assert self.kept.adapter is not None
        augment(self.model, memory_with_store(self.kept))
        apply(trained(self.kept.adapter), self.model)
        self.model.eval()

    @property
    def parameters_added(self) -> int:
        return sum(p.numel() for name, p in self.model.named_parameters() if ".ahn." in name)
