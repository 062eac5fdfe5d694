"""Opens a source of training data and reads its texts or records.

A source is one of
- `.txt`, `.md`: one text, in any encoding that `ahn.documents` knows;
- `.jsonl`: a record a line, in UTF-8;
- `.parquet`: a record a row;
- `hub:OWNER/NAME[/CONFIG][:SPLIT]`: a dataset of the hub, streamed (default split: train);
- `hub:FOLDER[:SPLIT]`: a dataset on disk.

`.txt`, `.md` and `.jsonl` may be xz-compressed (`.jsonl.xz`). `.parquet` and `hub:` need the `datasets` library
(`pip install 'ahn[train]'`).
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ahn.dialogue import from_json
from ahn.documents.encoding import binary, guess, marked, wide
from ahn.errors import DocumentError
from ahn.hub import check_dataset, expanded

HUB = "hub:"
EXPECTED = f"expected .txt, .md, .jsonl (or one of these with .xz), .parquet, or {HUB}OWNER/NAME[/CONFIG][:SPLIT]"


def check_there(sources: list[str]) -> None:
    """Raises DocumentError if a file is missing. Quick: nothing is opened."""
    for source in sources:
        if not source.startswith(HUB) and not Path(source).exists():
            raise DocumentError(f"{source}: no such file")


def read_records(source: str) -> Iterator[tuple[str, Any]] | None:
    """The records of a source, each after its place for messages ("a.jsonl, line 3"). None if the source is one text.

    Raises:
        DocumentError: the source is missing, damaged, of an unknown kind, or not in UTF-8.
    """
    suffix = Path(source.removesuffix(".xz")).suffix
    if source.startswith(HUB) or suffix == ".parquet":
        return _dataset(source)
    if suffix == ".jsonl":
        return _json_lines(source)
    if suffix in (".txt", ".md"):
        return None
    kind = "is a folder" if Path(source).is_dir() else f"unknown kind of file {suffix!r}"
    raise DocumentError(f"{source}: {kind}; {EXPECTED}")


def read_text(source: str) -> str:
    """A whole text, decoded by the encoding that it seems to have. Raises DocumentError, also for an empty one."""
    with _opened(source) as file:
        content = file.read()
    encoding = marked(content) or wide(content)
    if not encoding and (reason := binary(content)):
        raise DocumentError(f"{source}: not text ({reason}); {EXPECTED}")
    decoded = content.decode(encoding or guess(content), "replace").replace("\r\n", "\n").replace("\r", "\n")
    if not decoded.strip():
        raise DocumentError(f"{source}: empty")
    return decoded


def state(source: str) -> list[Any] | None:
    """Values that change when the content of a source does: size and time of each file, or the commit on the hub.

    None if they cannot be had, for example without a network.
    """
    path = Path(source)
    if source.startswith(HUB):
        name, _, _ = _hub_parts(source)
        path = Path(name)
        if not path.is_dir():
            try:
                from huggingface_hub import dataset_info

                return [dataset_info(name, timeout=5).sha]
            except Exception:  # offline, or no such dataset: loading it says so
                return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    try:
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError:
        return None


def _json_lines(source: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(source), 1):
        if line.strip():
            where = f"{source}, line {number}"
            try:
                record = from_json(line)
            except (ValueError, RecursionError) as error:
                raise DocumentError(f"{where}: not JSON: {error}") from error
            yield where, record


def _lines(source: str) -> Iterator[str]:
    with _opened(source) as file, io.TextIOWrapper(file, "utf-8-sig") as lines:
        try:
            yield from lines
        except UnicodeDecodeError as error:
            raise DocumentError(f"{source}: not UTF-8 text ({error.reason}): expected records in UTF-8") from error


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed."""
    path = Path(source)
    if path.is_dir():
        raise DocumentError(f"{source}: is a folder; {EXPECTED}")
    try:
        with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except FileNotFoundError as error:
        raise DocumentError(f"{source}: no such file") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DocumentError(f"{source}: cannot be read: {error}") from error


def _dataset(source: str) -> Iterator[tuple[str, Any]]:
    """Records of a dataset on the hub, of one in a folder, or of a parquet file, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise DocumentError(f"{source}: needs the datasets library: pip install 'ahn[train]'") from error
    try:
        if not source.startswith(HUB):
            if not Path(source).is_file():
                raise DocumentError(f"{source}: no such file")
            found = datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)
        else:
            path, config, split = _hub_parts(source)
            if not Path(path).is_dir():
                check_dataset(path)
            found = datasets.load_dataset(path, config, split=split, streaming=True)
        for number, record in enumerate(found, 1):
            # a key that other records have and this one lacks comes as None
            yield f"{source}, record {number}", {key: value for key, value in record.items() if value is not None}
    except DocumentError:
        raise
    except Exception as error:  # of `datasets`, of its readers, or of the hub client's HTTP library
        reason = str(error).strip() or type(error).__name__
        raise DocumentError(f"{source}: cannot be loaded: {reason.splitlines()[0]}") from error


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """Folder or hub id, configuration, split."""
    name, _, split = source.removeprefix(HUB).partition(":")
    if expanded(name).is_dir():
        return str(expanded(name)), None, split or "train"
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise DocumentError(f"{source}: no such folder; {EXPECTED}")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"
