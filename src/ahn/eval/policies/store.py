"""Sinks, window and a store: what is neither in the window nor stored is gone."""

from __future__ import annotations

from typing import Any

from ahn.augmentation import augment
from ahn.errors import ConfigError
from ahn.eval.policies.base import Policy, Stored, exact_part


class StoreAlone(Policy):
    """Sinks, window and a store, without a compressed memory: what the store itself gives."""

    name = "store"

    @classmethod
    def check(
        cls,
        base: Any,
        longest: int,
        *,
        window: int,
        sinks: int,
        adapter: str | None = None,
        yarn: float | None = None,
        store: Stored | None = None,
    ) -> None:
        super().check(base, longest, window=window, sinks=sinks, adapter=adapter, yarn=yarn, store=store)
        if store is None:
            raise ConfigError("policy store: expected the name and size of a store (--store, --store-size)")
        store.fill(exact_part(window, sinks, adapter))

    @classmethod
    def settings(
        cls,
        *,
        window: int,
        sinks: int,
        adapter: str | None = None,
        yarn: float | None = None,
        store: Stored | None = None,
    ) -> dict[str, Any]:
        assert store is not None
        found = super().settings(window=window, sinks=sinks, adapter=adapter, yarn=yarn, store=store)
        return found | {"store": store._asdict()}

    def prepare(self) -> None:
        assert self.store is not None
        augment(self.model, self.store.fill(exact_part(self.window, self.sinks, self.adapter)))
