"""`ahn memories` lists what memory files hold."""

import ahn
from ahn import cli
from conftest import tiny, token_ids, with_memory


def test_lists_what_files_hold(tmp_path, capsys):
    model = with_memory(tiny())
    ahn.read(model, token_ids(60)).save(tmp_path / "plain.ahn")
    cache = ahn.AHNCache(model, "text")
    cache.archive.begin("letters/one.txt")
    ahn.read(model, token_ids(1234), cache).save(tmp_path / "letters.ahn")
    (tmp_path / "broken.ahn").write_bytes(b"junk")
    assert cli.main(["memories", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0].rpartition("/")[2]: line for line in out.splitlines() if ".ahn" in line}
    assert "1,234" in out and "one.txt" in out and "text" in rows["letters.ahn"] and "none" in rows["plain.ahn"]
    assert "broken.ahn" in err and "broken.ahn" not in out


def test_nothing_there(tmp_path, capsys):
    assert cli.main(["memories", str(tmp_path)]) == 0
    assert "ahn read" in capsys.readouterr().err
    assert cli.main(["memories", str(tmp_path / "absent")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
