"""The parts of a text that each compared policy keeps: sinks, window, memory, store, passages read again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ahn.adapter import default_config
from ahn.adapter_files import Adapter, read_adapter
from ahn.config import AHNConfig
from ahn.errors import ConfigError
from ahn.recall import Recall


class Stored(NamedTuple):
    """A store that takes its places from the window: `AHNConfig.store`, `store_size`, `store_span`."""

    name: str
    size: int
    span: int = 1

    def fill(self, config: AHNConfig) -> AHNConfig:
        """`config` with this store, and as many lossless tokens as before. Raises ConfigError."""
        if self.size >= config.window:
            raise ConfigError(f"store_size={self.size} of {config.lossless} lossless tokens leaves no window")
        window = config.window - self.size
        return config.replace(window=window, store=self.name, store_size=self.size, store_span=self.span)


RECALLED = Recall()


@dataclass(frozen=True)
class Kept:
    """The parts of a text that a policy keeps. A policy ignores the fields that it has no use for.

    Args:
        window, sinks: tokens kept exactly, by the policies that do not keep everything.
        adapter: the trained memory under comparison: name of a shipped one, folder or hub id. The baselines take from
            it the layers that forget, the positions of the sinks, and the number of bytes of the cell, so that these
            are equal for all.
        yarn: factor by which `full` extends the base's positions.
        store: of the policies that have one. Its slots are part of `window`, so that all policies keep as many tokens.
        recall: of the policies that read passages again.
    """

    window: int
    sinks: int
    adapter: str | None = None
    yarn: float | None = None
    store: Stored | None = None
    recall: Recall = RECALLED


@lru_cache
def trained(adapter: str) -> Adapter:
    """The adapter, read once. Raises AdapterError."""
    return read_adapter(adapter)


@lru_cache
def digest(adapter: str) -> str:
    """Identifies the weights of an adapter, whatever its folder is called."""
    found = hashlib.sha256()
    for name, tensor in sorted(trained(adapter).tensors.items()):
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def exact_part(kept: Kept) -> AHNConfig:
    """Sinks and window without a memory, in the adapter's layers and with its sink positions."""
    if kept.adapter is None:
        return AHNConfig(None, kept.window, kept.sinks)
    config = trained(kept.adapter).config
    return AHNConfig(None, kept.window, kept.sinks, layers=config.layers, sink_positions=config.sink_positions)


def memory_part(kept: Kept) -> AHNConfig:
    """The adapter's memory behind these sinks and this window, without a store. There must be an adapter."""
    assert kept.adapter is not None
    return trained(kept.adapter).config.without_store().replace(window=kept.window, sinks=kept.sinks)


def memory_with_store(kept: Kept) -> AHNConfig:
    """`memory_part` with the store that is asked for, if one is."""
    config = memory_part(kept)
    return config if kept.store is None else kept.store.fill(config)


def exact_sizes(base: Any, adapter: str | None, lossless: int | None, sinks: int | None) -> tuple[int, int]:
    """Window and sinks: as asked for, else the adapter's, else what suits a base of this transformers config.

    Raises:
        ConfigError: no room is left for a window.
    """
    text = base.get_text_config()
    default = default_config(text, None)
    if adapter is not None and trained(adapter).config.lossless <= text.max_position_embeddings:
        default = trained(adapter).config
    lossless = lossless or default.lossless
    sinks = min(default.sinks, lossless // 8) if sinks is None else sinks
    if sinks >= lossless:
        raise ConfigError(f"{lossless} lossless tokens with {sinks} sinks: expected room for a window")
    return lossless - sinks, sinks
