"""Memories over HTTP: made, appended to, taken out and in, deleted; and after a restart."""

import json
import time

import pytest

import ahn
from ahn.dialogue import Dialogue
from serving import NAME, server, tiny_model

httpx = pytest.importorskip("httpx")

TEXT = "The cat sat. Who sat? The old cat. " * 40


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("memories")


@pytest.fixture(scope="module")
def http(model, folder):
    with server(folder, model, memories=20) as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        yield client


def settled(http, id):
    while (found := http.get(f"/v1/memories/{id}").json())["waiting"] and not found["error"]:
        time.sleep(0.02)
    return found


def made(http, **options):
    answer = http.post("/v1/memories", **options)
    assert answer.status_code == 202, answer.text
    found = settled(http, answer.json()["id"])
    assert found["status"] == "ready", found
    return found


def ask(http, id, **options):
    body = {"model": f"ahn:{id}", "messages": [{"role": "user", "content": "Who sat?"}], "max_tokens": 8} | options
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_memory_of_a_text_is_that_of_ahn_read(http, model):
    found = made(http, json={"text": TEXT, "name": "Cats"})
    model, tokenizer = model
    expected = ahn.read(model, Dialogue.of(tokenizer).open(TEXT), ahn.AHNCache(model))
    assert found["tokens"] == expected.tokens_seen and found["name"] == "Cats" and found["documents"] == ["Cats"]
    answer = ask(http, found["id"])["choices"][0]["message"]["content"]
    assert answer.strip() == ahn.ask(model, tokenizer, expected, "Who sat?", 0, max_new_tokens=8).text
    assert f"ahn:{found['id']}" in [model["id"] for model in http.get("/v1/models").json()["data"]]


def test_sources_name_documents_and_places(http):
    files = [("file", ("../etc/one.txt", "A cat. " * 20)), ("file", ("two.html", "<html><p>Old mice sat.</p></html>"))]
    found = made(http, files=files, data={"name": "both"})
    assert found["documents"] == ["one.txt", "two.html"]
    sources = ask(http, found["id"], recall=120, messages=[{"role": "user", "content": "mice?"}])["sources"]
    (mice,) = [source for source in sources if source["document"] == "two.html"]
    assert mice["text"].strip() == "Old mice sat." and mice["offset"] == 0


def test_what_is_appended_is_read_behind(http, model):
    found = made(http, json={"text": "A cat sat."})
    key = {"Idempotency-Key": "once"}
    for _ in range(2):
        answer = http.post(f"/v1/memories/{found['id']}/append", json={"text": "An old mouse."}, headers=key)
        assert answer.status_code == 202
        more = settled(http, found["id"])
    dialogue = Dialogue.of(model[1])
    added = sum(len(part.ids) for part in dialogue.stream_more(["An old mouse."]))
    assert more["tokens"] == found["tokens"] + added
    assert more["documents"] == ["text", "text"]


def test_a_key_makes_a_memory_once(http):
    first, second = (
        http.post("/v1/memories", json={"text": "A cat."}, headers={"Idempotency-Key": "make"}).json()["id"]
        for _ in range(2)
    )
    assert first == second


def test_a_memory_goes_out_and_comes_in(http):
    found = made(http, json={"text": TEXT})
    other = made(http, json={"text": "Mice."})
    file = http.get(f"/v1/memories/{found['id']}/content").content
    answer = http.post("/v1/memories", files={"content": ("x", file)}, data={"name": "copy"})
    assert answer.status_code == 201
    put = http.put(f"/v1/memories/{other['id']}/content", content=file)
    fork = http.post(f"/v1/memories/{found['id']}/fork", json={})
    assert (put.status_code, fork.status_code) == (200, 201)
    first = ask(http, found["id"])["choices"]
    for id in (answer.json()["id"], other["id"], fork.json()["id"]):
        assert ask(http, id)["choices"] == first
    bad = http.put(f"/v1/memories/{other['id']}/content", content=file[:-7] + b"garbage")
    assert bad.status_code == 400 and "/" not in bad.json()["error"]["message"].replace(str(other["id"]), "")
    assert ask(http, other["id"])["choices"] == first


