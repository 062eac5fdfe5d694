"""/v1/responses: a conversation that the server keeps. Each response is a fork, which others may go on from."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Request

from ahn.engine.sequence import Finish, Usage
from ahn.memory.cache import AHNCache
from ahn.serve.access import Owner, Served
from ahn.serve.answers import Answer, Events, Json, Whole, admitted, evidence, gathered, whole
from ahn.serve.errors import ApiError
from ahn.serve.kept import Kept
from ahn.serve.prompts import Before, Prompt, of_base, of_memory
from ahn.serve.schema import ResponseBody
from ahn.serve.state import State

router = APIRouter(prefix="/v1/responses")

CONVERSATION = "conversation"  # the document that later turns are in the archive of a kept memory


@dataclass(frozen=True)
class Asked:
    """A request, and what was found for it."""

    state: State
    owner: str
    body: ResponseBody
    model: str
    prompt: Prompt
    id: str
    created: int


@router.post("")
async def respond(body: ResponseBody, http: Request, state: Served, owner: Owner) -> Any:
    """An answer, to be gone on from by `previous_response_id`."""
    async with admitted(state):
        model, prompt = await _prompt(state, owner, body)
        request = body.engine_request(state.limits.new_tokens, prompt.ids, prompt.memory)
        answer = Answer(state, prompt, request if prompt.answerable else None)
    asked = Asked(state, owner, body, model, prompt, f"resp_{secrets.token_hex(16)}", int(time.time()))
    if body.stream:
        return Events(_events(answer, asked), answer.close)
    return _done(asked, await whole(answer, http))


@router.get("/{id}")
async def get(id: str, state: Served, owner: Owner) -> Any:
    return state.responses.get(owner, id).body


@router.delete("/{id}")
async def delete(id: str, state: Served, owner: Owner) -> Any:
    state.responses.delete(owner, id)
    return {"id": id, "object": "response", "deleted": True}


async def _prompt(state: State, owner: str, body: ResponseBody) -> tuple[str, Prompt]:
    before = None
    if body.previous_response_id is not None:
        kept = state.responses.get(owner, body.previous_response_id, "previous_response_id")
        if body.model not in (None, kept.model):
            raise ApiError(400, f"model {body.model!r}: expected that of the response, {kept.model!r}", "model")
        before = Before(await asyncio.shield(kept.memory), kept.answer)
        model = kept.model
    elif body.model is None:
        raise ApiError(400, "model: expected one of /v1/models", "model", "missing")
    else:
        model = body.model
    entry = state.named(owner, model)
    if before is None and entry is None:
        return model, await asyncio.to_thread(of_base, state.tokenizer, body.messages)
    if before is None:
        before = Before(await state.memory(entry))  # type: ignore[arg-type]
    how = body.how(state.recall)
    if before.memory.archive is None:
        how = how._replace(tokens=None)  # a conversation with the base has nothing to find passages in
    make = partial(of_memory, state.model, state.tokenizer, before, body.messages, how, guess=body.guess)
    return model, await asyncio.wrap_future(state.engine.run(make))


def _done(asked: Asked, found: Whole) -> Json:
    """The response; its memory reads question and answer meanwhile."""
    finish = found.finish
    assert finish is not None
    body = _response(asked, found.text, finish)
    if asked.body.store is not False:
        ids = [token.id for token in found.tokens]
        memory = asyncio.ensure_future(_read(asked, ids))
        memory.add_done_callback(lambda done: done.cancelled() or done.exception())
        kept = Kept(asked.owner, body, asked.model, ids, memory)
        asked.state.responses.add(asked.id, kept)
    return body


async def _read(asked: Asked, answer: list[int]) -> AHNCache:
    """The memory behind question and answer, without the passages that were read again."""
    prompt = asked.prompt
    ids = torch.cat([prompt.plain, torch.tensor([answer], dtype=torch.int64)], 1)
    parent = prompt.parent
    memory = await asyncio.wrap_future(asked.state.engine.read(ids, parent))
    if memory.archive is not None and parent is not None:
        memory.archive.begin(CONVERSATION, parent.tokens_seen)
    return memory


def _response(asked: Asked, text: str | None, finish: Finish | None) -> Json:
    """As the API has it. text: None while there is none."""
    body, cut = asked.body, finish is not None and finish.reason == "length"
    status = "in_progress" if finish is None else "incomplete" if cut else "completed"
    return {
        "id": asked.id,
        "object": "response",
        "created_at": asked.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": asked.model,
        "output": [] if text is None else [_message(asked, text, status)],
        "parallel_tool_calls": False,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "temperature": body.temperature,
        "tool_choice": "none",
        "tools": [],
        "top_p": body.top_p,
        "usage": None if finish is None else _usage(finish.usage),
        "metadata": body.metadata or {},
    } | evidence(asked.prompt.found)


def _message(asked: Asked, text: str, status: str) -> Json:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"id": _item(asked), "type": "message", "status": status, "role": "assistant", "content": content}


def _item(asked: Asked) -> str:
    return asked.id.replace("resp_", "msg_")


def _usage(found: Usage) -> Json:
    return {
        "input_tokens": found.prompt_tokens,
        "input_tokens_details": {"cached_tokens": found.cached_tokens},
        "output_tokens": found.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found.prompt_tokens + found.completion_tokens,
    }


async def _events(answer: Answer, asked: Asked) -> AsyncIterator[Json]:
    number = -1

    def event(kind: str, **fields: Any) -> Json:
        nonlocal number
        number += 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    place = {"item_id": _item(asked), "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    start = _response(asked, None, None)
    yield event("created", response=start)
    yield event("in_progress", response=start)
    message = _message(asked, "", "in_progress") | {"content": []}
    yield event("output_item.added", output_index=0, item=message)
    yield event("content_part.added", **place, part=part)
    found = Whole()
    async for item in gathered(answer, found):
        if item.text:
            yield event("output_text.delta", **place, delta=item.text, logprobs=[])
    body = _done(asked, found)
    yield event("output_text.done", **place, text=found.text, logprobs=[])
    yield event("content_part.done", **place, part=part | {"text": found.text})
    yield event("output_item.done", output_index=0, item=body["output"][0])
    yield event(body["status"], response=body)
