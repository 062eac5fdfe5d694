"""Bodies of requests. A field that is not here is refused; one whose only value is the default may be given too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ahn.dialogue import readable
from ahn.engine.sequence import MOST_ALTERNATIVES, MOST_SEED, Request
from ahn.recall import Recall
from ahn.recall.ask import FINDER
from ahn.serve.errors import ApiError

MOST_STOPS = 4
DEFAULT_TOKENS = 256
Text = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """Its strings are without lone surrogates, which no answer could repeat."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        return {_clean(name): _clean(found) for name, found in value.items()} if isinstance(value, dict) else value


def _clean(value: Any) -> Any:
    """A field; bodies in it see to themselves."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, list):
        return [readable(one) if isinstance(one, str) else one for one in value]
    if isinstance(value, dict):
        return {readable(name): readable(one) if isinstance(one, str) else one for name, one in value.items()}
    return value


class StreamOptions(Body):
    include_usage: bool = False


class Sampled(Body):
    """Fields of every request for an answer. `recall`, `finder`, `rounds` and `guess` are as of `ahn ask`."""

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=MOST_SEED)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def alternatives(self) -> int | None:
        """Number of likeliest tokens whose logprobs are wanted beside those of the answer; None: no logprobs."""
        return None

    def sampling(self, most: int) -> dict[str, object]:
        """Arguments of an engine's `Request`. Raises ApiError if the answer may have more than `most` tokens."""
        limit = self.limit
        if limit is not None and limit > most:
            raise ApiError(400, f"max_tokens={limit}: expected at most {most:,}", "max_tokens", "invalid_value")
        return {
            "max_new_tokens": limit or min(DEFAULT_TOKENS, most),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": self.stops,
            "logprobs": self.alternatives,
        }

    def engine_request(self, most: int, ids: object, memory: object) -> Request:
        return Request(ids=ids, memory=memory, **self.sampling(most))  # type: ignore[arg-type]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A message. The fields after `name` are those that clients send back with an answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Recalling(Sampled):
    recall: int | None = Field(None, ge=0)
    finder: str = FINDER
    rounds: Literal[1, 2] = 1
    guess: bool = False

    def how(self, recall: int | None) -> Recall:
        """How passages are found; `recall` is used where the request does not say."""
        return Recall(recall if self.recall is None else self.recall, self.finder, self.rounds)


class ChatBody(Recalling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Sampled):
    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class ResponsePart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[object] | None = None
    logprobs: list[object] | None = None


class ResponseMessage(Body):
    """A message; `id` and `status` are those of an answer that is sent back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ResponsePart]
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseBody(Recalling):
    model: Text | None = None  # type: ignore[assignment]  # that of the response that is gone on from
    input: Text | Annotated[list[ResponseMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    max_tokens: None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def messages(self) -> list[ResponseMessage]:
        said = [ResponseMessage(role="user", content=self.input)] if isinstance(self.input, str) else list(self.input)
        return [ResponseMessage(role="system", content=self.instructions), *said] if self.instructions else said


class MemoryBody(Body):
    text: Text
    name: str | None = None


class ForkBody(Body):
    name: str | None = None
