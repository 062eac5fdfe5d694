"""Too many requests, clients that go, an engine that dies, and texts that support no answer."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving import NAME, server, tiny_model

httpx = pytest.importorskip("httpx")

BODY = {"model": NAME, "messages": [{"role": "user", "content": "Who sat?"}], "max_tokens": 4000}


@pytest.fixture
def model():
    model, tokenizer = tiny_model()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None  # answers that do not end
    return model, tokenizer


def wait(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_is_too_many_is_told_so(model, tmp_path):
    with server(tmp_path, model, slots=1, waiting=0) as (address, state):
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=BODY | {"stream": True}) as first:
            lines = first.iter_lines()  # the connection is closed with it
            next(lines)
            answer = httpx.post(f"{address}/v1/chat/completions", json=BODY)
            assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
        wait(lambda: not state.active)
        assert httpx.post(f"{address}/v1/chat/completions", json=BODY | {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_its_client(model, tmp_path, stream):
    with server(tmp_path, model) as (address, state):
        body = json.dumps(BODY | {"stream": stream}).encode()
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait(lambda: state.engine.load.decoding)
        wait(lambda: not state.engine.load.decoding and not state.active)
        assert state.engine.load.tokens_generated < BODY["max_tokens"]


def test_an_answer_that_takes_too_long_is_ended(model, tmp_path):
    with server(tmp_path, model, seconds=0.05) as (address, state):
        answer = httpx.post(f"{address}/v1/chat/completions", json=BODY)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        lines = httpx.post(f"{address}/v1/chat/completions", json=BODY | {"stream": True}).text.split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        wait(lambda: not state.active)


def test_a_dead_engine_is_told_of(tmp_path, monkeypatch):
    with server(tmp_path) as (address, state):

        def fail(*args):
            raise RuntimeError("broken")

        monkeypatch.setattr(state.engine.memories, "step", fail)
        answer = httpx.post(f"{address}/v1/chat/completions", json=BODY)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        wait(lambda: not state.engine.alive)
        assert httpx.get(f"{address}/health").status_code == 503
        assert httpx.post(f"{address}/v1/chat/completions", json=BODY).status_code == 503
        wait(lambda: not state.active)


def test_a_question_that_the_text_does_not_answer(tmp_path, monkeypatch):
    from ahn.recall import NOT_FOUND, Found
    from ahn.serve import prompts

    monkeypatch.setattr(prompts, "search", lambda *args, **options: Found((), -1.0))
    with server(tmp_path) as (address, _), httpx.Client(base_url=address) as http:
        id = http.post("/v1/memories", json={"text": "A cat."}).json()["id"]
        wait(lambda: not http.get(f"/v1/memories/{id}").json()["waiting"])
        body = BODY | {"model": f"ahn:{id}", "max_tokens": 4}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == NOT_FOUND and answer["support"] == -1
        assert NOT_FOUND in http.post("/v1/chat/completions", json=body | {"stream": True}).text
        guess = http.post("/v1/chat/completions", json=body | {"guess": True}).json()
        assert guess["choices"][0]["message"]["content"] != NOT_FOUND


def test_answers_at_once_are_those_of_each_alone(tmp_path):
    marks = "cat", "mice"
    with server(tmp_path, slots=3) as (address, _), httpx.Client(base_url=address, timeout=60) as http:
        ids = [http.post("/v1/memories", json={"text": f"12 {mark}. " * 40}).json()["id"] for mark in marks]
        for id in ids:
            wait(lambda id=id: not http.get(f"/v1/memories/{id}").json()["waiting"])

        def ask(number):
            body = BODY | {"model": f"ahn:{ids[number % 2]}", "max_tokens": 12, "temperature": 1, "seed": number}
            answer = http.post("/v1/chat/completions", json=body | {"recall": 120 * (number % 3 > 0)}).json()
            return answer["choices"], [source["text"] for source in answer["sources"]]

        alone = [ask(number) for number in range(12)]
        with ThreadPoolExecutor(12) as pool:
            at_once = [*pool.map(ask, range(12))]
    assert at_once == alone
    assert len({json.dumps(choices) for choices, _ in alone}) > 6, "they are all alike"
    for number, (_, sources) in enumerate(at_once):
        assert bool(sources) == (number % 3 > 0)
        assert not any(marks[1 - number % 2] in text for text in sources)
