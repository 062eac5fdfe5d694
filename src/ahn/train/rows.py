"""Rows of token ids to train on, and the folder that keeps those that took long to make."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ahn.errors import AHNError
from ahn.train import sources

WORTH_KEEPING_S = 1.0  # rows that took less time than this are made again rather than kept
VERSION = "3"  # of the kept rows; raise it when the same source gives other rows

logger = logging.getLogger(__name__)


@dataclass
class Rows:
    """`ids` [rows, T] int32 and `counts` [rows, T] bool: whether the token that follows is to be predicted."""

    ids: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, wanted: Tensor) -> Rows:
        """The rows for which `wanted` [rows] is true."""
        return Rows(self.ids[wanted], self.counts[wanted])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row].long(), "counts": self.counts[row]}


def cached(path: Path, make: Callable[[], Rows]) -> Rows:
    """The rows in this file. Without the file, make them, and keep them if that took long.

    Of several processes one makes the rows while the others wait. A folder that cannot be written, or a damaged file,
    costs a warning and the time to make the rows.
    """
    from filelock import FileLock
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from ahn.files import atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock")).acquire()
    except OSError as error:
        logger.warning("rows are not kept: %s", error)
        return make()
    with lock:
        if path.is_file():
            try:
                return Rows(**load_file(path))
            except (OSError, SafetensorError) as error:
                logger.warning("%s: damaged, made again: %s", path, error)
        began = time.monotonic()
        made = make()
        if time.monotonic() - began >= WORTH_KEEPING_S:
            try:
                with atomic(path) as temporary:
                    save_file({"ids": made.ids, "counts": made.counts}, temporary)
            except AHNError as error:
                logger.warning("rows are not kept: %s", error)
    return made


def cache_key(source: str, tokenizer: Any, length: int, limit: int | None, seed: int) -> str | None:
    """A name for the rows of a source: a hash of everything that they depend on.

    None if the source's state cannot be told, or the tokenizer cannot be written as text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = sources.state(source)
    if backend is None or state is None:
        return None
    said = [VERSION, source, state, backend.to_str(), tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([*said, length, limit, seed]).encode()).hexdigest()[:24]
