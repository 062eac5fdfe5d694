"""Documents read in Python: their names, pages and characters in the sources, and one after another."""

import pytest

import ahn
from ahn.errors import DocumentError
from conftest import tiny, with_memory
from tiny_tokenizer import tiny_tokenizer

FILLER = "It was a day like any other day, and nobody said a thing about it. "
SECRET = "The captain hid the compass in a barrel of apples. "
ASKED = "Where did the captain hide the compass?"
OPTIONS = {"recall": 100, "max_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return with_memory(tiny(vocab_size=len(tokenizer), max_position_embeddings=4096), window=360)


def the_source(model, tokenizer, memory, asked=ASKED, word="compass"):
    (source,) = [s for s in ahn.ask(model, tokenizer, memory, asked, **OPTIONS).sources if word in s.text]
    return source


def test_files_are_named(model, tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text(FILLER * 4)
    (tmp_path / "two.txt").write_text(text := FILLER * 3 + SECRET + FILLER * 2)
    memory = ahn.read_documents(model, tokenizer, tmp_path)
    source = the_source(model, tokenizer, memory)
    name = str(tmp_path / "two.txt")
    assert source.document == name and source.page is None
    assert text[source.offset :].startswith(source.text.strip()[:40])
    assert str(source).startswith(f"{name}, character {source.offset:,}: {source.text.strip()[:20]}")
    memory.save(tmp_path / "m.ahn")
    assert the_source(model, tokenizer, tmp_path / "m.ahn") == source


def test_the_ids_are_those_of_open(model, tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text(FILLER * 4)
    memory = ahn.read_documents(model, tokenizer, str(tmp_path / "one.txt"), archive="text")
    assert memory.archive.ids.tolist() == ahn.Dialogue(tokenizer).open(FILLER * 4)[0].tolist()


def test_texts_have_names_and_pages_and_are_appended(model, tokenizer):
    memory = ahn.read_documents(model, tokenizer, {"letter": FILLER * 4})
    pages = [FILLER * 2, SECRET + FILLER, "The old cat sat on the mat. " * 4]
    assert ahn.read_documents(model, tokenizer, {"notes": pages, "end": "The dog has a hat. "}, memory) is memory
    source = the_source(model, tokenizer, memory)
    assert source.document == "notes" and 2 in (source.page, source.last_page)
    assert "".join(pages)[source.offset :].startswith(source.text.strip()[:40])
    assert memory.archive.documents == ["letter", "notes", "end"]
    assert [text["complete"] for text in memory.texts] == [True, True]
    assert the_source(model, tokenizer, memory, "Who has a dog?", "dog has").document == "end"


def test_what_is_there_is_skipped(model, tokenizer, tmp_path, caplog):
    (tmp_path / "one.txt").write_text(FILLER * 4)
    memory = ahn.read_documents(model, tokenizer, tmp_path)
    seen = memory.tokens_seen
    assert ahn.read_documents(model, tokenizer, tmp_path, memory).tokens_seen == seen
    assert "one.txt: skipped" in caplog.text
    with pytest.raises(DocumentError, match="no such file"):
        ahn.read_documents(model, tokenizer, tmp_path / "absent.txt", memory)
    assert memory.tokens_seen == seen and len(memory.texts) == 1
