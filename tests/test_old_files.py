"""Files written by the code of commit 0bff525 (tests/golden/0bff525, made by its make.py) are read as they were."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ahn
from ahn import bases
from ahn.cli import main
from ahn.compat import PAST
from ahn.config import AHNConfig
from ahn.memory import file_format
from ahn.train import checkpoints, recipe
from conftest import GOLDEN, in_pieces, token_ids

OLD = GOLDEN / "0bff525"
FORMS = sorted(path.stem.removesuffix("-1") for path in OLD.glob("*-1.ahn"))


def model_of(form, rows):
    """The base with the adapter of a form, or, as one of them has none, with the window of its memory file."""
    if form == "window":
        config = AHNConfig.from_dict(file_format.peek(OLD / f"{form}-{rows}.ahn")["config"])
        return ahn.augment(bases.load_base(str(OLD / "base"), device="cpu"), config)
    return ahn.from_pretrained(str(OLD / "base"), str(OLD / form), device="cpu")


def text_of(rows):
    ids = token_ids(65, batch=rows)
    mask = torch.ones_like(ids)
    mask[1:, :11] = 0
    return ids, mask


def test_every_form_is_there():
    assert FORMS == ["layers", "maps", "paper", "store", "wide", "window"]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_adapters_and_memory_files(form, rows):
    """A memory goes on with the logits that it had then, and so does one that is read today."""
    model, (ids, mask) = model_of(form, rows), text_of(rows)
    expected = load_file(OLD / f"{form}-{rows}.safetensors")["logits"]
    cache = ahn.AHNCache.load(OLD / f"{form}-{rows}.ahn", model)
    assert cache.tokens_per_row == [60, 49][:rows]
    with torch.no_grad():
        found = model(ids[:, 60:], attention_mask=mask if rows == 2 else None, **{PAST: cache}).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    read = in_pieces(model, ids, [60, 5], mask if rows == 2 else None)[:, 60:]
    torch.testing.assert_close(read, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "window"])
def test_configurations_keep_their_meaning_when_saved_again(form, tmp_path):
    """Whatever the keys are called by then."""
    model = model_of(form, 1)
    ahn.save_adapter(model, tmp_path)
    again = ahn.from_pretrained(str(OLD / "base"), str(tmp_path), device="cpu")
    assert again.ahn_config == model.ahn_config
    AHNConfig.from_dict(json.loads((OLD / form / "ahn.json").read_text())["config"])


@pytest.mark.parametrize("old", ["key_maps", "make_room"])
def test_an_old_key_beside_its_new_name_is_refused(old, tmp_path):
    """Which of the two holds is not known."""
    new = {"key_maps": "feature_maps", "make_room": "window_gate"}[old]
    settings = json.loads((OLD / "maps" / "ahn.json").read_text())
    assert AHNConfig.from_dict(settings["config"]).feature_maps == 1
    settings["config"] |= {old: 0, new: 0}
    with pytest.raises(ahn.errors.ConfigError, match=f"the memory config has '{old}' and '{new}'"):
        AHNConfig.from_dict(settings["config"])
    shutil.copytree(OLD / "maps", tmp_path / "maps")
    (tmp_path / "maps" / "ahn.json").write_text(json.dumps(settings))
    with pytest.raises(ahn.errors.AHNError, match=f"expected '{new}' alone"):
        ahn.from_pretrained(str(OLD / "base"), tmp_path / "maps", device="cpu")


def test_a_training_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    """From the second step of four, to the adapter and the losses that the run had then."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    expected = load_file("run/adapter/adapter.safetensors")
    losses = [entry["loss"] for entry in json.loads(Path("run/log.json").read_text()) if "loss" in entry]
    shutil.rmtree("run/adapter")
    assert checkpoints.latest(Path("run")) == Path("run/checkpoint-2")
    values = json.loads(Path("recipe.json").read_text()) | {"base": "base", "data": ["text.txt"], "output": "run"}
    assert {"key_maps", "make_room"} <= values.keys() and recipe.from_dict(values)
    Path("recipe.yaml").write_text(json.dumps(values))  # which YAML is, too
    assert main(["train", "recipe.yaml", "--resume"]) == 0
    said = capsys.readouterr().err
    assert "step 3 of 4" in said and "step 2 of 4" not in said
    found = load_file("run/adapter/adapter.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-3, msg=name)
    again = [entry["loss"] for entry in json.loads(Path("run/log.json").read_text()) if "loss" in entry]
    assert again == pytest.approx(losses, rel=1e-3)
