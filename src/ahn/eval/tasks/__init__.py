"""The suites of tasks, one a file. `base.py` defines a task. A task is named "suite/set".

Other packages add a suite under the entry-point group "ahn.eval.tasks": my_suite = "my_package:MySuite".
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ahn.errors import EvalError
from ahn.registry import Registry, nearest

if TYPE_CHECKING:
    from ahn.eval.tasks.base import Task

_registry: "Registry[type[Task]]" = Registry("suite", __name__, attribute="suite")

register = _registry.register


def names() -> list[str]:
    """All tasks."""
    return [name for suite in _registry.names() for name in groups()[suite]]


def groups() -> dict[str, list[str]]:
    """Names for several tasks at once: each suite, and its groups as "suite/group"."""
    found: dict[str, list[str]] = {}
    for suite in _registry.names():
        cls = _registry.get(suite)
        found[suite] = [f"{suite}/{name}" for name in cls.sets]
        found |= {f"{suite}/{group}": [f"{suite}/{name}" for name in sets] for group, sets in cls.groups.items()}
    return found


def get(name: str) -> "Task":
    """The task of that name. Raises EvalError with the nearest one if there is none."""
    suite, _, set_name = name.partition("/")
    if suite not in _registry.names() or not set_name:
        suites = ", ".join(_registry.names())
        hint = nearest(name, [*groups(), *names()])
        raise EvalError(f"unknown task {name!r}: expected a suite ({suites}) or SUITE/SET, see `ahn eval --list`{hint}")
    return _registry.get(suite)(set_name)


def expand(wanted: Iterable[str]) -> "list[Task]":
    """The tasks of these names and groups, each once, in this order."""
    known = groups()
    return [get(name) for name in dict.fromkeys(n for name in wanted for n in known.get(name, [name]))]
