"""Stores: rules for the tokens that stay exact after the window. One file each; `base.py` has the interface."""

from typing import TYPE_CHECKING

from ahn.registry import Registry

if TYPE_CHECKING:
    from ahn.stores.base import Store

_registry: "Registry[type[Store]]" = Registry("store", __name__)

names = _registry.names
get = _registry.get
register = _registry.register
check_name = _registry.check_name
