"""The model of lm-evaluation-harness against lm_eval's own, and in its command line."""

import json
import sys
from importlib.metadata import entry_points

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, an extra")

from ahn import bases
from ahn.config import AHNConfig
from ahn.errors import ConfigError, UnsupportedOperationError
from ahn.eval import harness
from ahn.hf.augment import augment, detach
from tiny_base import SINKS, WINDOW, write_base

LOSSLESS = WINDOW + SINKS
TEXT = "The cat sat. Who sat? The (old) cat. Why? 12 cats: 3 mice! "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = bases.load_base(folder[0], device="cpu"), bases.load_tokenizer(folder[0])
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=512, batch_size=1)


def ours(folder, **more):
    base, adapter = folder
    return harness.AhnLM.create_from_arg_obj(
        {"base": base, "adapter": adapter, "lossless": LOSSLESS, "sinks": SINKS, **more}, {"device": "cpu"}
    )


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


PAIRS = [(TEXT, "The cat"), (TEXT, "Why?"), (TEXT * 6, " mice"), ("", "The old cat"), ("Who sat? ", "12 cats")]


def test_loglikelihood_is_that_of_lm_eval(folder, theirs):
    requests = asked("loglikelihood", *PAIRS)
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours(folder, policy="full").loglikelihood(requests, disable_tqdm=True)
    for (a, greedy), (b, greedy_too) in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4) and greedy == greedy_too


def test_a_greedy_continuation_is_known(folder):
    model = ours(folder)
    ids = model.tok_encode(TEXT * 4)
    answer = model.policy.generate(ids, 3)
    found = model._loglikelihood_tokens([(("", ""), ids, answer), (("", ""), ids, [*answer[:-1], 9])], True)
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("times", [2, 40])  # the second is longer than the positions
def test_rolling_is_that_of_lm_eval(folder, theirs, times):
    requests = asked("loglikelihood_rolling", (TEXT * times,))
    wanted = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours(folder, policy="full").loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(
        wanted, rel=1e-4
    )


def test_rolling_reads_any_length_at_once(folder):
    model = ours(folder)
    (found,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT * 40,)), disable_tqdm=True)
    ids = model.tok_encode(TEXT * 40)
    assert len(ids) > 512
    (losses,) = model.policy.losses([[model.prefix_token_id, *ids]])
    assert found == pytest.approx(-losses.double().sum().item())
    begin = model.loglikelihood(asked("loglikelihood", ("", TEXT * 40)), disable_tqdm=True)[0][0]
    assert found == pytest.approx(begin, rel=1e-5)


def test_generate_until_is_that_of_lm_eval(folder, theirs):
    settings = {"until": ["@@"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", (TEXT, settings), (TEXT * 9, settings))
    wanted = theirs.generate_until(requests, disable_tqdm=True)
    model = ours(folder, policy="full")
    assert model.generate_until(requests, disable_tqdm=True) == wanted
    end = wanted[0][3:5]
    (cut,) = model.generate_until(asked("generate_until", (TEXT, settings | {"until": [end]})), disable_tqdm=True)
    assert cut == wanted[0][: wanted[0].index(end)]


def test_what_is_refused(folder):
    with pytest.raises(UnsupportedOperationError, match="greedily"):
        ours(folder).generate_until(asked("generate_until", (TEXT, {"do_sample": True})))
    with pytest.raises(ConfigError, match="did you mean 'window'"):
        ours(folder, policy="windo")


def test_the_entry_point():
    found = {point.name: point.value for point in entry_points(group="lm_eval.models")}
    if "ahn" not in found:
        pytest.skip("the package is not installed with its entry points")
    module, _, name = found["ahn"].partition(":")
    assert getattr(sys.modules[module], name) is harness.AhnLM


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_command(folder, tmp_path, monkeypatch):
    data = tmp_path / "questions.jsonl"
    rows = [{"question": TEXT * (i + 1), "choices": [" cat", " mice"], "label": i % 2} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.replace("FILE", str(data)))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    base, adapter = folder
    given = f"base={base},adapter={adapter},lossless={LOSSLESS},sinks={SINKS}"
    argv = ["run", "--model", "ahn", "--model_args", given, "--tasks", "tiny_choice", "--device", "cpu"]
    argv += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--batch_size", "1"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *argv])
    threads = torch.get_num_threads()
    harness.main()
    torch.set_num_threads(threads)
    (file,) = (tmp_path / "out").rglob("results*.json")
    assert 0 <= json.loads(file.read_text())["results"]["tiny_choice"]["acc,none"] <= 1


def test_their_wrapper_cuts_nothing_of_an_augmented_model(folder):
    """`HFLM(pretrained=model)` cuts prompts to the longest input that the config names."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = bases.load_base(folder[0], device="cpu"), bases.load_tokenizer(folder[0])
    base = model.config.max_position_embeddings
    augment(model, AHNConfig(None, window=WINDOW, sinks=SINKS))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    text = TEXT * 60
    assert len(tokenizer(text).input_ids) > base < theirs.max_length
    long, lm = asked("loglikelihood_rolling", (text,)), ours(folder, policy="window")
    assert theirs.loglikelihood_rolling(long) == pytest.approx(lm.loglikelihood_rolling(long), rel=1e-4)
    asks = asked("loglikelihood", (text, " mice"))
    for (a, b), (c, d) in zip(theirs.loglikelihood(asks), lm.loglikelihood(asks), strict=True):
        assert (a, b) == (pytest.approx(c, rel=1e-3), d)
    said = asked("generate_until", (text, {"until": ["@@"], "max_gen_toks": 4, "do_sample": False}))
    assert theirs.generate_until(said) == lm.generate_until(said)
    detach(model)
    assert HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).max_length == base
