"""The attributes `ahn_config`, `ahn_names` and `ahn_retrieval` of a model: views of its handle, which holds the truth.

An attribute of one object that is computed must be of its class. So a model with memories has a class of its own,
derived from that of the base and of the same name, until `ahn.detach`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ahn.errors import ConfigError
from ahn.memory.handle import Handle

if TYPE_CHECKING:
    from ahn.config import AHNConfig
    from ahn.memory.head_keys import RetrievalHeads


class Attributes:
    """Mixed into the class of a model with memories. Setting a view that cannot be set raises ConfigError."""

    @property
    def ahn_config(self) -> AHNConfig:
        """The settings of the memories."""
        return _handle(self, "ahn_config").config

    @ahn_config.setter
    def ahn_config(self, config: Any) -> None:
        raise ConfigError(
            "model.ahn_config cannot be set: expected ahn.hf.augment.set_window(model, window, sinks) for other sizes, "
            "or ahn.detach(model) and ahn.augment(model, config) for other settings"
        )

    @property
    def ahn_names(self) -> dict[str, str | None]:
        """Of "base" and "adapter", for people and memory files; they can be set by key."""
        return _handle(self, "ahn_names").names

    @ahn_names.setter
    def ahn_names(self, names: Any) -> None:
        raise ConfigError('model.ahn_names cannot be set: expected model.ahn_names["base"] = ... or ["adapter"]')

    @property
    def ahn_retrieval(self) -> RetrievalHeads | None:
        """The heads of the base that find passages (`ahn.recall`), or None. They can be set."""
        return _handle(self, "ahn_retrieval").retrieval

    @ahn_retrieval.setter
    def ahn_retrieval(self, heads: RetrievalHeads | None) -> None:
        _handle(self, "ahn_retrieval").retrieval = heads


def add(model: Any) -> None:
    if not isinstance(model, Attributes):
        model.__class__ = _derived(model.__class__)


def remove(model: Any) -> None:
    """Undo `add`. Where something else has derived a class from ours since (FSDP), that one stays; without a handle it
    has none of these attributes."""
    bases = type(model).__bases__
    if bases[0] is Attributes:
        model.__class__ = bases[1]


def _handle(model: Any, name: str) -> Handle:
    handle: Handle | None = vars(model).get("_ahn")
    if handle is None:
        raise AttributeError(f"{type(model).__name__!r} object has no attribute {name!r}")
    return handle


@cache
def _derived(base: type) -> type:
    return type(base.__name__, (Attributes, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})
