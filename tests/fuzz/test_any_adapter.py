"""Adapters that were damaged or edited, ours and the authors': refused, or the same weights."""

import dataclasses
import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

import ahn
from ahn.errors import AdapterError
from ahn.memory.handle import layers_of
from conftest import storing, tiny
from damage import damaged, edits, header_of, values, with_header
from effort import bounded, fuzz

pytestmark = pytest.mark.slow

TYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@dataclasses.dataclass
class Files:
    """A folder's files by name, and the one that says how it is made."""

    data: dict[str, bytes]
    settings: str

    def __repr__(self):
        return "it"

    @property
    def weights(self):
        return next(name for name in self.data if name.endswith(".safetensors"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    ahn.save_adapter(storing("learned", base=tiny()), folder)
    return Files({path.name: path.read_bytes() for path in folder.iterdir()}, "ahn.json")


@pytest.fixture(scope="module")
def authors():
    model = storing("recency", base=tiny())
    weights = {
        f"model.layers.{i}.ahn.fn.{name}": parameter.detach().clone()
        for i, layer in enumerate(layers_of(model))
        for name, parameter in layer.cell.named_parameters()
    }
    base = model.config
    settings = {
        "_ahn_implementation": "GatedDeltaNet",
        "_name_or_path": "base",
        "num_attention_heads": base.num_attention_heads,
        "num_hidden_layers": base.num_hidden_layers,
        "hidden_size": base.hidden_size,
        "head_dim": base.head_dim,
        "fa_layer_ids": "",
        "use_q_proj": False,
    }
    return Files({"config.json": json.dumps(settings).encode(), "model.safetensors": save(weights)}, "config.json")


@pytest.fixture(params=["ours", "authors"])
def files(request):
    return request.getfixturevalue(request.param)


def weights_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".ahn." in name}


def check(files, changes, folder):
    """Loading is refused and leaves the model alone, or gives weights that can be used."""
    for name, data in (files.data | changes).items():
        (folder / name).write_bytes(data)
    model = tiny()
    with bounded(folder, AdapterError) as refused:
        ahn.load_adapter(model, folder)
    if refused:
        assert not hasattr(model, "ahn_config")
    else:
        assert all(parameter.isfinite().all() for parameter in weights_of(model).values())


@fuzz(25)
@given(st.data())
def test_bytes(files, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(files.data)))
    check(files, {name: data.draw(damaged(files.data[name]))}, tmp_path)


@fuzz(40)
@given(st.data())
def test_settings(files, tmp_path, data):
    settings = data.draw(edits(json.loads(files.data[files.settings])) | values)
    check(files, {files.settings: json.dumps(settings).encode()}, tmp_path)


@fuzz(25)
@given(st.data())
def test_headers_with_a_new_checksum(files, tmp_path, data):
    header, rest = header_of(files.data[files.weights])
    check(files, sealed(files, with_header(data.draw(edits(header) | values), rest)), tmp_path)


@fuzz(25)
@given(st.data())
def test_tensors_with_a_new_checksum(files, tmp_path, data):
    tensors = load(files.data[files.weights])
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    match data.draw(st.sampled_from(["gone", "name", "type", "shape", "nan"])):
        case "name":
            tensors[data.draw(st.text(max_size=8) | st.sampled_from([f"{name}x", name[1:], "layers.9.x"]))] = tensor
        case "type":
            tensors[name] = tensor.to(data.draw(st.sampled_from(TYPES)))
        case "shape":
            tensors[name] = tensor[None] if tensor.dim() < 3 else tensor[:, 1:].contiguous()
        case "nan":
            tensors[name] = tensor * float("nan")
    check(files, sealed(files, save(tensors)), tmp_path)


def sealed(files, weights):
    """The weights, and the settings with their checksum."""
    settings = json.loads(files.data[files.settings]) | {"sha256": hashlib.sha256(weights).hexdigest()}
    return {files.weights: weights, files.settings: json.dumps(settings).encode()}
