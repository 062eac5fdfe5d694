"""`ahn serve`: its options, and a server that is killed again and again."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import serving  # noqa: F401 - skips without the extra

httpx = pytest.importorskip("httpx")

ROUNDS = int(os.environ.get("AHN_KILLS", "3"))
TEXT = "The cat sat. Who sat? The old cat. " * 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--folder: required"),
        (
            ["--folder", "FOLDER", "--host", "0.0.0.0"],
            "others can reach it; expected --keys FILE",
        ),
        (["--folder", "FOLDER", "--port", "99999"], "--port 99999"),
        (["--folder", "FOLDER", "--keys", "FOLDER/none"], "--keys"),
        (["--new-key", "anna"], "--new-key anna: goes with --keys FILE"),
        (["--folder", "FOLDER", "--exact", "1MB"], "--exact"),
        (["--folder", "FOLDER", "--base", "FOLDER/none"], "none"),
    ],
)
def test_bad_options_are_told_in_one_line(run, tmp_path, words, message):
    code, out, err = run("serve", *(word.replace("FOLDER", str(tmp_path)) for word in words))
    assert code == 2 and not out and message in err and len(err.splitlines()) == 1


def test_a_folder_has_one_server(run, tmp_path):
    from ahn.files import claimed

    with claimed(tmp_path / "journal.jsonl"):
        code, _, err = run("serve", "--folder", str(tmp_path), "--port", "0")
    assert code == 2 and "another process is writing to it" in err
    assert not list(tmp_path.iterdir())


def test_the_extra_is_named_where_it_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run("serve", "--folder", str(tmp_path))
    assert code == 2 and "needs uvicorn: pip install 'ahn[serve]'" in err


def test_a_new_key_is_printed_once(run, tmp_path):
    code, out, _ = run("serve", "--keys", str(tmp_path / "keys"), "--new-key", "anna")
    assert code == 0 and out.startswith("ahn-") and out.strip() not in (tmp_path / "keys").read_text()


class Process:
    """`ahn serve` in a process of its own."""

    def __init__(self, base, folder):
        command = [sys.executable, "-m", "ahn", "serve", "--base", base, "--folder", str(folder), "--port", "0"]
        self.child = subprocess.Popen([*command, "--window", "192"], stderr=subprocess.PIPE, text=True)
        for line in self.child.stderr:
            if line.startswith("serving "):
                self.address = line.split()[1].removesuffix("/v1")
                return
        raise AssertionError("the server has ended")

    def kill(self):
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()
        self.child.stderr.close()


@pytest.mark.slow
def test_what_was_acknowledged_outlives_a_killed_server(base, tmp_path):
    """Killed in the middle of uploads, readings and appends; with AHN_KILLS=50 fifty times."""
    dice, expected = random.Random(0), dict[str, int]()
    for _ in range(ROUNDS):
        server = Process(base, tmp_path)
        try:
            with httpx.Client(base_url=server.address, timeout=60) as http:
                end = time.monotonic() + dice.uniform(0.1, 0.6)
                while time.monotonic() < end:
                    if expected and dice.random() < 0.5:
                        id = dice.choice([*expected])
                        answer = http.post(f"/v1/memories/{id}/append", json={"text": TEXT})
                    else:
                        answer = http.post("/v1/memories", json={"text": TEXT})
                    assert answer.status_code in (202, 429), answer.text
                    if answer.status_code == 202:
                        expected[answer.json()["id"]] = expected.get(answer.json()["id"], 0) + 1
        finally:
            server.kill()
    server = Process(base, tmp_path)
    try:
        with httpx.Client(base_url=server.address, timeout=60) as http:
            listed = http.get("/v1/memories").json()["data"]
            while any(one["waiting"] and not one["error"] for one in listed):
                time.sleep(0.1)
                listed = http.get("/v1/memories").json()["data"]
    finally:
        server.kill()
    assert {one["id"]: len(one["documents"]) for one in listed} == expected
    tokens = {len(one["documents"]): one["tokens"] for one in listed}
    assert all(one["tokens"] == tokens[len(one["documents"])] for one in listed), "a text was read twice or in part"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_traceback(base, tmp_path, number):
    server = Process(base, tmp_path)
    try:
        answer = httpx.post(f"{server.address}/v1/memories", json={"text": TEXT})
        assert answer.status_code == 202
        server.child.send_signal(number)
        _, rest = server.child.communicate(timeout=60)
        assert "Traceback" not in rest
        assert server.child.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    finally:
        server.kill()
