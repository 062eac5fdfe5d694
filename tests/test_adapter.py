"""Adapters: ours, the authors', and everything that does not fit."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import ahn
from ahn.adapter_files import read_adapter
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


@pytest.mark.parametrize("form", [{"memory_positions": "none"}, {"feature_maps": 1}, {"window_gate": True}])
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


def rewrite(folder, **changes):
    settings = json.loads((folder / "ahn.json").read_text()) | changes
    (folder / "ahn.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def reshaped(key, value):
    return lambda folder: rewrite(folder, shape=json.loads((folder / "ahn.json").read_text())["shape"] | {key: value})


def reset(key, value):
    return lambda folder: rewrite(folder, config=json.loads((folder / "ahn.json").read_text())["config"] | {key: value})


def without(key):
    def remove(folder):
        settings = json.loads((folder / "ahn.json").read_text())
        del settings[key]
        (folder / "ahn.json").write_text(json.dumps(settings))

    return remove


def tensors_of(change):
    return lambda folder: change_tensors(folder, change)


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def replaced_by(name, make):
    def replace(folder):
        (folder / name).unlink()
        make(folder / name)

    return replace


def cut(folder, keep):
    """A file that was cut short, with the checksum of what is left."""
    import hashlib

    content = (folder / "adapter.safetensors").read_bytes()[:keep]
    (folder / "adapter.safetensors").write_bytes(content)
    rewrite(folder, sha256=hashlib.sha256(content).hexdigest())


BAD_ADAPTERS = {
    "version": (lambda f: rewrite(f, version=[1]), r"version \[1\]"),
    "no version": (without("version"), "version None"),
    "no config": (without("config"), "no 'config': expected an object"),
    "no shape": (without("shape"), "no 'shape'"),
    "no sha256": (without("sha256"), "no 'sha256'"),
    "config of text": (lambda f: rewrite(f, config="mamba2"), "config is 'mamba2': expected an object"),
    "config of null": (lambda f: rewrite(f, config=None), "config is None"),
    "shape of a list": (lambda f: rewrite(f, shape=[[1, 2]]), "shape is"),
    "shape of text": (reshaped("hidden_size", "32"), "hidden_size is '32': expected an integer"),
    "shape of null": (reshaped("num_layers", None), "num_layers is None"),
    "shape of zero": (reshaped("num_heads", 0), "num_heads is 0"),
    "checksum of a number": (lambda f: rewrite(f, sha256=5), "sha256 is 5: expected text"),
    "base of a list": (lambda f: rewrite(f, base=["a"]), "base is"),
    "window of text": (reset("window", "16"), "window='16'"),
    "cell of a list": (reset("cell", ["mamba2"]), "cell"),
    "store of a number": (reset("store", 3), "store"),
    "layers of text": (reset("layers", "all"), "layers"),
    "sinks of NaN": (reset("sinks", float("nan")), "sinks=nan"),
    "positions of an object": (reset("sink_positions", {}), "sink_positions"),
    "a list": (written("ahn.json", b"[]"), "expected a JSON object"),
    "not UTF-8": (written("ahn.json", b'{"version": "\xff"}'), "cannot be read"),
    "deep": (written("ahn.json", b"[" * 100_000), "cannot be read"),
    "large": (written("ahn.json", b" " * (1 << 21)), "more than"),
    "empty weights": (lambda f: cut(f, 0), "cannot be read"),
    "half a header": (lambda f: cut(f, 20), "cannot be read"),
    "half the weights": (lambda f: cut(f, -40), "cannot be read"),
    "huge header": (written("adapter.safetensors", (2**40).to_bytes(8, "little") + b"{}"), "cannot be read"),
    "weights in a FIFO": (replaced_by("adapter.safetensors", os.mkfifo), "no such file"),
    "weights in a folder": (replaced_by("adapter.safetensors", os.mkdir), "no such file"),
    "whole numbers": (tensors_of(lambda t: t.update({"layers.0.A_log": t["layers.0.A_log"].int()})), "torch.int32"),
    "complex": (tensors_of(lambda t: t.update({"layers.0.A_log": t["layers.0.A_log"].cfloat()})), "torch.complex64"),
    "8 bits": (
        tensors_of(lambda t: t.update({"layers.0.A_log": t["layers.0.A_log"].to(torch.float8_e4m3fn)})),
        "torch.float8_e4m3fn",
    ),
    "too large": (tensors_of(lambda t: t.update({"layers.0.A_log": t["layers.0.A_log"].double() + 1e300})), "infinite"),
    "infinite": (tensors_of(lambda t: t["layers.0.A_log"].fill_(torch.inf)), "infinite"),
    "shape": (tensors_of(lambda t: t.update({"layers.0.A_log": torch.zeros(4, 1)})), r"shape \[4, 1\]"),
    "foreign": (tensors_of(lambda t: t.update({"model.embed_tokens.weight": torch.zeros(1)})), "too many"),
    "none": (tensors_of(dict.clear), "missing"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapters_are_one_clear_error(tmp_path, case):
    spoil, message = BAD_ADAPTERS[case]
    ahn.save_adapter(with_memory(tiny()), tmp_path)
    spoil(tmp_path)
    model = tiny()
    with pytest.raises(AdapterError, match=message):
        ahn.load_adapter(model, tmp_path)
    assert not hasattr(model, "ahn_config"), "a memory without its weights"


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, "many", [3], ...])
def test_authors_config_with_missing_or_junk_keys(tmp_path, key, value):
    checkpoint = authors_checkpoint(tmp_path / "authors")
    settings = json.loads((checkpoint / "config.json").read_text())
    if value is ...:
        del settings[key]
    else:
        settings[key] = value
    (checkpoint / "config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=f"{key}.*: expected an integer of at least 1"):
        read_adapter(checkpoint)


@pytest.mark.parametrize("value", ["a,b", "99", "-1", [0, 1, 2], {"a": 1}])
def test_authors_layers_that_are_none(tmp_path, value):
    if isinstance(value, list):  # all layers
        value = list(range(json.loads(golden_tensors("gated_deltanet")[1]["config"])["num_hidden_layers"]))
    with pytest.raises(AdapterError, match="fa_layer_ids is .*: expected indices of layers"):
        read_adapter(authors_checkpoint(tmp_path / "authors", fa_layer_ids=value))


@pytest.mark.parametrize("value", [["GatedDeltaNet"], 3, None])
def test_authors_cell_of_another_type(tmp_path, value):
    with pytest.raises(AdapterError, match="_ahn_implementation is"):
        read_adapter(authors_checkpoint(tmp_path / "authors", _ahn_implementation=value))


def test_nan_is_not_saved_over_a_good_adapter(folder, cell):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = with_memory(tiny(), cell)
    next(model.model.layers[0].self_attn.ahn.cell.parameters()).data.fill_(torch.inf)
    with pytest.raises(AdapterError, match="hold NaN or infinite"):
        ahn.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# with its base


@pytest.mark.parametrize("options", [{}, {"cell": None}, {"store": "recency", "store_size": 8}])
def test_save_pretrained_saves_the_memory_too(tmp_path, options, recwarn):
    from transformers import AutoModelForCausalLM

    model = with_memory(tiny(), **options)
    model.save_pretrained(tmp_path)
    ids = token_ids(60)
    loaded = ahn.from_pretrained(tmp_path, device="cpu")
    assert loaded.ahn_config == model.ahn_config
    assert torch.equal(in_pieces(loaded, ids, [60]), in_pieces(model, ids, [60]))
    assert not [name for name in load_file(tmp_path / "model.safetensors") if ".ahn." in name]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(ids).logits, tiny()(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = ahn.from_pretrained(tmp_path / "again", device="cpu")
    assert torch.equal(in_pieces(again, ids, [60]), in_pieces(model, ids, [60]))


def test_save_pretrained_with_weights_of_ones_own(tmp_path):
    model = with_memory(tiny())
    model.save_pretrained(tmp_path, state_dict=model.state_dict(), max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(
        in_pieces(ahn.from_pretrained(tmp_path, device="cpu"), token_ids(60), [60]),
        in_pieces(model, token_ids(60), [60]),
    )


def test_save_pretrained_is_whole_or_says_so(tmp_path, monkeypatch):
    model = with_memory(tiny())
    with monkeypatch.context() as patch:
        patch.setattr("ahn.hf.weights.write_adapter", lambda *_: (_ for _ in ()).throw(AdapterError("No space left")))
        with pytest.raises(AdapterError, match="No space left"):
            model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    next(model.model.layers[0].self_attn.ahn.cell.parameters()).data.fill_(torch.nan)
    with pytest.raises(AdapterError, match="NaN"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_detached_model_saves_as_before(tmp_path):
    model = ahn.detach(with_memory(tiny()))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "ahn.json").exists()


def test_push_to_hub_sends_the_memory_too(monkeypatch):
    """What is uploaded is a folder that `save_pretrained` has written."""
    sent = {}

    class Hub:
        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **options):
            sent[repo_id] = sorted(operation.path_in_repo for operation in operations)

        def create_branch(self, **options):
            pass

    card = type("Card", (), {"save": lambda self, path: open(path, "w").close()})
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: card())
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub, raising=False)
    monkeypatch.setattr("transformers.utils.hub.create_repo", Hub().create_repo, raising=False)
    monkeypatch.setattr("transformers.utils.hub.create_commit", Hub().create_commit, raising=False)
    with_memory(tiny()).push_to_hub("me/model")
    assert {"adapter.safetensors", "ahn.json", "config.json", "model.safetensors"} <= set(sent["me/model"])


@pytest.mark.parametrize("there", [True, False])
def test_a_memory_in_the_bases_repository_is_found(monkeypatch, there):
    from huggingface_hub.errors import LocalEntryNotFoundError

    from ahn.adapter import chosen

    def download(name, file, **options):
        assert (name, file) == ("me/model", "ahn.json")
        if not there:
            raise LocalEntryNotFoundError("not in the cache")
        return "/somewhere"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert chosen("me/model", None) == ("me/model" if there else None)
    assert chosen("me/model", "none") is None


def test_weights_go_through_a_state_dict(cell):
    model, other = with_memory(tiny(), cell), with_memory(tiny(seed=4), cell, seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(in_pieces(other, token_ids(60), [60]), in_pieces(model, token_ids(60), [60]))


class EightBits(torch.nn.Module):
    """A linear map that is stored in 8-bit floats, as in quantised checkpoints."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().max() / 448
        self.weight = torch.nn.Parameter((linear.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        self.out_features, self.in_features = linear.weight.shape

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale)


def in_eight_bits(model):
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, EightBits(child))
    return model


def test_a_base_in_eight_bits(tmp_path, cell):
    model = with_memory(in_eight_bits(tiny()), cell)
    assert {p.dtype for p in model.model.layers[0].self_attn.ahn.parameters()} == {torch.float32}
    ahn.save_adapter(model, tmp_path / "adapter")
    cache = ahn.read(model, token_ids(60))
    cache.save(tmp_path / "a.ahn")
    other = ahn.load_adapter(ahn.augment(in_eight_bits(tiny()), model.ahn_config), tmp_path / "adapter")
    loaded = ahn.AHNCache.load(tmp_path / "a.ahn", other)
    answers = [ahn.generate(m, token_ids(3), c, max_new_tokens=4) for m, c in ((model, cache), (other, loaded))]
    assert torch.equal(*answers)


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
    ours = [name for name in zoo.names() if name.startswith("qwen2.5-coder-0.5b-")]
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
