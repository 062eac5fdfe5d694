"""The recurrent cells that compress what leaves the window. One file each; `base.py` says what a cell is."""

from typing import TYPE_CHECKING, Any

from ahn.registry import Registry

if TYPE_CHECKING:
    from ahn.cells.base import Cell as Cell
    from ahn.cells.base import unit as unit

_registry: "Registry[type[Cell]]" = Registry("cell", __name__)

names = _registry.names
get = _registry.get
register = _registry.register
check_name = _registry.check_name


def __getattr__(attribute: str) -> Any:
    if attribute in ("Cell", "unit"):
        from ahn.cells import base

        return getattr(base, attribute)
    raise AttributeError(f"module 'ahn.cells' has no attribute {attribute!r}")
