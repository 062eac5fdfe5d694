"""Finds and reads the files of a benchmark, or its records on the hub."""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ahn.dialogue import from_json
from ahn.errors import EvalError, some
from ahn.hub import check_dataset

SUFFIXES = (".jsonl", ".jsonl.xz", ".json", ".json.xz")
COPY = "or give a copy with --data FOLDER"


class Record:
    """One record of a benchmark. An error about a field names the field, the file and the line."""

    def __init__(self, where: str, fields: Any) -> None:
        if not isinstance(fields, dict):
            raise EvalError(f"{where}: {type(fields).__name__}: expected a record with fields")
        self.where, self.fields = where, fields

    def __getitem__(self, name: str) -> Any:
        if self.fields.get(name) is None:
            shown = [field if field.isprintable() else repr(field) for field in self.fields]
            raise EvalError(f"{self.where}: no field {name!r}; there are {', '.join(shown) or 'none'}")
        return self.fields[name]

    def text(self, name: str) -> str:
        value = self[name]
        if not isinstance(value, str):
            raise EvalError(f"{self.where}: field {name!r} is {type(value).__name__}: expected text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A text, or several, of which there must be one."""
        value = self[name]
        values = [value] if isinstance(value, str) else value
        if not (isinstance(values, list) and values and all(isinstance(v, str) for v in values)):
            raise EvalError(f"{self.where}: field {name!r}: expected one or more texts")
        return tuple(values)

    def texts_or_none(self, name: str) -> tuple[str, ...] | None:
        """`texts` of a field that may be missing."""
        return None if self.fields.get(name) is None else self.texts(name)

    def records(self, name: str) -> list[Record]:
        """The records in a field."""
        value = self[name]
        if not isinstance(value, list):
            raise EvalError(f"{self.where}: field {name!r} is {type(value).__name__}: expected a list of records")
        return [Record(f"{self.where}, {name} {number}", fields) for number, fields in enumerate(value, 1)]


def found(data: Path, names: Sequence[str], task: str) -> Path:
    """The file `data`, or the one in the folder `data` that has one of the names."""
    if not data.exists():
        raise EvalError(f"{data}: no such file or folder; expected the data of {task}")
    if data.is_file():
        return data
    candidates = [data / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    expected = ", ".join(f"{name}.jsonl" for name in names)
    there = sorted(path.name for path in data.iterdir() if path.is_file())
    raise EvalError(
        f"{data}: no data of {task} in this folder; expected {expected}, or one of these with .xz; there is "
        f"{some(there, 12) or 'no file'}"
    )


def open_text(path: Path) -> str:
    """The text of a file, which may be xz-compressed."""
    try:
        data = path.read_bytes()
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8-sig")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot be read: {error}") from error


def read(path: Path) -> Iterator[Record]:
    """The records of a file: one a line (.jsonl), or all in one list (.json)."""
    text = open_text(path)
    if path.name.removesuffix(".xz").endswith(".json"):
        values = _json(text, str(path))
        values = values.get("data") if isinstance(values, dict) else values  # SQuAD's own file
        if not isinstance(values, list):
            raise EvalError(f"{path}: {type(values).__name__}: expected a list of records")
        for number, value in enumerate(values, 1):
            yield Record(f"{path}, record {number}", value)
        return
    empty = True
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            empty = False
            where = f"{path}, line {number}"
            yield Record(where, _json(line, where))
    if empty:
        raise EvalError(f"{path}: no records")


def _json(text: str, where: str) -> Any:
    try:
        return from_json(text)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{where}: not JSON: {error}") from error


def hub(source: str, **options: Any) -> Iterator[Record]:
    """Records of a dataset on the hub: OWNER/NAME, or lines of JSON in it (see `FixedTask.hub`).

    The lines are read as they are. The code that some datasets bring is not run; new versions of the library refuse it.

    Args:
        options: further arguments of `datasets.load_dataset`: name, split.
    """
    try:
        import datasets
    except ImportError as error:
        raise EvalError(f"{source}: needs the datasets library: pip install 'ahn[eval]'; {COPY}") from error
    owner, name, *rest = source.split("/", 2)
    arguments: dict[str, Any] = {"path": f"{owner}/{name}", "streaming": True, **options}
    if rest:
        archive, _, member = rest[0].partition("::")
        url = f"hf://datasets/{owner}/{name}/{archive}"
        arguments |= {"path": "json", "data_files": f"zip://**/{member}::{url}" if member else url, "split": "train"}
    try:
        check_dataset(f"{owner}/{name}")
        for number, fields in enumerate(datasets.load_dataset(**arguments), 1):
            yield Record(f"{source}, record {number}", fields)
    except EvalError:
        raise
    except Exception as error:  # errors of the library, of its readers, and of the hub client's HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvalError(f"{source}: cannot be loaded from the hub: {reason}; {COPY}") from error
