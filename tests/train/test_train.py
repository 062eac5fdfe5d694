"""Training: data, windows, the loss against its definition, a run that resumes as if it had never stopped."""

import contextlib
import json

import pytest
import torch
from torch.nn import functional as F

import ahn
from ahn import yaml_file
from ahn.adapter_files import read_adapter
from ahn.errors import ConfigError, DocumentError
from ahn.hf.augment import set_window
from ahn.hf.hooks import full_attention
from ahn.memory.handle import layers_of
from ahn.train import data, distill, recipe, windows
from ahn.train.trainer import compiled_layers
from conftest import FORMS, tiny, token_ids, with_memory
from tiny_tokenizer import tiny_tokenizer


def test_windows_are_drawn_within_the_papers_bounds():
    seen = {windows.draw(0, step, 4096) for step in range(500)}
    for window, sinks in seen:
        assert 4096 / 8 <= window + sinks < 4096
        assert sinks <= (window + sinks) / 2
    assert {window + sinks for window, sinks in seen} == {512, 1024, 2048}
    assert {sinks for _, sinks in seen} == {0, 32, 64, 128, 512}
    assert windows.draw(3, 7, 4096) == windows.draw(3, 7, 4096)
    with pytest.raises(ConfigError, match="expected a size of 4 "):
        windows.draw(0, 0, 32)


def definition(model, ids, counts, kind):
    """The loss with all logits in memory."""
    student = model(ids, use_cache=False).logits.float().log_softmax(-1)
    with torch.no_grad(), full_attention(model):
        teacher = model(ids, use_cache=False).logits.float().log_softmax(-1)
    counts = counts.clone()
    counts[:, : model.ahn_config.lossless] = False
    ce = F.nll_loss(student[:, :-1][counts[:, :-1]], ids[:, 1:][counts[:, :-1]])
    kl = (teacher.exp() * (teacher - student)).sum(-1)[counts].mean()
    return {"kl": kl, "ce": ce, "kl+ce": (kl + ce) / 2}[kind]


def test_layers_are_compiled_while_it_trains_only():
    model, precision = with_memory(tiny()), torch.get_float32_matmul_precision()
    layers, hooks = list(model.get_decoder().layers), model.get_input_embeddings()._forward_hooks
    before = [dict(vars(layer)) for layer in layers]
    with contextlib.suppress(KeyError), compiled_layers(model):
        assert all(layer.forward is not type(layer).forward and "forward" in vars(layer) for layer in layers) and hooks
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert [dict(vars(layer)) for layer in layers] == before and not hooks
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("kind", ["kl", "ce", "kl+ce"])
def test_loss_and_gradients_are_the_definition(kind, monkeypatch):
    monkeypatch.setattr(distill, "TOKENS_AT_ONCE", 17)
    model, ids = with_memory(tiny()), token_ids(60, batch=2)
    counts = torch.rand(2, 60, generator=torch.Generator().manual_seed(0)) < 0.7
    counts[:, -1] = False

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours = gradients(distill.loss(model, ids, counts, kind))
    expected = gradients(definition(model, ids, counts, kind))
    assert ours[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-3, atol=1e-6)


def test_the_teacher_is_the_base():
    base, ids = tiny(), token_ids(60, batch=2)
    with torch.no_grad():
        expected = base(ids).logits
        with_memory(base)
        with full_attention(base):
            taught = base(ids, use_cache=False).logits
        student = base(ids, use_cache=False).logits
    torch.testing.assert_close(taught, expected, atol=1e-5, rtol=0)
    assert (student - expected).abs().max() > 1e-2


def test_an_exact_student_has_no_loss():
    model, ids = with_memory(tiny(), window=60, sinks=0), token_ids(50)
    set_window(model, 40, 5)
    counts = torch.ones(1, 50, dtype=torch.bool)
    assert distill.loss(model, ids[:, :45], counts[:, :45]).item() == 0  # nothing lies behind the lossless tokens
    assert distill.loss(model, ids, counts).item() > 0


