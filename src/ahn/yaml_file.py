"""Reads YAML files of keys and values: recipes of training, suites of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ahn.errors import ConfigError

LONGEST = 1 << 20  # characters of a file


def read(path: str | Path, kind: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a file and their values.

    Args:
        kind: the word for such a file in messages, for example "recipe".
        changes: "key=value" each, overriding the file's value.

    Raises:
        ConfigError: the file cannot be read, or a change has no "=".
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}): expected a {kind} saved as UTF-8") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(text) > LONGEST:
        raise ConfigError(f"{path}: longer than {LONGEST:,} characters: expected a {kind}")
    values = _parsed(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values")
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"{change!r}: expected key=value")
        values[key] = _parsed(value, repr(change))
    return values


def _parsed(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: no YAML, a key that is there twice, or an alias: aliases could expand a few lines without limit.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(None, None, "aliases are not allowed", self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}{place}: {said}") from error
    except yaml.reader.ReaderError as error:
        place = f"line {text.count(chr(10), 0, error.position) + 1}"
        sign = chr(error.character)
        raise ConfigError(f"{source}, {place}: the character {sign!r}, which YAML does not allow") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply: expected a key and a value on each line") from error
    except Exception as error:  # the conversion of a value to its type can raise anything
        raise ConfigError(f"{source}: a value that cannot be read: {' '.join(str(error).split())}") from error
