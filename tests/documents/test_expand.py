import os
import stat
from pathlib import Path

import pytest
from made import pdf

import ahn.documents
from ahn.documents import check, expand, read_document, source
from ahn.errors import DocumentError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("10.txt", "2.txt", "b/1.md", ".hidden.txt", ".git/config", "b/.x/y.txt", "README", "main.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "b" / "a.pdf").write_bytes(pdf("text"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def names(found: list[Path | str], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() if isinstance(path, Path) else path for path in found]


def test_a_folder_is_its_documents(folder: Path) -> None:
    assert names(expand([folder]), folder) == ["2.txt", "10.txt", "b/1.md", "b/a.pdf", "main.py", "README"]


def test_patterns_files_and_standard_input_in_the_order_given(folder: Path) -> None:
    found = expand([str(folder / "*.txt"), "-", folder / "main.py", str(folder / "**" / "*.md")])
    assert names(found, folder) == ["2.txt", "10.txt", "-", "main.py", "b/1.md"]
    assert names(expand([str(folder / "b*")]), folder) == ["b/1.md", "b/a.pdf"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "what[1]?.txt"
    path.write_text("text")
    assert expand([path]) == [path]


def test_a_file_named_outright_is_taken_as_it_is(folder: Path) -> None:
    assert expand([folder / "picture.png"]) == [folder / "picture.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_and_linked_folders_in_a_folder_are_left_out(folder: Path) -> None:
    before = expand([folder])
    os.mkfifo(folder / "pipe.txt")
    (folder / "again").symlink_to(folder)
    (folder / "gone.txt").symlink_to(folder / "nothing")
    assert expand([folder]) == before
    assert expand([folder / "pipe.txt"]) == [folder / "pipe.txt"]


def test_what_is_no_file_and_no_pipe_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "a.txt"
    os.mkfifo(pipe)
    check(pipe)
    monkeypatch.setattr(source, "_KINDS", ((stat.S_ISFIFO, "device"),))  # in the place of a real one
    for door in (check, read_document):
        with pytest.raises(DocumentError, match=r"a\.txt: is a device; expected text"):
            door(pipe)


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in [
        (tmp_path / "a.txt", "no such file"),
        ("", "no such file"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        (tmp_path, "no documents there"),
        (str(tmp_path / "*.txt"), "no documents there"),
    ]:
        with pytest.raises(DocumentError, match=said) as error:
            expand([name])
        assert "\n" not in str(error.value)
    with pytest.raises(DocumentError, match="named twice"):
        expand(["-", "-"])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    monkeypatch.setattr(ahn.documents, "MAX_DOCUMENTS", 1)
    with pytest.raises(DocumentError, match="more than 1 documents"):
        expand([tmp_path])


def test_messages_can_be_printed(tmp_path: Path) -> None:
    for name in ("a\ud800b", "a\nb", "a\x1b[2Jb"):
        with pytest.raises(DocumentError) as error:
            read_document(tmp_path / name)
        str(error.value).encode("utf-8")
        assert str(error.value).isprintable()


def test_a_new_format_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "shout.py").write_text(
        "from ahn.documents.base import Format, Piece\n"
        "class Shout(Format):\n"
        "    name, title, suffixes, max_bytes, isolated = 'shout', 'SHOUT', ('.shout',), 9, False\n"
        "    def marks(self, head): return head.startswith(b'SHOUT')\n"
        "    def read(self, file, name): yield Piece(file.read(9).decode().upper(), 1)\n"
    )
    monkeypatch.setattr(ahn, "__path__", [*ahn.__path__, str(tmp_path)])  # where formats are looked for
    monkeypatch.setattr(ahn.documents, "__path__", [*ahn.documents.__path__, str(folder)])  # where they are imported
    for name in ("a.shout", "b"):
        (tmp_path / name).write_text("SHOUT it")
        assert read_document(tmp_path / name) == "SHOUT IT"
