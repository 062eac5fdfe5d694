"""Finds variants (cells, stores, tasks and others, one file each) in a folder of this package and in entry points."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from ahn.errors import ConfigError, some

T = TypeVar("T", bound=type)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: all that are known, and the nearest of them."""
    names = sorted(known)
    return f"expected one of {', '.join(names)}{nearest(name, names)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the first of the `known` names that can be meant, or "".

    These are the names that differ in case alone or have `name` as one of their parts between slashes; else those that
    contain it; else the most similar one, if one is similar enough.
    """
    wanted, names = str(name).lower(), {one.lower(): one for one in known if one != name}
    found = (
        [one for one in names if one == wanted]
        or [one for one in names if wanted in one.split("/")]
        or [one for one in names if wanted in one and len(wanted) > 2]
        or difflib.get_close_matches(wanted, names, n=1)
    )
    return f"; did you mean {some([repr(names[one]) for one in found])}?" if found else ""


class Registry(Generic[T]):
    """Names to classes.

    A class is found under its file's name in `package`, in the entry-point group of the same name
    (`my_cell = "my_package:MyCell"`), or after `register`. Nothing is imported before it is asked for.

    Args:
        kind: the word for a variant in messages.
        package: the folder, as a dotted name.
        hidden: files that define no variant.
        attribute: the attribute of a class that holds its name.
        joint: replaces the underscores of a file's name.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        hidden: tuple[str, ...] = ("base",),
        attribute: str = "name",
        joint: str = "_",
    ) -> None:
        self.kind, self.package, self.hidden, self.attribute, self.joint = kind, package, hidden, attribute, joint
        self._loaders: dict[str, Callable[[], Any]] = {}

    def register(self, name: str, cls: T) -> T:
        self._loaders[name] = lambda: cls
        return cls

    def names(self) -> list[str]:
        return sorted(self._found())

    def check_name(self, name: str) -> None:
        """Raises ConfigError with the nearest name if `name` is not known."""
        found = self._found()
        if not isinstance(name, str) or name not in found:
            raise ConfigError(f"unknown {self.kind} {name!r}: {did_you_mean(name, found)}")

    def get(self, name: str) -> T:
        self.check_name(name)
        return self._found()[name]()

    def _found(self) -> dict[str, Callable[[], Any]]:
        # found by path, not imported: a folder's own imports may need torch
        top, *rest = self.package.split(".")
        folders = [str(Path(folder, *rest)) for folder in importlib.import_module(top).__path__]
        files = [m.name for m in pkgutil.iter_modules(folders)]
        found: dict[str, Callable[[], Any]] = {
            (name := file.replace("_", self.joint)): partial(_class_in_file, self.package, file, self.attribute, name)
            for file in files
            if file not in self.hidden
        }
        for point in points(self.package):
            found[point.name] = point.load
        return found | self._loaders


def points(group: str) -> tuple[Any, ...]:
    """Entry points of other packages."""
    return _points(entry_points, group)


@cache
def _points(look_up: Callable[..., Any], group: str) -> tuple[Any, ...]:
    """Entry points, looked up once: the search reads all installed packages, and every layer asks for its cell."""
    return tuple(look_up(group=group))


def _class_in_file(package: str, file: str, attribute: str, name: str) -> type:
    """The class that `file` defines: the one whose attribute is `name`."""
    module = importlib.import_module(f"{package}.{file}")
    for value in vars(module).values():
        own = isinstance(value, type) and value.__module__ == module.__name__
        if own and getattr(value, attribute, None) == name:
            return value
    raise ConfigError(f"{package}.{file} defines no class with {attribute} = {name!r}")