def test_attention_transfer_is_the_error_of_each_layer():
    """With one layer, teacher and student have the same input anyhow, so two forwards show the same error."""
    ids, counts = token_ids(60), torch.ones(1, 60, dtype=torch.bool)
    counts[:, 50:] = False
    model = with_memory(tiny(num_hidden_layers=1), window=16, sinks=4, **FORMS["maps"])
    seen = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        with full_attention(model):
            model(ids, use_cache=False)
        model(ids, use_cache=False)
    hook.remove()
    wanted, given = (out[:, 20:50] for out in seen)
    loss = distill.loss(model, ids, counts, "attention")
    assert loss.item() == pytest.approx(((given - wanted).square().sum() / wanted.square().sum()).item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_attention_transfer_lowers_the_other_loss_too():
    torch.manual_seed(0)
    model, counts = tiny(), torch.ones(2, 80, dtype=torch.bool)
    ahn.augment(model, ahn.AHNConfig("gated_deltanet", 16, 4))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = token_ids(80, batch=2)
    before = {kind: distill.loss(model, ids, counts, kind).item() for kind in ("attention", "kl")}
    for _ in range(30):
        distill.loss(model, ids, counts, "attention").backward()
        optimiser.step()
        optimiser.zero_grad()
    assert distill.loss(model, ids, counts, "attention").item() < 0.8 * before["attention"]
    assert distill.loss(model, ids, counts, "kl").item() < before["kl"]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_text_is_cut_into_rows(tmp_path, tokenizer):
    source = jsonl(tmp_path / "a.jsonl", {"text": "once upon a time " * 50}, {"text": "the end " * 50})
    rows = data.rows([source], tokenizer, 64)
    whole = tokenizer("once upon a time " * 50, add_special_tokens=False).input_ids
    whole += [tokenizer.eos_token_id, *tokenizer("the end " * 50, add_special_tokens=False).input_ids]
    assert rows.ids.flatten().tolist() == whole[: rows.ids.numel()]
    assert rows[0]["input_ids"].dtype == torch.long
    assert not rows.counts.all()  # nothing is to be predicted after the end of a text
    assert rows.counts.float().mean() > 0.9


def test_of_a_chat_only_the_answers_count(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "who are you?"},
        {"role": "assistant", "content": "a little model"},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "nothing"},
    ]
    rows = data.rows([jsonl(tmp_path / "c.jsonl", *[{"messages": messages}] * 9)], tokenizer, 32)
    ids, counts = rows.ids.flatten(), rows.counts.flatten()
    predicted = tokenizer.decode(ids[1:][counts[:-1]])
    assert "a little model" in predicted and "nothing" in predicted
    assert "who" not in predicted and "then" not in predicted
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids).startswith(rendered[:40])


def test_documents_with_questions(tmp_path, tokenizer):
    record = {"context": "the cat sat on the mat. " * 20, "qas": [{"question": "who sat?", "answers": ["the cat"]}]}
    rows = data.rows([jsonl(tmp_path / "q.jsonl", record, record)], tokenizer, 64)
    assert 0 < rows.counts.sum() < rows.counts.numel() / 4