def test_a_deleted_memory_is_gone(http, folder):
    found = made(http, json={"text": "A cat."})
    assert http.delete(f"/v1/memories/{found['id']}").json()["deleted"]
    assert http.get(f"/v1/memories/{found['id']}").status_code == 404
    assert not (folder / f"{found['id']}.ahn").exists()
    body = {"model": f"ahn:{found['id']}", "messages": [{"role": "user", "content": "x"}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 404


def test_a_document_that_cannot_be_read_fails_by_its_name(http):
    id = http.post("/v1/memories", files={"file": ("report.pdf", b"%PDF-1.4 nothing")}).json()["id"]
    found = settled(http, id)
    assert found["status"] == "failed" and found["error"].startswith("report.pdf: ")
    assert f"ahn:{id}" not in http.get("/v1/models").text


BAD = [
    ({"json": {"text": ""}}, "text"),
    ({"json": {"text": " "}}, "text"),
    ({"json": {"text": "x", "path": "/etc/passwd"}}, "unknown field 'path'"),
    ({"json": {}}, "text"),
    ({"content": b"{", "headers": {"Content-Type": "application/json"}}, "JSON"),
    ({"files": {"other": ("x", b"y")}}, "unknown field 'other'"),
    ({"data": {"name": "x"}, "files": {"file": ("x", b"y"), "content": ("x", b"y")}}, "content"),
    ({"files": {"content": ("x", b"no memory")}}, "not a memory file"),
    ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, ""),
    ({"files": [("file", ("x", b"y"))] * 102}, ""),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=range(len(BAD)))
def test_bad_uploads_leave_nothing(http, folder, options, message):
    before = sorted(folder.rglob("*"))
    answer = http.post("/v1/memories", **options)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("id", ["none", "..", "%2e%2e%2fx", ".uploads", "a" * 300, "x%00y"])
def test_no_name_leads_elsewhere(http, folder, id):
    (folder.parent / "x.ahn").write_bytes(b"secret")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("PUT", "/content"), ("POST", "/append")):
        assert http.request(method, f"/v1/memories/{id}{path}").status_code in (404, 405)


def test_there_are_at_most_so_many(model, tmp_path):
    with server(tmp_path, model, memories=1) as (address, _), httpx.Client(base_url=address) as http:
        made(http, json={"text": "A cat."})
        assert http.post("/v1/memories", json={"text": "A cat."}).status_code == 429


def test_what_was_acknowledged_is_read_after_a_restart(model, tmp_path):
    from ahn.serve.library import Document, Library
    from ahn.serve.settings import Limits

    library = Library(tmp_path, Limits())
    entries = []
    for number in range(2):
        path = library.new_file("").with_suffix(".plain")
        path.write_text("A cat sat.")
        entries.append(library.read([Document("cats", path.name)], None, f"n{number}"))
    (library.uploads / "stray").write_text("not acknowledged")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"do": "delete", "mem')  # cut off
    with server(tmp_path, model) as (address, _), httpx.Client(base_url=address) as http:
        found = [settled(http, entry.id) for entry in entries]
        assert [one["status"] for one in found] == ["ready"] * 2 and [one["name"] for one in found] == ["n0", "n1"]
    assert not list(library.uploads.iterdir())
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["do"] for line in lines] == ["read", "read", "done", "done"]


def test_a_text_is_not_read_twice_after_a_crash_between_file_and_journal(model, tmp_path):
    with server(tmp_path, model) as (address, _), httpx.Client(base_url=address) as http:
        found = made(http, json={"text": "A cat sat."})
    journal = tmp_path / "journal.jsonl"
    first, _ = journal.read_text().splitlines()
    journal.write_text(f"{first}\n")
    with server(tmp_path, model) as (address, _), httpx.Client(base_url=address) as http:
        assert settled(http, found["id"])["tokens"] == found["tokens"]


def test_the_base_is_named(http):
    assert http.get("/v1/models").json()["data"][0]["id"] == NAME


def test_a_long_journal_is_shortened_at_the_start(model, tmp_path, monkeypatch):
    from ahn.serve import library
    from ahn.serve.library import Document, Library
    from ahn.serve.settings import Limits

    kept = Library(tmp_path, Limits())
    entries = []
    for number in range(3):
        path = kept.new_file("")
        path.write_text("A cat sat.")
        entries.append(kept.read([Document("cats", path.name)], None, f"n{number}", key=f"k{number}"))
    kept.done(entries[0], entries[0].tasks[0], "damaged")
    kept.delete(entries[1])
    monkeypatch.setattr(library, "KEPT_LINES", 0)
    short, again = Library(tmp_path, Limits()), Library(tmp_path, Limits())
    assert len(short._journal.lines) == 3
    for one in (short, again):
        assert [
            (entry.id, entry.name, entry.error) for entry in sorted(one.entries(), key=lambda entry: entry.name)
        ] == [
            (entries[0].id, "n0", "damaged"),
            (entries[2].id, "n2", None),
        ]
        assert [task.id for entry in one.pending for task in entry.tasks] == [entries[2].tasks[0].id]
        assert one.read([], None, key="k2").id == entries[2].id


def test_a_full_disk_is_told_and_loses_nothing(http, folder, monkeypatch):
    import errno

    from ahn.serve import journal, uploads

    found = made(http, json={"text": "A cat sat."})
    before = sorted(folder.rglob("*")), (folder / "journal.jsonl").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in ((uploads, "_settle"), (journal.os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            for path in ("/v1/memories", f"/v1/memories/{found['id']}/append"):
                for options in ({"json": {"text": "x"}}, {"files": {"file": ("x", b"y")}}):
                    assert http.post(path, **options).status_code == 507
        assert (sorted(folder.rglob("*")), (folder / "journal.jsonl").read_bytes()) == before
    assert ask(http, found["id"])["choices"]


def test_a_memory_that_is_not_read_yet_is_said_to_be(http):
    id = http.post("/v1/memories", files={"file": ("report.pdf", b"%PDF-1.4 nothing")}).json()["id"]
    settled(http, id)
    body = {"model": f"ahn:{id}", "messages": [{"role": "user", "content": "x"}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 409
