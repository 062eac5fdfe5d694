"""`ahn memories` lists what memory files hold."""

import re

import numpy as np
import pytest

import ahn
from ahn import cli
from ahn.memory import segments
from ahn.memory.archive import KEY_BYTES, PLACE_BYTES, TOKEN_BYTES
from conftest import retrieval, tiny, token_ids, with_memory


def test_lists_what_files_hold(tmp_path, capsys):
    model = with_memory(tiny())
    ahn.read(model, token_ids(60)).save(tmp_path / "plain.ahn")
    cache = ahn.AHNCache(model, "text")
    cache.archive.begin("letters/one.txt")
    ahn.read(model, token_ids(1234), cache).save(tmp_path / "letters.ahn")
    (tmp_path / "broken.ahn").write_bytes(b"junk")
    assert cli.main(["memories", str(tmp_path)]) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    rows = {line.split()[0].rpartition("/")[2]: line for line in out.splitlines() if ".ahn" in line}
    assert "1,234" in out and "one.txt" in out and "text" in rows["letters.ahn"] and "none" in rows["plain.ahn"]
    assert "damaged: not a memory file" in rows["broken.ahn"] and "damaged" not in rows["letters.ahn"]
    assert err == "ahn memories: error: 1 of 3 memory files is damaged\n"


def _cut(data, start):
    return data[:-9]


def _header(data, start):
    return data.replace(b'\\"batch\\": 1', b'\\"batch\\": x', 1)


def _sizes(data, start):
    return data.replace(b'"dtype":"I32"', b'"dtype":"I64"', 1)


def _parts(data, start):
    return data.replace(b'\\"parts\\": [[0', b'\\"parts\\": [[8', 1)


def _flipped(data, start):
    return data[: start + 9] + bytes([data[start + 9] ^ 1]) + data[start + 10 :]


@pytest.mark.parametrize("harm", [_cut, _header, _sizes, _parts, _flipped])
@pytest.mark.parametrize("part", [0, -1])
def test_damage_is_listed(tmp_path, capsys, harm, part):
    """Of the archive and of the memory. Bytes within a tensor are compared with --checksums only."""
    path = tmp_path / "m.ahn"
    ahn.read(with_memory(tiny()), token_ids(60), archive="text").save(path)
    assert cli.main(["memories", "--checksums", str(path)]) == 0
    data, start = path.read_bytes(), segments.walk(path)[part].data
    path.write_bytes(harm(data, start))
    assert path.read_bytes() != data
    capsys.readouterr()
    options = ["--checksums"] if harm is _flipped else []
    assert cli.main(["memories", str(path)]) == (0 if options else cli.BAD_INPUT)
    assert ("damaged" in capsys.readouterr().out) == (not options)
    assert cli.main(["memories", *options, str(path)]) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert "damaged: " in out and err.endswith("1 of 1 memory file is damaged\n")


def test_nothing_there(tmp_path, capsys):
    assert cli.main(["memories", str(tmp_path)]) == 0
    assert "ahn read" in capsys.readouterr().err
    assert cli.main(["memories", str(tmp_path / "absent")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "keys"])
def test_inspect_states_the_archive(tmp_path, capsys, kind):
    """Of a memory without a store, documents and bytes apart from the constant part; `ahn memories` agrees."""
    model, path = with_memory(tiny()), tmp_path / "m.ahn"
    model.ahn_retrieval = retrieval()
    cache = ahn.AHNCache(model, kind)
    for name, tokens, page in (("one.txt", 200, None), ("two.pdf", 300, 7)):
        cache.archive.begin(name)
        cache.archive.locate(cache.tokens_seen, np.arange(tokens // 2), page)
        cache.archive.locate(cache.tokens_seen + tokens // 2, np.arange(tokens // 2), page and page + 1)
        ahn.read(model, token_ids(tokens), cache)
        cache.save(path)
    assert cli.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "read     500 tokens" in out and "4 sinks + 16 window" in out
    assert "memory   " + _size(cache.nbytes + cache.last_logits.nbytes) in out
    assert f"ids {_size(500 * TOKEN_BYTES)}, places " in out
    assert re.search(r"^ +200 tokens  one.txt\n +300 tokens, 2 pages  two.pdf$", out, re.MULTILINE)
    keys = 500 * 3 * 8  # three key/value heads of 8 numbers
    assert (f"keys {_size(keys)} (key/value heads: 1 of layer 0, 2 of layer 1)" in out) == (kind == "keys")
    total = re.search(r"archive  (\S+ \S+) for 500 tokens", out)[1]
    assert cli.main(["memories", str(path)]) == 0
    assert f"{kind}, {total}" in capsys.readouterr().out


def test_inspect_without_an_archive_and_of_a_damaged_one(tmp_path, capsys):
    model, path = with_memory(tiny()), tmp_path / "m.ahn"
    ahn.read(model, token_ids(60)).save(path)
    assert cli.main(["inspect", str(path)]) == 0
    assert "archive  none" in capsys.readouterr().out
    ahn.read(model, token_ids(60), archive="text").save(path)
    data = bytearray(path.read_bytes())
    data[data.find(np.array(token_ids(8)[0].tolist(), np.int32).tobytes())] ^= 1
    path.write_bytes(data)
    assert cli.main(["inspect", str(path)]) == 2
    assert "damaged archive: its checksum does not match" in capsys.readouterr().err


def test_cost_counts_what_a_file_holds(tmp_path, capsys):
    """On texts that are read in documents: 4 bytes a token, and a place for each 64."""
    assert cli.main(["cost", "--base", "qwen2.5-3b", "--length", "128000"]) == 0
    out = capsys.readouterr().out
    text = 128_000 * TOKEN_BYTES + 2000 * PLACE_BYTES
    assert re.search(rf"  text +4L \+ 32L / 64 +- +{text / 1e6:,.3f} M", out)
    assert f"{(text + 128_000 * KEY_BYTES) / 1e6:,.3f} M" in out


def _size(count):
    from ahn.cli._console import size

    return size(count)
