"""Sinks, window and a store. Every other token is lost."""

from __future__ import annotations

from typing import Any

from ahn import stores
from ahn.errors import ConfigError
from ahn.eval.kept import Kept, exact_part
from ahn.eval.policies.base import Policy
from ahn.hf.augment import augment


class StoreAlone(Policy):
    """Sinks, window and a store (--store, --store-size), without a cell: the part that the store contributes."""

    name = "store"
    uses_store = True

    @classmethod
    def check(cls, base: Any, longest: int, kept: Kept) -> None:
        super().check(base, longest, kept)
        untrained = ", ".join(name for name in stores.names() if not stores.get(name).trained)
        if kept.store is None:
            raise ConfigError(f"policy store: expected --store with one of {untrained}, and --store-size")
        if stores.get(kept.store.name).trained:
            raise ConfigError(
                f"policy store: store={kept.store.name!r} needs the gates of an adapter, which this policy leaves out: "
                f"expected --store with one of {untrained}, and --store-size, or policy ahn without policy store"
            )

    @classmethod
    def settings(cls, kept: Kept) -> dict[str, Any]:
        assert kept.store is not None
        return super().settings(kept) | {"store": kept.store._asdict()}

    def prepare(self) -> None:
        assert self.kept.store is not None
        augment(self.model, self.kept.store.fill(exact_part(self.kept)))
