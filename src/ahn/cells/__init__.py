"""The recurrent cells that compress what leaves the window. One file each; `base.py` says what a cell is."""

from typing import TYPE_CHECKING

from ahn.registry import Registry

if TYPE_CHECKING:
    from ahn.cells.base import Cell

_registry: "Registry[type[Cell]]" = Registry("cell", __name__, hidden=("base", "modules"))

names = _registry.names
get = _registry.get
register = _registry.register
check_name = _registry.check_name
