import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from made import pdf

from ahn.documents import isolate, pieces, read_document
from ahn.errors import DocumentError


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "a.html"
    path.write_bytes(b"<p>text")
    return path


def test_too_long_also_in_a_thread(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(isolate, "_START", "import time; time.sleep(600)")
    with ThreadPoolExecutor() as pool, pytest.raises(DocumentError, match="took more than 0.5 seconds"):
        pool.submit(read_document, page).result()


def test_too_much_memory(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("memory is limited on Linux only")
    page.write_bytes(b"<html>" + b"<p>x" * 7_000_000)
    monkeypatch.setattr(isolate, "MAX_MEMORY", 300 * 2**20)
    with pytest.raises(DocumentError, match="needs more than 314,572,800 bytes of memory"):
        read_document(page)


def test_a_crash(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "_START", "import os; os._exit(7)")
    with pytest.raises(DocumentError, match="a.html: a damaged HTML .its parser ended with status 7."):
        read_document(page)


def test_no_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(*(f"Page {n}." for n in range(50))))
    found = pieces(path)
    assert next(found).text == "Page 0.\n"
    found.close()
    assert len(started) == 1 and started[0].poll() is not None


def test_threads_get_their_own_text(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.html" for n in range(8)]
    for path in paths:
        path.write_text(f"<p>{path.name}")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read_document, paths)) == [f"{path.name}\n" for path in paths]
