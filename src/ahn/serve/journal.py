"""A journal: lines of JSON, each on disk before it counts. A line that was cut off by a crash is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ahn import files
from ahn.errors import MemoryFileError, OutputError

Line = dict[str, Any]


class Journal:
    """The lines of a file, which is made when the first one is written. For one thread at a time.

    Raises:
        MemoryFileError: a line other than the last is no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = self._read()

    def _read(self) -> list[Line]:
        if not self.path.exists():
            return []
        *whole, torn = self.path.read_bytes().split(b"\n")
        try:
            lines = [json.loads(line) for line in whole]
        except ValueError as error:
            raise MemoryFileError(f"{self.path}: damaged journal: {error}; expected a line of JSON each") from None
        if torn:
            with self.path.open("r+b") as file:
                file.truncate(file.seek(0, os.SEEK_END) - len(torn))
        return lines

    def add(self, line: Line) -> None:
        """Write a line. Raises OutputError, and the journal is then as before."""
        is_new = not self.path.exists()
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    file.write(json.dumps(line).encode() + b"\n")
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(end)
                    raise
            if is_new:
                files.to_disk(self.path.parent)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error}") from error
        self.lines.append(line)

    def rewrite(self, lines: Sequence[Line]) -> None:
        """Replace all lines, whole or not at all. Raises OutputError."""
        with files.atomic(self.path) as temporary:
            temporary.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.lines = list(lines)
