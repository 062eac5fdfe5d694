"""The settings of a memory: the cell, the window, the sinks, the store, and the layers that have one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ahn.errors import ConfigError

VERSION = 1
SINK_POSITIONS = ("clipped", "absolute")
MEMORY_POSITIONS = ("rope", "none")
FEATURE_MAPS = (0, 1, 2, 4)
RENAMED = {"key_maps": "feature_maps", "make_room": "window_gate"}  # keys of older files, and their names now


@dataclass(frozen=True)
class AHNConfig:
    """Settings of the memory on one model.

    Args:
        cell: name of the recurrent cell (`ahn.cells.names()`), or None for sinks and window without a memory.
        window: last tokens kept exactly, including the current one. At least 1. Paper: 32,640.
        sinks: first tokens of each sequence kept exactly, 0 or more. Paper: 128.
        layers: indices of the layers that get window and memory. The others keep full attention, and their cache grows
            with the text. None: all layers.
        sink_positions: the distance at which a query sees the sinks. "absolute": their true distance (the authors').
            "clipped": at most `sinks + window`, so that no distance leaves the range that the base was trained on
            (docs/decisions.md).
        memory_positions: the queries and keys that the cell gets. "rope": those of the attention, rotated by their
            positions (paper). "none": without that rotation, so a key looks the same from any position.
        feature_maps: how the cell maps queries and keys. 0: not at all (paper). 1: by a learned linear map per head.
            2 or 4: to learned nonlinear features, 2 or 4 times the head size; the state grows as much.
        window_gate: whether to learn a gate on the window's attention, beside the memory. Paper: no gate.
        store: name of the store (`ahn.stores.names()`), the rule that decides which tokens stay exact when they leave
            the window. None: no store (paper). See docs/store.md.
        store_size: tokens in the store, per key/value head. 0 if and only if there is no store.
        store_span: length of the spans that stay or go together, by the best score in the span, because a fact is
            several tokens long. 1 to `window`, and at most `store_size`.

    Raises:
        ConfigError: names the value and what is allowed.
    """

    cell: str | None = "gated_deltanet"
    window: int = 32640
    sinks: int = 128
    layers: tuple[int, ...] | None = None
    sink_positions: str = "clipped"
    memory_positions: str = "rope"
    feature_maps: int = 0
    window_gate: bool = False
    store: str | None = None
    store_size: int = 0
    store_span: int = 1

    def __post_init__(self) -> None:
        _check_integer("window", self.window, least=1)
        _check_integer("sinks", self.sinks, least=0)
        if self.layers is not None:
            try:
                layers = tuple(self.layers)
            except TypeError as error:
                raise ConfigError(f"layers={self.layers!r}: expected layer indices, or None for all") from error
            for layer in layers:
                _check_integer("layers", layer, least=0)
            if len(set(layers)) != len(layers) or not layers:
                raise ConfigError(f"layers={list(layers)}: expected distinct layer indices, at least one")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        if self.sink_positions not in SINK_POSITIONS:
            raise ConfigError(f"sink_positions={self.sink_positions!r}: expected one of {', '.join(SINK_POSITIONS)}")
        if self.memory_positions not in MEMORY_POSITIONS:
            raise ConfigError(
                f"memory_positions={self.memory_positions!r}: expected one of {', '.join(MEMORY_POSITIONS)}"
            )
        _check_integer("feature_maps", self.feature_maps, least=0)
        if self.feature_maps not in FEATURE_MAPS:
            raise ConfigError(f"feature_maps={self.feature_maps}: expected one of {', '.join(map(str, FEATURE_MAPS))}")
        if not isinstance(self.window_gate, bool):
            raise ConfigError(f"window_gate={self.window_gate!r}: expected true or false")
        if self.cell is not None:
            from ahn import cells

            cells.check_name(self.cell)
        self._check_store()

    def _check_store(self) -> None:
        _check_integer("store_size", self.store_size, least=0)
        _check_integer("store_span", self.store_span, least=1)
        if self.store is None:
            if self.store_size:
                raise ConfigError(
                    "{store_size} without a store: expected the name of a store, or 0", store_size=self.store_size
                )
            if self.store_span != 1:
                raise ConfigError(
                    "{store_span} without a store: expected the name of a store, or 1", store_span=self.store_span
                )
            return
        from ahn import stores

        stores.check_name(self.store)
        if not self.store_size:
            raise ConfigError(
                "{store} with {store_size}: expected at least 1, or no store", store=self.store, store_size=0
            )
        if self.store_span > self.window:
            raise ConfigError(
                f"{{store_span}}: expected at most the window of {self.window}", store_span=self.store_span
            )
        if self.store_span > self.store_size:
            raise ConfigError(
                "{store_span}: expected at most {store_size}", store_span=self.store_span, store_size=self.store_size
            )

    @property
    def lossless(self) -> int:
        """Tokens kept exactly: sinks + store + window."""
        return self.sinks + self.store_size + self.window

    def replace(self, **changes: Any) -> AHNConfig:
        return dataclasses.replace(self, **changes)

    def with_lossless(self, lossless: int, sinks: int | None = None, store_size: int | None = None) -> AHNConfig:
        """The same settings with this number of tokens kept exactly in all.

        Args:
            lossless: sinks + store + window.
            sinks: default: those of now, but at most an eighth of `lossless`.
            store_size: default: the store keeps its share of store + window.

        Raises:
            ConfigError: no token is left for the window.
        """
        sinks = min(self.sinks, lossless // 8) if sinks is None else sinks
        rest = lossless - sinks
        if store_size is None:
            store_size = round(rest * self.store_size / (self.store_size + self.window))
        if store_size >= rest:
            raise ConfigError(
                f"{lossless} lossless tokens with {sinks} sinks and {store_size} store: expected room for a window"
            )
        return self.replace(window=rest - store_size, sinks=sinks, store_size=store_size)

    def without_store(self) -> AHNConfig:
        """The same settings without a store; sinks and window stay."""
        return self.replace(store=None, store_size=0, store_span=1)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return {"version": VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AHNConfig:
        """Inverse of `to_dict`. Reads the `RENAMED` keys of older files too.

        Raises:
            ConfigError: another version, unknown keys, or an old key beside its new name; it names them.
        """
        values = renamed(values, "the memory config")
        version = values.pop("version", None)
        if version != VERSION:
            raise ConfigError(f"memory config version {version!r}: this ahn reads version {VERSION}")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"memory config has unknown keys: {', '.join(unknown)}")
        return cls(**values)


def renamed(values: dict[str, Any], owner: str) -> dict[str, Any]:
    """`values` with the names that keys have now.

    Raises:
        ConfigError: `owner`, as the message calls it, has an old key and its new name too.
    """
    for old in RENAMED.keys() & values:
        if (new := RENAMED[old]) in values:
            raise ConfigError(f"{owner} has {old!r} and {new!r}, its name now: expected {new!r} alone")
    return {RENAMED.get(key, key): value for key, value in values.items()}


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{{{name}}}: expected an integer of at least {least}", **{name: value})
