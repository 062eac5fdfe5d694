"""Adapters: ours, the authors', and everything that does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ahn
from ahn.adapter import read_adapter
from ahn.errors import AdapterError, ConfigError
from conftest import CELLS, golden_base, golden_tensors, in_pieces, tiny, token_ids, with_memory


@pytest.fixture
def folder(tmp_path, cell):
    ahn.save_adapter(with_memory(tiny(), cell), tmp_path / "adapter")
    return tmp_path / "adapter"


def authors_checkpoint(folder, cell="gated_deltanet", with_base=False, **changes):
    tensors, metadata = golden_tensors(cell)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads(metadata["config"]) | changes))
    keep = {n: t for n, t in tensors.items() if ".ahn.fn." in n or (with_base and n.startswith("model."))}
    save_file(keep, folder / "model.safetensors")
    return folder


def change_tensors(folder, change, file="adapter.safetensors"):
    """Rewrite the weights, with a checksum that fits: only their content is wrong."""
    import hashlib

    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    if (folder / "ahn.json").exists():
        settings = json.loads((folder / "ahn.json").read_text())
        settings["sha256"] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        (folder / "ahn.json").write_text(json.dumps(settings))


def test_saved_and_loaded_gives_the_same_logits(folder, cell):
    ids = token_ids(60)
    expected = in_pieces(with_memory(tiny(), cell), ids, [60])
    torch.manual_seed(99)
    fresh = ahn.load_adapter(ahn.augment(tiny(), ahn.AHNConfig(cell, 16, 4)), folder)
    assert torch.equal(in_pieces(fresh, ids, [60]), expected)
    assert torch.equal(in_pieces(ahn.load_adapter(tiny(), folder), ids, [60]), expected)  # augments by itself


def test_holds_nothing_of_the_base(folder):
    names = load_file(folder / "adapter.safetensors")
    assert all(name.startswith("layers.") for name in names)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "ahn.json"]


@pytest.mark.parametrize("with_base", [False, True])
def test_authors_checkpoint_loads_unchanged(tmp_path, cell, with_base):
    tensors, metadata = golden_tensors(cell)
    base = tmp_path / "base"
    golden_base(tensors, metadata).save_pretrained(base)
    checkpoint = authors_checkpoint(tmp_path / "authors", cell, with_base)
    model = ahn.from_pretrained(base, checkpoint, window=64, sinks=4)
    assert model.ahn_config == ahn.AHNConfig(cell, 64, 4, sink_positions="absolute")
    assert (in_pieces(model, tensors["input_ids"], [300]) - tensors["logits"]).abs().max() < 1e-4


def test_authors_training_window_is_not_taken(tmp_path):
    checkpoint = authors_checkpoint(tmp_path / "authors", sliding_window=256, fa_layer_ids="0")
    config = read_adapter(checkpoint).config
    assert (config.window, config.sinks, config.layers) == (32640, 128, (1,))


@pytest.mark.parametrize("key", ["use_q_proj", "use_ahn_router"])
def test_authors_unreleased_variants_are_refused(tmp_path, key):
    with pytest.raises(AdapterError, match=key):
        read_adapter(authors_checkpoint(tmp_path / "authors", **{key: True}))


def test_authors_unknown_cell(tmp_path):
    with pytest.raises(AdapterError, match="'RWKV'.*GatedDeltaNet"):
        read_adapter(authors_checkpoint(tmp_path / "authors", _ahn_implementation="RWKV"))


def test_convert_the_authors(tmp_path, cell):
    checkpoint = authors_checkpoint(tmp_path / "authors", cell)
    ours = ahn.convert(checkpoint, tmp_path / "ours")
    tensors, metadata = golden_tensors(cell)
    model = ahn.load_adapter(
        ahn.augment(golden_base(tensors, metadata), ahn.AHNConfig(cell, 64, 4, sink_positions="absolute")), ours
    )
    assert (in_pieces(model, tensors["input_ids"], [300]) - tensors["logits"]).abs().max() < 1e-4
    assert "layers.0.D" not in load_file(ours / "adapter.safetensors")


def test_names_of_the_cells_are_the_authors():
    assert {name: ahn.cells.get(name).authors_name for name in CELLS} == CELLS


def test_another_base(folder):
    with pytest.raises(AdapterError, match="another base.*hidden_size 32, not 64"):
        ahn.load_adapter(tiny(hidden_size=64), folder)
    with pytest.raises(AdapterError, match="another base.*num_layers 2, not 3"):
        ahn.load_adapter(with_memory(tiny(num_hidden_layers=3)), folder)


def test_another_cell(tmp_path):
    ahn.save_adapter(with_memory(tiny(), "mamba2"), tmp_path / "a")
    with pytest.raises(AdapterError, match="'mamba2'.*'deltanet'"):
        ahn.load_adapter(with_memory(tiny(), "deltanet"), tmp_path / "a")


@pytest.mark.parametrize("form", [{"memory_positions": "none"}, {"key_maps": 1}, {"make_room": True}])
def test_another_form(tmp_path, form):
    """Weights learned for keys without positions are of no use to a cell that is given them turned."""
    ahn.save_adapter(with_memory(tiny(), **form), tmp_path)
    ((key, value),) = form.items()
    with pytest.raises(AdapterError, match=f"adapter for {key}={value!r}, the model has"):
        ahn.load_adapter(with_memory(tiny()), tmp_path)


def test_missing_extra_wrong_and_nan_tensors(tmp_path):
    def broken(change):
        ahn.save_adapter(with_memory(tiny()), tmp_path / "a")
        change_tensors(tmp_path / "a", change)
        model = with_memory(tiny(), seed=8)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(AdapterError) as error:
            ahn.load_adapter(model, tmp_path / "a")
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        return str(error.value)

    assert "missing: layers.1.A_log" in broken(lambda t: t.pop("layers.1.A_log"))
    assert "too many: layers.0.extra" in broken(lambda t: t.update({"layers.0.extra": torch.zeros(1)}))
    assert "shape [3]" in broken(lambda t: t.update({"layers.0.A_log": torch.zeros(3)}))
    assert "NaN" in broken(lambda t: t["layers.0.A_log"].fill_(torch.nan))


def test_damaged_files(folder):
    settings = json.loads((folder / "ahn.json").read_text())
    (folder / "ahn.json").write_text(json.dumps(settings | {"version": 9}))
    with pytest.raises(AdapterError, match="version 9"):
        ahn.load_adapter(tiny(), folder)
    (folder / "ahn.json").write_text(json.dumps(settings | {"config": settings["config"] | {"wndow": 3}}))
    with pytest.raises(AdapterError, match="unknown keys: wndow"):
        ahn.load_adapter(tiny(), folder)
    (folder / "ahn.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        ahn.load_adapter(tiny(), folder)
    (folder / "ahn.json").write_text(json.dumps(settings))
    content = bytearray((folder / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="checksum"):
        ahn.load_adapter(tiny(), folder)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        ahn.load_adapter(tiny(), folder)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c"])
def test_no_such_adapter(name):
    with pytest.raises(AdapterError, match="no such adapter"):
        ahn.load_adapter(tiny(), name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(AdapterError, match="no adapter"):
        ahn.load_adapter(tiny(), tmp_path)


def test_a_full_disk_keeps_the_earlier_adapter(folder, cell, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(AdapterError, match="No space left"):
        ahn.save_adapter(with_memory(tiny(), cell, seed=5), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_to_save(tmp_path):
    with pytest.raises(AdapterError, match="nothing to save"):
        ahn.save_adapter(with_memory(tiny(), cell=None), tmp_path / "a")


def test_from_pretrained_defaults(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = ahn.from_pretrained(tmp_path / "base")
    assert model.ahn_config == ahn.AHNConfig(cell=None, window=120, sinks=8)  # a quarter of 512 positions
    assert not model.training
    assert ahn.from_pretrained(tmp_path / "base", sinks=0).ahn_config.lossless == 128
    assert ahn.from_pretrained(tmp_path / "base", cell="mamba2", window=7).ahn_config.cell == "mamba2"
    with pytest.raises(ConfigError, match="window=0"):
        ahn.from_pretrained(tmp_path / "base", window=0)
    with pytest.raises(ConfigError, match="512 positions"):
        ahn.from_pretrained(tmp_path / "base", window=600)


def test_adapter_in_the_bases_folder_is_found(tmp_path, monkeypatch):
    model = with_memory(tiny())
    ahn.detach(tiny_saved := with_memory(tiny()))
    tiny_saved.save_pretrained(tmp_path)
    ahn.save_adapter(model, tmp_path)
    loaded = ahn.from_pretrained(tmp_path)
    assert loaded.ahn_config == model.ahn_config
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert ahn.from_pretrained(f"~/{tmp_path.name}").ahn_config == model.ahn_config
    ids = token_ids(60)
    assert torch.equal(in_pieces(loaded, ids, [60]), in_pieces(model, ids, [60]))
    with pytest.raises(ConfigError, match="mamba2"):
        ahn.from_pretrained(tmp_path, tmp_path, cell="mamba2")


@pytest.mark.parametrize("name", ahn.zoo.names())
def test_shipped_adapters_are_whole_and_documented(name):
    shipped = read_adapter(name)
    assert all(tensor.isfinite().all() for tensor in shipped.tensors.values())
    assert all(t.dtype == torch.bfloat16 for n, t in shipped.tensors.items() if t.dim() > 1)
    assert any(t.abs().max() > 0 for n, t in shipped.tensors.items() if n.endswith("o_proj.weight"))
    assert f"# {name}" in (ahn.zoo.path(name) / "README.md").read_text()


def test_a_shipped_adapter_is_the_default_of_its_base(tmp_path, monkeypatch):
    from ahn import zoo

    monkeypatch.setattr(zoo, "_HERE", tmp_path / "zoo")
    tiny().save_pretrained(tmp_path / "base")
    ahn.save_adapter(with_memory(tiny()), tmp_path / "zoo" / "tiny-gdn")
    settings = json.loads((tmp_path / "zoo" / "tiny-gdn" / "ahn.json").read_text())
    (tmp_path / "zoo" / "tiny-gdn" / "ahn.json").write_text(
        json.dumps(settings | {"default_for": [str(tmp_path / "base")]})
    )
    assert ahn.from_pretrained(tmp_path / "base").ahn_names["adapter"] == "tiny-gdn"
    assert ahn.from_pretrained(tmp_path / "base", cell="mamba2").ahn_names["adapter"] is None
    assert ahn.from_pretrained(tmp_path / "base", "tiny-gdn").ahn_config.cell == "gated_deltanet"


def test_shipped_adapters_are_found_for_files_and_folders():
    from ahn import zoo

    shape = json.loads((zoo.path("qwen2.5-coder-0.5b-deltanet") / "ahn.json").read_text())["shape"]
    ours = [name for name in zoo.names() if name.startswith("qwen")]
    assert len(ours) > 1
    for base in ("/x/qwen2.5-coder-0.5b-instruct.gguf", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "a/Qwen2.5-Coder-0.5B/"):
        assert zoo.made_for(base, shape) == zoo.made_for(base) == ours
        assert zoo.made_for(base, shape | {"num_layers": 25}) == []
    assert zoo.default_for("/x/qwen2.5-coder-0.5b-instruct.gguf") is None
    assert zoo.default_for("Qwen/Qwen2.5-Coder-0.5B-Instruct") == "qwen2.5-coder-0.5b-gated_deltanet"
    assert zoo.made_for("/qwen2.5-coder-0.5b/other.gguf") == []


def test_lossless_tokens_in_all(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    ahn.save_adapter(with_memory(tiny(), window=30, sinks=4, store="recency", store_size=10), tmp_path / "a")

    def sizes(**options):
        config = ahn.from_pretrained(tmp_path / "base", tmp_path / "a", **options).ahn_config
        return config.sinks, config.store_size, config.window

    assert sizes(lossless=84) == (4, 20, 60)
    assert sizes(lossless=16) == (2, 4, 10)
    assert sizes(lossless=84, sinks=14, store_size=3) == (14, 3, 67)
    assert sizes(lossless=84, store="none") == (4, 0, 80)
    alone = ahn.from_pretrained(tmp_path / "base", store="recency", store_size=300, lossless=400).ahn_config
    assert (alone.sinks, alone.store_size, alone.window) == (8, 300, 92)
    with pytest.raises(ConfigError, match="84 lossless tokens with 4 sinks and 80 store"):
        sizes(lossless=84, store_size=80)
    with pytest.raises(ConfigError, match="lossless=84 with window=3: expected one"):
        sizes(lossless=84, window=3)


def test_a_trained_store_needs_its_gates(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    ahn.save_adapter(with_memory(tiny()), tmp_path / "gdn")
    for adapter, what in ((None, "no adapter is given"), (tmp_path / "gdn", "gdn has none")):
        with pytest.raises(AdapterError, match=f"{what}: expected one that has them, as .*smollm2-135m-deltanet"):
            ahn.from_pretrained(tmp_path / "base", adapter, store="learned", store_size=4, window=8)
    with pytest.raises(ConfigError, match="unknown store 'learnt'"):
        ahn.from_pretrained(tmp_path / "base", store="learnt", store_size=4, window=8)


def test_authors_checkpoint_on_a_base_of_few_positions(tmp_path):
    tensors, metadata = golden_tensors("deltanet")
    model = ahn.load_adapter(golden_base(tensors, metadata), authors_checkpoint(tmp_path / "authors", "deltanet"))
    assert model.ahn_config.lossless == 1024  # a quarter of its 4,096 positions
    assert model.ahn_config.sink_positions == "absolute"


def test_saving_from_a_plain_model(tmp_path):
    with pytest.raises(AdapterError, match="nothing to save"):
        ahn.save_adapter(tiny(), tmp_path)
