"""Responses that can be gone on from: each has the memory as it is after its answer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ahn.memory.cache import AHNCache
from ahn.serve.errors import ApiError


@dataclass(frozen=True)
class Kept:
    """A response.

    Attributes:
        owner: of the key that made it. body: as it was sent. model: that it asked. answer: ids.
        memory: after it has read question and answer; it is still being read while the future is not done.
    """

    owner: str
    body: dict[str, Any]
    model: str
    answer: list[int]
    memory: asyncio.Future[AHNCache]


class Responses:
    """The last responses. For the event loop.

    Args:
        most: bytes that their memories may take.
    """

    def __init__(self, most: int, each: int) -> None:
        self.most, self.each = most, each
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def add(self, id: str, kept: Kept) -> None:
        self._kept[id] = kept
        while len(self._kept) > max(1, self.most // max(self.each, 1)):
            self._kept.popitem(last=False)

    def get(self, owner: str, id: str, param: str | None = None) -> Kept:
        """Raises ApiError 404 if it is not kept, or another owner's."""
        kept = self._kept.get(id)
        if kept is None or kept.owner != owner:
            raise ApiError(404, f"response {id[:80]!r}: not kept, or not any more", param, "response_not_found")
        self._kept.move_to_end(id)
        return kept

    def delete(self, owner: str, id: str) -> None:
        self.get(owner, id)
        del self._kept[id]
