"""What a handler is given: the state of the server, and whose memories the request may use."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from ahn.serve.gate import OWNER
from ahn.serve.reading import Readings
from ahn.serve.state import State


def state_of(http: Request) -> State:
    found: State = http.app.state.served
    return found


def owner_of(http: Request) -> str:
    """The owner that the API key belongs to; "" without keys."""
    found: str = http.scope[OWNER]
    return found


def readings_of(http: Request) -> Readings:
    found: Readings = http.app.state.readings
    return found


Served = Annotated[State, Depends(state_of)]
Reader = Annotated[Readings, Depends(readings_of)]
Owner = Annotated[str, Depends(owner_of)]
