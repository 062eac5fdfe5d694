"""API keys: each has memories of its own."""

import pytest

from ahn.errors import ConfigError
from serving import server, tiny_model

httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    from ahn.serve.keys import Keys, add_key

    folder = tmp_path_factory.mktemp("keyed")
    mine, yours = (add_key(folder / "keys.txt", name) for name in ("anna", "ben"))
    with server(folder / "memories", tiny_model(), Keys(folder / "keys.txt")) as (address, _):
        yield folder, address, mine, yours


def client(address, key=None):
    return httpx.Client(base_url=address, headers={} if key is None else {"Authorization": f"Bearer {key}"})


def test_without_a_valid_key_nothing_but_health_is_answered(keyed):
    _, address, mine, _ = keyed
    for wrong in (None, "x", "ahn-x", mine[:-1], f"{mine}x", "ä"):
        headers = {} if wrong is None else {"Authorization": f"Bearer {wrong}".encode()}
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/memories")):
            answer = httpx.request(method, f"{address}{path}", headers=headers, json={} if method == "POST" else None)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{address}/health").status_code == 200


def test_no_other_key_can_see_or_ask_a_memory(keyed):
    folder, address, mine, yours = keyed
    with client(address, mine) as http, client(address, yours) as other:
        id = http.post("/v1/memories", json={"text": "A cat."}).json()["id"]
        while http.get(f"/v1/memories/{id}").json()["waiting"]:
            pass
        assert len(http.get("/v1/models").json()["data"]) == 2
        assert len(other.get("/v1/models").json()["data"]) == 1
        assert other.get("/v1/memories").json()["data"] == []
        body = {"model": f"ahn:{id}", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert other.post("/v1/chat/completions", json=body).status_code == 404
        paths = [("GET", ""), ("DELETE", ""), ("GET", "/content"), ("PUT", "/content"), ("POST", "/append")]
        for method, path in [*paths, ("POST", "/fork")]:
            options = {"json": {}} if path == "/fork" else {}
            assert other.request(method, f"/v1/memories/{id}{path}", **options).status_code == 404
        assert other.get(f"/v1/memories/..%2fanna%2f{id}").status_code == 404
    text = (folder / "keys.txt").read_text()
    assert mine not in text and yours not in text


@pytest.mark.parametrize("text", ["", "anna", "anna short", f"../x {'0' * 64}", f"a {'0' * 64}\na {'0' * 64}"])
def test_bad_files_of_keys_are_refused(tmp_path, text):
    from ahn.serve.keys import Keys

    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match="--keys"):
        Keys(tmp_path / "keys")


def test_a_name_has_one_key(tmp_path):
    from ahn.serve.keys import add_key

    add_key(tmp_path / "keys", "anna")
    for name in ("anna", "../x", ""):
        with pytest.raises(ConfigError, match="--new-key"):
            add_key(tmp_path / "keys", name)


def test_a_page_of_another_site_gets_nothing(tmp_path):
    with server(tmp_path) as (address, _):
        assert httpx.get(f"{address}/v1/models", headers={"Origin": address}).status_code == 200
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example:80"}):
            answer = httpx.post(f"{address}/v1/memories", headers=headers, files={"file": ("x", b"y")})
            assert answer.status_code == 403, headers
