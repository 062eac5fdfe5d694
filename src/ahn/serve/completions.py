"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from ahn.engine.sequence import Finish, Token
from ahn.serve.access import Owner, Served
from ahn.serve.answers import Answer, Events, Json, admitted, usage, whole
from ahn.serve.prompts import of_text
from ahn.serve.schema import CompletionBody
from ahn.serve.state import State

router = APIRouter()


@router.post("/v1/completions")
async def complete(body: CompletionBody, http: Request, state: Served, owner: Owner) -> Any:
    """A text that goes on from the prompt, behind a memory or alone. Nothing is looked up for it."""
    async with admitted(state):
        entry = state.named(owner, body.model)
        memory = None if entry is None else await state.memory(entry)
        prompt = await asyncio.to_thread(of_text, state.tokenizer, body.prompt, memory)
        answer = Answer(state, prompt, body.engine_request(state.limits.new_tokens, prompt.ids, prompt.memory))
    if body.stream:
        return Events(_events(answer, body), answer.close)
    found = await whole(answer, http)
    assert found.finish is not None
    logprobs = None if body.logprobs is None else _logprobs(state, found.tokens)
    choice = _choice(found.text, logprobs, found.finish)
    return _head(body.model) | {"choices": [choice], "usage": usage(found.finish.usage)}


async def _events(answer: Answer, body: CompletionBody) -> AsyncIterator[Json]:
    head = _head(body.model)
    counted = body.stream_options is not None and body.stream_options.include_usage
    empty: Json = {"usage": None} if counted else {}
    async for item in answer.events():
        if isinstance(item, Finish):
            yield head | {"choices": [_choice("", None, item)]} | empty
            if counted:
                yield head | {"choices": [], "usage": usage(item.usage)}
        elif item.text or body.logprobs is not None:
            logprobs = None if body.logprobs is None else _logprobs(answer.state, [item])
            yield head | {"choices": [_choice(item.text, logprobs, None)]} | empty


def _head(model: str) -> Json:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }


def _choice(text: str, logprobs: Json | None, finish: Finish | None) -> Json:
    reason = None if finish is None else "length" if finish.reason == "length" else "stop"
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(state: State, tokens: list[Token]) -> Json:
    def text(id: int) -> str:
        found: str = state.tokenizer.decode([id])
        return found

    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token.text)
    return {
        "tokens": [text(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{text(id): value for id, value in token.top} for token in tokens],
        "text_offset": offsets,
    }
