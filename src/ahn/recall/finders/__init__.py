"""Ways to find the passages a question asks for. One file each; `base.py` has the interface."""

from typing import TYPE_CHECKING

from ahn.registry import Registry

if TYPE_CHECKING:
    from ahn.recall.finders.base import Finder

_registry: "Registry[type[Finder]]" = Registry("finder", __name__)

names = _registry.names
get = _registry.get
register = _registry.register
check_name = _registry.check_name
