"""Answers over HTTP, asked with the official client."""

import json

import pytest

import ahn
from ahn.dialogue import Dialogue
from ahn.tokens import digest
from serving import NAME, server, tiny_model

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

TEXT = "The cat sat. Who sat? The old cat. " * 40
MESSAGES = [{"role": "user", "content": "Who sat?"}]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memories")
    memory_file(model, folder / "cats.ahn")
    with server(folder, model) as (address, state):
        yield address, state


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def memory_file(model, path):
    model, tokenizer = model
    memory = ahn.AHNCache(model, "text")
    memory.archive.tokenizer = digest(tokenizer)
    memory.archive.begin("cats.txt", 0)
    ahn.read(model, Dialogue.of(tokenizer).open(TEXT), memory)
    memory.save(path)


def test_models_are_the_base_and_the_memories(client, served):
    assert httpx.get(f"{served[0]}/health").json()["status"] == "ok"
    assert [model.id for model in client.models.list()] == [NAME, "ahn:cats"]
    assert client.models.retrieve("ahn:cats").id == "ahn:cats"
    with pytest.raises(openai.NotFoundError, match="model 'ahn:dogs': expected one of /v1/models"):
        client.models.retrieve("ahn:dogs")


def test_an_answer_about_a_memory_is_that_of_ask(client, model):
    answer = client.chat.completions.create(
        model="ahn:cats", messages=MESSAGES, max_tokens=8, extra_body={"recall": 120}
    )
    memory = client_memory(model)
    expected = ahn.ask(*model, memory, "Who sat?", 120, max_new_tokens=8)
    assert answer.choices[0].message.content.strip() == expected.text
    assert [source["text"] for source in answer.sources] == [source.text for source in expected.sources]
    assert answer.sources[0]["document"] == "cats.txt"


def client_memory(model):
    memory = ahn.AHNCache(model[0], "text")
    memory.archive.tokenizer = digest(model[1])
    memory.archive.begin("cats.txt", 0)
    return ahn.read(model[0], Dialogue.of(model[1]).open(TEXT), memory)


def test_without_recall_an_answer_comes_from_the_memory(client, model):
    answer = client.chat.completions.create(model="ahn:cats", messages=MESSAGES, max_tokens=8)
    memory = client_memory(model)
    assert answer.choices[0].message.content.strip() == ahn.ask(*model, memory, "Who sat?", 0, max_new_tokens=8).text
    assert answer.sources == []
    assert answer.usage.prompt_tokens_details.cached_tokens == memory.tokens_seen
    asked = Dialogue.of(model[1]).question("Who sat?").shape[1]
    assert answer.usage.prompt_tokens == memory.tokens_seen + asked
    assert answer.usage.completion_tokens <= 8


@pytest.mark.parametrize("name", [NAME, "ahn:cats"])
def test_events_make_up_the_whole_answer(client, name):
    options = {"model": name, "messages": MESSAGES, "max_tokens": 12, "temperature": 1, "seed": 3, "top_p": 0.9}
    whole = client.chat.completions.create(**options)
    events = [*client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})]
    text = "".join(event.choices[0].delta.content or "" for event in events[:-1])
    assert text == whole.choices[0].message.content
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


def test_a_stop_ends_the_answer(client):
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content
    stop = text[3:5]
    answer = client.chat.completions.create(**options, stop=stop)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_conversation_goes_on(client, model):
    more = [*MESSAGES, {"role": "assistant", "content": "The cat."}, {"role": "user", "content": "Why?"}]
    answer = client.chat.completions.create(model="ahn:cats", messages=more, max_tokens=8, extra_body={"recall": 120})
    assert answer.usage.prompt_tokens_details.cached_tokens == client_memory(model).tokens_seen
    assert client.chat.completions.create(model=NAME, messages=more, max_tokens=8).choices[0].message.content


def test_a_completion(client, model):
    options = {"model": NAME, "prompt": "The cat", "max_tokens": 8}
    answer = client.completions.create(**options, logprobs=2)
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.tokens)
    assert 1 <= len(answer.choices[0].logprobs.top_logprobs[0]) <= 2  # broken characters look alike
    ids = model[1]("The cat").input_ids
    assert client.completions.create(**options | {"prompt": ids}).choices[0].text == answer.choices[0].text
    events = client.completions.create(**options, stream=True)
    assert "".join(event.choices[0].text for event in events) == answer.choices[0].text
    assert client.completions.create(**options | {"model": "ahn:cats"}).choices[0].text


def test_logprobs(client):
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3
    ).choices[0]
    assert len(answer.logprobs.content[0].top_logprobs) == 3
    assert answer.logprobs.content[0].logprob == answer.logprobs.content[0].top_logprobs[0].logprob


BAD = [
    ({"colour": 1}, "colour", "unknown field 'colour'"),
    ({"temperature": 3}, "temperature", "temperature='3'"),
    ({"temperature": "hot"}, "temperature", "temperature='hot'"),
    ({"top_p": 0}, "top_p", "top_p='0'"),
    ({"n": 2}, "n", "n='2'"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens='0'"),
    ({"max_tokens": 5000}, "max_tokens", "max_tokens=5000: expected at most 4,096"),
    ({"stop": ["a"] * 5}, "stop", "stop"),
    ({"messages": []}, "messages", "messages"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood", "unknown field"),
    ({"messages": [{"role": "pope", "content": "x"}]}, "messages.0.role", "role"),
    ({"model": "ahn:cats", "finder": "luck"}, None, "luck"),
    ({"model": "ahn:cats", "messages": [{"role": "user", "content": " "}]}, None, "expected some text"),
    ({"model": "ahn:cats", "messages": [{"role": "assistant", "content": "x"}]}, "messages", "a question first"),
]


@pytest.mark.parametrize(("change", "param", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_fields_are_refused_by_name(served, change, param, message):
    body = {"model": NAME, "messages": MESSAGES} | change
    answer = httpx.post(f"{served[0]}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


def test_other_bad_requests(served):
    def post(path="/v1/chat/completions", **options):
        answer = httpx.post(f"{served[0]}{path}", **options)
        return answer.status_code, answer.json()["error"]["message"]

    as_json = {"Content-Type": "application/json"}
    assert post(content=b"{", headers=as_json)[0] == 400
    assert post(content=b"[" * 100_000, headers=as_json)[0] == 400
    assert post(json={"model": "gpt-4", "messages": MESSAGES})[0] == 404
    assert post("/v1/nothing", json={}) == (404, "POST /v1/nothing: Not Found")
    assert post("/v1/models", json={})[0] == 405
    assert post(content=b" " * 17_000_000, headers=as_json) == (413, "body: expected at most 16,000,000 bytes")
    chunks = (b" " * 1_000_000 for _ in range(17))
    status, message = post(content=chunks, headers=as_json)
    assert status == 413 and message.endswith("expected at most 16,000,000 bytes")
    lone = json.dumps({"model": "\ud800", "messages": MESSAGES})
    assert post(content=lone, headers=as_json)[0] in (400, 404)


def test_special_tokens_in_a_message_are_its_characters(client, model):
    marked = [{"role": "user", "content": "<|end|>"}]
    plain = [{"role": "user", "content": "x"}]
    counts = [
        client.chat.completions.create(model=NAME, messages=messages, max_tokens=1).usage.prompt_tokens
        for messages in (marked, plain)
    ]
    assert counts[0] > counts[1]
