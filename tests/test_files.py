"""Files are written whole or not at all, and only where a regular file is or can be."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ahn import files
from ahn.errors import OutputError


def write(path: Path, text: str = "new") -> None:
    with files.atomic(path) as temporary:
        temporary.write_text(text)


def both(path: Path) -> list[str]:
    """What is said before the work and after it."""
    said = []
    for step in (files.check_writable, write):
        with pytest.raises(OutputError) as refused:
            step(path)
        said.append(str(refused.value))
    return said


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file, link, chain = tmp_path / "there" / "book.ahn", tmp_path / "link.ahn", tmp_path / "chain.ahn"
    link.symlink_to(Path("there") / "book.ahn")
    chain.symlink_to(link)
    for text in ("made", "replaced"):  # the file behind does not exist at first
        files.check_writable(chain)
        write(chain, text)
        assert link.is_symlink() and chain.is_symlink()
        assert file.read_text() == text
    assert [path.name for path in file.parent.iterdir()] == ["book.ahn"]


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path) -> None:
    pipe, folder, place = tmp_path / "pipe", tmp_path / "folder", tmp_path / "s"
    os.mkfifo(pipe)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(place))
        for path, kind in ((pipe, "pipe"), (folder, "folder"), (place, "socket")):
            link = tmp_path / f"link-{kind}"
            link.symlink_to(path)
            for name in (path, link):
                before = os.lstat(name)
                assert all(f"{name}: is a {kind}; expected a file name" in said for said in both(name))
                assert os.lstat(name) == before


def test_a_read_only_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.ahn"
    path.write_text("earlier")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda file, mode: not (Path(file) == path and mode & os.W_OK))  # root may write
    assert all("is read-only" in said for said in both(path))
    assert path.read_text() == "earlier"


@pytest.mark.parametrize("name", ["none/book.ahn", "a\0b", "x" * 300, "loop"])
def test_a_name_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="no folder|cannot be written"):
        write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("name", ["a\nb.ahn", "a\x1b[31m.ahn", "a\u2028b.ahn"])
def test_a_name_with_control_characters(tmp_path: Path, name: str) -> None:
    for said in both(tmp_path / name):
        assert "the name has control characters" in said and said.isprintable()
    write(tmp_path / "a\u3000b \u200d.ahn")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_takes_no_file_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match=r"-o .*book\.ahn: cannot be written: Read-only file system"):
        files.check_writable(tmp_path / "book.ahn")


def test_a_failure_keeps_the_earlier_file_and_its_permissions_last(tmp_path: Path) -> None:
    path = tmp_path / "book.ahn"
    path.write_text("earlier")
    path.chmod(0o640)
    for stop, raised in ((OSError(28, "No space left"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(raised), files.atomic(path):
            raise stop
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
    write(path)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from ahn import files
folder = Path(sys.argv[1])
with files.scratch(folder) as unfinished, files.atomic(folder / "book.ahn") as temporary:
    (unfinished / "half").write_text("half")
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2
    living = tmp_path / f".ahn-{files._HOST}-{os.getppid()}-00000000"
    elsewhere = tmp_path / left[0].name.replace(files._HOST, "0" * 8)
    others = [living, elsewhere, tmp_path / f".ahn-{files._HOST}-notes", tmp_path / ".book.ahn.x"]
    for path in others:
        path.write_text("of another")
    write(tmp_path / "book.ahn")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "book.ahn"])


def test_two_writers_in_one_process_do_not_meet(tmp_path: Path) -> None:
    with files.atomic(tmp_path / "a") as first, files.atomic(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"


def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    path, plain = tmp_path / "new", tmp_path / "plain"
    plain.touch()
    with files.atomic(path) as temporary:
        temporary.unlink()
        temporary.touch(0o600)  # as safetensors does
    assert path.stat().st_mode == plain.stat().st_mode
