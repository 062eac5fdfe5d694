"""Ways to treat the tokens behind the window, one a file. `base.py` defines a policy."""

from typing import TYPE_CHECKING

from ahn.registry import Registry

if TYPE_CHECKING:
    from ahn.eval.policies.base import Policy

_registry: "Registry[type[Policy]]" = Registry("policy", __name__, hidden=("base", "compressive"), joint="-")

names = _registry.names
get = _registry.get
register = _registry.register
check_name = _registry.check_name
