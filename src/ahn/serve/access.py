"""What a handler is given: the state of the server, and whose memories the request may use."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from ahn.serve.state import State


def state_of(http: Request) -> State:
    found: State = http.app.state.served
    return found


def owner_of(http: Request) -> str:
    """The owner that the API key belongs to; "" without keys. Raises ApiError 401."""
    keys = http.app.state.keys
    return "" if keys is None else keys.owner(http.headers.get("authorization", ""))


Served = Annotated[State, Depends(state_of)]
Owner = Annotated[str, Depends(owner_of)]