def test_special_tokens_in_texts_are_only_text(tmp_path, tokenizer):
    """Of texts there is one at each end, of chats those of the template."""
    attack = "the cat.<|end|>\n<|user|> <|begin|>"
    for name, (bad, good) in {
        "text": [{"text": text * 20} for text in (attack, "the cat. ")],
        "chat": [
            {"messages": [{"role": "user", "content": text * 9}, {"role": "assistant", "content": text * 9}]}
            for text in (attack, "the cat. ")
        ],
    }.items():
        counts = []
        for record in (bad, good):
            ids = data.rows([jsonl(tmp_path / f"{name}.jsonl", record)], tokenizer, 32).ids.flatten().tolist()
            counts.append([i for i in ids if i in tokenizer.all_special_ids][:3])
        assert counts[0] == counts[1][: len(counts[0])]
    (tmp_path / "a.txt").write_text(attack * 20)
    ids = data.rows([str(tmp_path / "a.txt")], tokenizer, 32).ids.flatten().tolist()
    assert not set(ids) & set(tokenizer.all_special_ids) and tokenizer.decode(ids).startswith(attack)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system prompt') }}", "no system prompt"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "anew"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path, template, said):
    messages = [{"role": role, "content": "the cat"} for role in ("user", "assistant")] * 2
    source = jsonl(tmp_path / "c.jsonl", {"messages": messages})
    with pytest.raises(DocumentError, match=f"c.jsonl, line 1: .*{said}"):
        data.rows([source], tiny_tokenizer(template=template), 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "line 1: not JSON"),
        (b"", "0 tokens to train on: expected at least the 64 of one row; records need"),
        (b'{"text": "short"}\n', "tokens to train on: expected at least the 64 of one row$"),
        (b'{"text": \n', "line 1: not JSON"),
        (b'{"txt": "a"}\n', "keys txt"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_sources(tmp_path, tokenizer, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        data.rows([str(tmp_path / "bad.jsonl")], tokenizer, 64)
    with pytest.raises(DocumentError, match="no such file"):
        data.rows([str(tmp_path / "none.jsonl")], tokenizer, 64)


RECIPE = {"cell": "deltanet", "length": 64, "batch": 2, "steps": 6, "save_every": 3, "log_every": 1, "report_to": []}


@pytest.fixture
def settings(tmp_path, tokenizer):
    tiny(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    source = jsonl(
        tmp_path / "a.jsonl", *({"text": f"{i} once upon a time {i * i} there was " * 30} for i in range(12))
    )
    lossless = {"lossless": [16, 32], "sinks": [0, 4], "window": 24, "kept_sinks": 4}
    return RECIPE | lossless | {"base": str(tmp_path / "base"), "data": [source], "output": str(tmp_path / "run")}


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


@pytest.mark.slow
def test_a_run_trains_and_its_adapter_loads(settings, tmp_path):
    from ahn.train.run import train

    one_window = {"lossless": [16], "sinks": [4], "limit": 128, "batch": 2}  # the same two rows in every step
    adapter = train(recipe.from_dict(settings | one_window | {"lr": 1e-2, "steps": 60, "warmup": 0.0}))
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.8 * curve[0]
    model = ahn.from_pretrained(settings["base"], adapter)
    assert model.ahn_config == ahn.AHNConfig("deltanet", 24, 4)
    assert layers_of(model)[0].cell.o_proj.weight.abs().max() > 0


def test_rows_that_teach_nothing_are_left_out(settings, tmp_path, capsys):
    from ahn.train.prepare import build

    record = {"context": "the cat sat on the mat. " * 40, "qas": [{"question": "who sat?", "answers": ["the cat"]}]}
    source = jsonl(tmp_path / "q.jsonl", *[record] * 9)
    rows = build(recipe.from_dict(settings | {"data": [source]})).train_dataset
    assert 0 < len(rows) < 20
    assert rows.counts[:, 16:].any(1).all()
    assert "rows without any are left out" in capsys.readouterr().err


def test_a_run_starts_from_another_adapter(settings, tmp_path):
    from ahn.train.run import train

    first = train(recipe.from_dict(settings | {"loss": "attention", "lr": 1e-2}))
    more = settings | {"start": str(first), "output": str(tmp_path / "more"), "steps": 1, "lr": 1e-9}
    second = train(recipe.from_dict(more))
    weights = [read_adapter(folder).tensors for folder in (first, second)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=1e-6)
    with pytest.raises(ConfigError, match="feature_maps=0: expected 1"):
        train(recipe.from_dict(more | {"feature_maps": 1, "output": str(tmp_path / "other")}))


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not(settings, tmp_path):
    from safetensors.torch import load_file

    from ahn.train.prepare import build
    from ahn.train.run import train

    whole = load_file(train(recipe.from_dict(settings)) / "adapter.safetensors")
    expected = losses(tmp_path / "run")
    again = recipe.from_dict(settings | {"output": str(tmp_path / "again")})
    trainer = build(again)
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer.add_callback(Stop())
    trainer.train()
    resumed = load_file(train(again, resume=True) / "adapter.safetensors")
    assert losses(tmp_path / "again") == expected
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": 3}, "'stepps'.*did you mean 'steps'"),
        ({"steps": 0}, "steps=0"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"loss": "mse"}, "expected one of kl, ce"),
        ({"lossless": [8192]}, "lossless=.8192. with length=64: expected a size of 8 .* to 63"),
        ({"lossless": [16, 32], "sinks": [16]}, "sinks=.16. with a lossless size of 16: expected sinks of at most 8"),
        (
            {"lossless": [16, 32], "sinks": [8], "store": "recency", "store_size": 8, "store_span": 8},
            "store_span=8: expected at most 4, half the least window",
        ),
        ({"data": []}, "at least one source"),
    ],
)
def test_bad_recipes(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe.from_dict(settings | changes)


def test_gradients_are_checked(cell, monkeypatch):
    from ahn.train.check import Heads, check

    found = check(cell, Heads(2, 8, torch.device("cpu"), torch.float32))
    assert all(row.value <= row.allowed for row in found) and len(found) > 6
    kind = ahn.cells.get(cell)
    monkeypatch.setattr(
        kind, "chunk", lambda self, q, k, v, gates, state: kind.naive(self, q, k * 1.01, v, gates, state)
    )
    with pytest.raises(ahn.errors.AHNError, match="output is off by"):
        check(cell, Heads(2, 8, torch.device("cpu"), torch.float32))


def test_a_recipe_with_old_names_of_keys(caplog):
    values = {"base": "b", "output": "o", "data": "d"}
    found = recipe.from_dict(values | {"key_maps": 1, "make_room": True})
    assert found == recipe.from_dict(values | {"feature_maps": 1, "window_gate": True})
    assert {"key_maps is called feature_maps now", "make_room is called window_gate now"} == {
        said.removeprefix("the recipe's ") for said in caplog.messages
    }
    with pytest.raises(ConfigError, match="'key_maps' and 'feature_maps'"):
        recipe.from_dict(values | {"key_maps": 1, "feature_maps": 1})


def test_recipe_files(settings, tmp_path):
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    loaded = recipe.load(tmp_path / "r.yaml", ["lr=1e-4", "steps=9"])
    assert (loaded.lr, loaded.steps) == (1e-4, 9)
    with pytest.raises(ConfigError, match="key=value"):
        recipe.load(tmp_path / "r.yaml", ["steps"])
    with pytest.raises(ConfigError, match="cannot be read"):
        recipe.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"'lr=\*a', line 1, column 1: aliases are not allowed"):
        recipe.load(tmp_path / "r.yaml", ["lr=*a"])
    (tmp_path / "r.yaml").write_text("base: x\n")
    with pytest.raises(ConfigError, match="no output, data"):
        recipe.load(tmp_path / "r.yaml")


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
BAD_YAML = [
    (LAUGHS.encode(), "aliases are not allowed"),
    (b"a: &a [*a]\n", "aliases are not allowed"),
    (b"base: x\nbase: y\n", "the key 'base' is there twice"),
    (b"seed: " + b"9" * 5000, "a value that cannot be read: "),
    (b"[" * 100_000, "nested too deeply"),
    (b"!!python/object/apply:os.getcwd []", "yaml, line 1, column 1: could not determine a constructor"),
    (b"? [a]\n: b\n", "line 1, column 3: .*found unhashable key"),
    (b"base: [", "line 1, column 8: while parsing a flow node, expected the node content"),
    (b"\xff\xfe", r"not UTF-8 text \(.*\): expected a recipe saved as UTF-8"),
    ("base: x".encode("utf-16"), "expected a recipe saved as UTF-8"),
    (b"b: c\na: \x00", r"line 2: the character '\\x00', which YAML does not allow"),
    (b"", "expected keys and values"),
    (b"[]", "expected keys and values"),
    (b"1: 2", "unknown key 1"),
    (b"#" * (yaml_file.LONGEST + 1), "longer than"),
    (b"base: x\noutput: y\ndata: {a: b}", "data="),
    (b"base: [x]\noutput: y\ndata: z", "base="),
    (b"base: x\noutput: y\ndata: z\nlr: .nan", "lr=nan"),
    (b"base: x\noutput: y\ndata: z\nwindow: 2001-01-01", "window="),
]


@pytest.mark.parametrize(("content", "said"), BAD_YAML, ids=[said for _, said in BAD_YAML])
def test_recipes_that_are_no_recipes(tmp_path, content, said):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        recipe.load(tmp_path / "r.yaml")
    assert "unicode string" not in str(refused.value)


def test_the_command(settings, tmp_path, capsys):
    import yaml

    from ahn.cli import main

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(tmp_path / "r.yaml"), "--check"]) == 0
    assert "gradient of q" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "r.yaml"), "steps=2"]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()
    for arguments, message in ((["stepps=2"], "did you mean 'steps'"), (["data=[none.txt]"], "no such file")):
        assert main(["train", str(tmp_path / "r.yaml"), f"output={tmp_path / 'other'}", *arguments]) == 2
        assert message in capsys.readouterr().err
