"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from ahn.engine.sequence import Finish, Token
from ahn.serve.access import Owner, Served
from ahn.serve.answers import Answer, Events, Json, admitted, evidence, usage, whole
from ahn.serve.prompts import Before, Prompt, of_base, of_memory
from ahn.serve.schema import ChatBody
from ahn.serve.state import State

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, http: Request, state: Served, owner: Owner) -> Any:
    """An answer to a conversation. About a memory it comes with its sources."""
    async with admitted(state):
        prompt = await prompt_of(state, owner, body)
        request = body.engine_request(state.limits.new_tokens, prompt.ids, prompt.memory)
        answer = Answer(state, prompt, request if prompt.answerable else None)
    if body.stream:
        return Events(_events(answer, body), answer.close)
    found = await whole(answer, http)
    assert found.finish is not None
    logprobs = [_logprob(state, token) for token in found.tokens] if body.logprobs else None
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": found.text},
        "logprobs": None if logprobs is None else {"content": logprobs},
        "finish_reason": _reason(found.finish),
    }
    head = _head(body.model, "chat.completion")
    return head | {"choices": [choice], "usage": usage(found.finish.usage)} | evidence(prompt.found)


async def prompt_of(state: State, owner: str, body: ChatBody) -> Prompt:
    """The prompt of a conversation; passages are found between two tokens of other answers."""
    entry = state.named(owner, body.model)
    if entry is None:
        return await asyncio.to_thread(of_base, state.tokenizer, body.messages)
    before = Before(await state.memory(entry))
    make = partial(
        of_memory, state.model, state.tokenizer, before, body.messages, body.how(state.recall), guess=body.guess
    )
    return await asyncio.wrap_future(state.engine.run(make))


async def _events(answer: Answer, body: ChatBody) -> AsyncIterator[Json]:
    head = _head(body.model, "chat.completion.chunk")
    counted = body.stream_options is not None and body.stream_options.include_usage
    empty: Json = {"usage": None} if counted else {}

    def event(delta: Json, reason: str | None = None, logprobs: Json | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | empty

    yield event({"role": "assistant", "content": ""}) | evidence(answer.prompt.found)
    async for item in answer.events():
        if isinstance(item, Finish):
            yield event({}, _reason(item))
            if counted:
                yield head | {"choices": [], "usage": usage(item.usage)}
        elif item.text or body.logprobs:
            logprobs = {"content": [_logprob(answer.state, item)]} if body.logprobs else None
            yield event({"content": item.text}, logprobs=logprobs)


def _head(model: str, kind: str) -> Json:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _reason(finish: Finish) -> str:
    return "length" if finish.reason == "length" else "stop"


def _logprob(state: State, token: Token) -> Json:
    top = [_one(state, id, value) for id, value in token.top]
    return _one(state, token.id, token.logprob or 0.0) | {"top_logprobs": top}


def _one(state: State, id: int, value: float) -> Json:
    text = state.tokenizer.decode([id])
    return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}
