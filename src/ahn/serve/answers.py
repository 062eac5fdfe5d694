"""Answers of the engine, whole or as events, for as long as the client listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse

from ahn.engine.sequence import Finish, Request, Stream, Token, Usage
from ahn.errors import AHNError
from ahn.recall import NOT_FOUND, Found, not_found
from ahn.serve.errors import ApiError, of_ahn
from ahn.serve.prompts import Prompt
from ahn.serve.state import State

Json = dict[str, Any]


class Answer:
    """An answer in progress. `close` has to be called at the end."""

    def __init__(self, state: State, prompt: Prompt, request: Request | None) -> None:
        self.state, self.prompt = state, prompt
        self._stream: Stream | None = None if request is None else state.engine.submit(request)
        self._late, self._closed = False, False
        seconds = state.limits.seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._late = True
        self.cancel()

    def cancel(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        """Give its place back; an unfinished answer is cancelled."""
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self.cancel()
            self.state.leave()

    async def events(self) -> AsyncIterator[Token | Finish]:
        """Tokens, then the finish. Raises ApiError if the engine fails or time is over."""
        if self._stream is None:
            for event in self._refusal():
                yield event
            return
        async for event in self._stream:
            if isinstance(event, Finish):
                if self._late:
                    raise ApiError(
                        504, f"more than {self.state.limits.seconds:g} seconds: expected less", code="timeout"
                    )
                if isinstance(event.error, AHNError):
                    raise of_ahn(event.error)
                if event.reason == "error":
                    raise ApiError(500, "the engine has failed", code="engine")
                if event.reason == "cancelled" and not self.state.engine.alive:
                    raise ApiError(503, "the engine was closed", code="engine")
            yield event

    def _refusal(self) -> Iterator[Token | Finish]:
        """The text supports no answer: nothing is generated."""
        ids = not_found(self.state.tokenizer)
        for number, id in enumerate(ids.tolist()):
            yield Token(id, "" if number else NOT_FOUND)
        yield Finish("stop", Usage(self.prompt.ids.shape[1], 0, len(ids)))


@dataclass
class Whole:
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None


async def gathered(answer: Answer, found: Whole) -> AsyncIterator[Token]:
    """The tokens of an answer, which are noted in `found` with its finish."""
    async for event in answer.events():
        if isinstance(event, Finish):
            found.finish = event
        else:
            found.tokens.append(event)
            found.text += event.text
            yield event


async def whole(answer: Answer, http: HTTPRequest) -> Whole:
    """Wait for the end of an answer, which is cancelled if the client goes."""
    watching = asyncio.create_task(_watch(http, answer))
    found = Whole()
    try:
        async for _ in gathered(answer, found):
            pass
    finally:
        watching.cancel()
        answer.close()
    return found


async def _watch(http: HTTPRequest, answer: Answer) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


class Events(StreamingResponse):
    """Server-sent events. `close` is called whatever happens, also if the client goes before the first one."""

    def __init__(self, events: AsyncIterator[Json], close: Callable[[], None]) -> None:
        super().__init__(_encoded(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _encoded(events: AsyncIterator[Json]) -> AsyncIterator[str]:
    try:
        async for event in events:
            named = f"event: {event['type']}\n" if "type" in event else ""
            yield f"{named}data: {json.dumps(event)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    yield "data: [DONE]\n\n"


@asynccontextmanager
async def admitted(state: State) -> AsyncIterator[None]:
    """Within, the request has a place; if it fails, the place is given back, else `Answer.close` does so."""
    state.admit()
    try:
        yield
    except BaseException:
        state.leave()
        raise


def usage(found: Usage) -> Json:
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "total_tokens": found.prompt_tokens + found.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": found.cached_tokens},
    }


def evidence(found: Found | None) -> Json:
    """The passages that an answer was given, and the support for it; nothing of an answer without a memory."""
    if found is None:
        return {}
    return {"sources": [asdict(source) for source in found.sources], "support": found.support}
