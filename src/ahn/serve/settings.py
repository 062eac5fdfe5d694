"""Limits of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Args:
    waiting: requests that may wait for a slot; further ones get 429.
    seconds: that a request may take.
    new_tokens: of an answer.
    body: bytes of a request in JSON. upload: bytes of one with documents or a memory file.
    documents: of one upload. memories: of one key. readings: documents and texts of one key that wait to be read.
    tokens: that a memory may have read.
    loaded: memories that are kept ready to be asked. kept: bytes of responses that can be gone on from.
    """

    waiting: int = 64
    seconds: float = 600.0
    new_tokens: int = 4096
    body: int = 16_000_000
    upload: int = 512_000_000
    documents: int = 100
    memories: int = 1000
    readings: int = 100
    tokens: int = 10_000_000
    loaded: int = 16
    kept: int = 2_000_000_000
