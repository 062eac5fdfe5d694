"""Choosing retrieval heads."""

import json

import pytest
import torch

import ahn
from ahn import cli
from ahn.adapter_files import read_adapter
from ahn.errors import ConfigError
from ahn.eval.prompts import encode
from ahn.eval.tasks import get
from ahn.train.heads import best_heads, choose_heads, few_texts
from made_articles import FILLER, NAMES, article
from tiny_base import write_base


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("squad") / "squad-train.jsonl"
    records = [{"title": str(i), "paragraphs": [article(f"{word}{i}") for word in NAMES]} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), positions=4096)[0]


def questions(data, base, count=8):
    tokenizer = ahn.load_tokenizer(base)
    examples = get("qa/squad").examples(tokenizer=tokenizer, length=1200, data=data, seed=0, limit=None)
    return tokenizer, [(encode(tokenizer, one), one) for one in few_texts(examples, count, 4, 0)]


def test_questions_of_few_texts(data, base):
    _, work = questions(data, base, 6)
    texts = [one.prompt[: one.asks] for _, one in work]
    assert len(work) == 6 and len(set(texts)) == 2 and texts == sorted(texts, key=texts.index)


def test_a_head_that_sees_the_evidence_is_chosen(data, base, monkeypatch):
    """The share of one head is made 1: it comes first, and its scales cover every key."""
    from ahn.train import heads

    tokenizer, work = questions(data, base)
    model = ahn.from_pretrained(base, "none", window=64, sinks=8, device="cpu")
    real = heads._share

    def favoured(*args):
        found = real(*args)
        found[1, 2] = 1.0
        return found

    monkeypatch.setattr(heads, "_share", favoured)
    done = []
    found = choose_heads(model, tokenizer, work, 8, lambda count, total: done.append((count, total)))
    assert found.heads[0] == (1, 2) and found.kept(1) == [1] and found.bytes_per_token == 8
    assert done[-1] == (len(work), len(work))
    model.ahn_retrieval = found
    cache = ahn.read(model, ahn.Dialogue(tokenizer).open(FILLER * 20), archive="keys")
    assert (cache.archive.keys.of(1).abs() < 127).float().mean() > 0.95


def test_best_heads_share_a_budget():
    share = torch.tensor([[0.9, 0.8, 0.1, 0.7], [0.0, 0.2, 0.6, 0.85]])
    assert best_heads(share, 2, 1) == [(0, 0), (0, 1)]
    assert best_heads(share, 2, 2) == [(0, 0), (1, 3), (0, 1), (1, 2)]


def test_refused(data, base):
    tokenizer, work = questions(data, base)
    model = ahn.from_pretrained(base, "none", window=64, sinks=8, device="cpu")
    with pytest.raises(ConfigError, match="budget=4: expected at least the 8 bytes"):
        choose_heads(model, tokenizer, work, 4)
    ahn.detach(model)
    ahn.augment(model, ahn.AHNConfig(None, 2000, 8))
    with pytest.raises(ConfigError, match="none has evidence behind the window"):
        choose_heads(model, tokenizer, work)


def test_command(data, base, tmp_path, capsys):
    options = ["--length", "1200", "--lossless", "128", "--questions", "4", "--bytes", "16", "--device", "cpu"]
    assert cli.main(["heads", "--base", base, "--data", str(data), "-o", str(tmp_path / "heads"), *options]) == 0
    assert "bytes a token" in capsys.readouterr().err
    adapter = read_adapter(tmp_path / "heads")
    assert adapter.config.cell is None and adapter.retrieval is not None
    model = ahn.from_pretrained(base, tmp_path / "heads", window=64, sinks=8, device="cpu")
    assert model.ahn_retrieval.to_dict() == adapter.retrieval.to_dict()
    assert cli.main(["heads", "--base", base, "--data", str(tmp_path / "absent"), "-o", str(tmp_path / "x")]) == 2
