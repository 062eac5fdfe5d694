"""/v1/responses: conversations that the server keeps; and the metrics."""

import json

import pytest
import torch

import ahn
from ahn.dialogue import Dialogue
from ahn.engine.prefill import read
from ahn.tokens import digest
from serving import NAME, server, tiny_model

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

TEXT = "The cat sat. Who sat? The old cat. " * 40


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def memory(model):
    model, tokenizer = model
    found = ahn.AHNCache(model, "text")
    found.archive.tokenizer = digest(tokenizer)
    found.archive.begin("cats.txt", 0)
    return ahn.read(model, Dialogue.of(tokenizer).open(TEXT), found)


@pytest.fixture(scope="module")
def served(model, memory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memories")
    memory.save(folder / "cats.ahn")
    with server(folder, model) as (address, state):
        yield address, state


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("recall", [0, 120])
def test_a_conversation_goes_on_from_a_response_as_a_chat(client, model, memory, recall):
    options = {"max_output_tokens": 6, "extra_body": {"recall": recall}}
    first = client.responses.create(model="ahn:cats", input="Who sat?", **options)
    second = client.responses.create(input="Why?", previous_response_id=first.id, **options)
    assert bool(first.sources) == bool(recall)
    expected = conversation(model, memory, first, recall)
    assert second.output_text == expected


def conversation(model, memory, first, recall):
    """The second answer, of `ahn chat`."""
    from ahn.engine.generate import generate
    from ahn.recall import Recall, as_text, search

    model, tokenizer = model
    dialogue, fork = Dialogue.of(tokenizer), memory.fork()
    asked = ahn.ask(model, tokenizer, memory, "Who sat?", recall, max_new_tokens=6)
    assert asked.text == first.output_text.strip()
    answer = asked.ids.tolist()
    read(model, torch.cat([dialogue.question("Who sat?"), torch.tensor([answer])], 1), fork)
    found = search(model, tokenizer, fork, "Why?", Recall(recall), lambda text, passages: turn(text, passages))

    def turn(text, passages):
        return dialogue.turn(text, answer, passages)

    ids = turn("Why?", as_text(found.sources))
    fork.set_archive(None)
    new = generate(model, ids, fork, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_each_response_is_a_fork(client):
    first = client.responses.create(model=NAME, input="Who sat?", max_output_tokens=6)
    one, two = (
        client.responses.create(input="Why?", previous_response_id=first.id, max_output_tokens=6) for _ in range(2)
    )
    assert one.output_text == two.output_text and one.id != two.id
    assert one.usage.input_tokens_details.cached_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="not kept"):
        client.responses.create(input="Why?", previous_response_id=first.id)


def test_events_make_up_the_whole_response(client):
    options = {"model": "ahn:cats", "input": [{"role": "user", "content": "Who sat?"}], "max_output_tokens": 6}
    whole = client.responses.create(**options, instructions="Be short.")
    events = [*client.responses.create(**options, instructions="Be short.", stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].type == "response.incomplete" and events[-1].response.usage == whole.usage


def test_what_is_not_stored_is_not_kept(client):
    answer = client.responses.create(model=NAME, input="Who sat?", max_output_tokens=2, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model: expected one of"),
        ({"tools": []}, "unknown field 'tools'"),
        ({"input": []}, "input"),
        ({"previous_response_id": "resp_x"}, "not kept"),
    ],
)
def test_bad_fields_are_refused_by_name(served, change, message):
    body = {"model": NAME, "input": "x"} | change
    answer = httpx.post(
        f"{served[0]}/v1/responses", json={key: value for key, value in body.items() if value is not None}
    )
    assert answer.status_code in (400, 404) and message in answer.json()["error"]["message"]


def test_lone_surrogates_are_read_as_others_are(served):
    lone = "\ud800"
    body = {"model": NAME, "input": [{"role": "user", "content": [{"type": "input_text", "text": f"x{lone}"}]}]}
    body |= {"instructions": lone, "metadata": {lone: lone}, "stop": [lone], "max_output_tokens": 1}
    answer = httpx.post(
        f"{served[0]}/v1/responses", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200 and answer.json()["instructions"] == "\ufffd"


def test_only_so_many_bytes_are_kept(model, tmp_path):
    with server(tmp_path, model, kept=1) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        first, second = (client.responses.create(model=NAME, input="x", max_output_tokens=1) for _ in range(2))
        client.responses.retrieve(second.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)


def test_metrics_count_requests_and_tokens(model, tmp_path):
    with server(tmp_path, model) as (address, state):
        body = {"model": NAME, "prompt": "The cat", "max_tokens": 3}
        httpx.post(f"{address}/v1/completions", json=body)
        httpx.get(f"{address}/v1/memories/none")
        httpx.get(f"{address}/nothing")
        text = httpx.get(f"{address}/metrics").text
        assert 'ahn_requests_total{method="POST",path="/v1/completions",status="200"} 1.0' in text
        assert 'path="/v1/memories/{id}",status="404"' in text and 'path="other",status="404"' in text
        assert f"ahn_generated_tokens_total {state.engine.load.tokens_generated}.0" in text
        assert "ahn_engine_alive 1.0" in text
