"""Training as it is run: several processes, kills, full disks, lost GPUs, data of all kinds and bad ones."""

import dataclasses
import errno
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from filelock import FileLock
from packaging.version import Version
from safetensors.torch import load_file, save_file

import ahn
import processes
from ahn.cli import main
from ahn.errors import BaseModelError, ConfigError, DocumentError, TrainingError
from ahn.train import checkpoints, data, recipe
from conftest import tiny
from tiny_tokenizer import tiny_tokenizer

GATES = {"store": "learned", "store_size": 8, "window": 16, "lossless": [32], "sinks": [4], "gate_lr": 1e-2}
SETTINGS = {
    "cell": "gated_deltanet",
    "length": 64,
    "batch": 4,
    "steps": 6,
    "lr": 1e-2,
    "save_every": 2,
    "log_every": 1,
    "lossless": [16, 32],
    "sinks": [0, 4],
    "window": 24,
    "kept_sinks": 4,
    "report_to": [],
}
# accelerate shards on accelerators only: it asks for the kind of process group, not for what torch can do. With this
# answer the rest of the way, accelerate's and torch's, is the one GPUs take.
SHARDED = """
import json, sys
from accelerate.state import DistributedType, PartialState
begin = PartialState.__init__
def begin_as_gpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = begin_as_gpus

import gc, torch
from transformers import TrainerCallback
from torch.distributed.tensor import DTensor
from ahn.train import run
build = run.build
def watched(recipe):
    made = build(recipe)
    whole = {p.data_ptr() for p in made.model.parameters() if p.dim() > 1}
    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights = list(made.model.parameters())
            shards = sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights)
            gc.collect()
            left = sum(type(o) is torch.nn.Parameter and o.data_ptr() in whole for o in gc.get_objects())
            if state.is_world_process_zero:
                json.dump({"shards": shards, "left": left}, open(recipe.output + "/shards.json", "w"))
    made.add_callback(Watch())
    return made
run.build = watched

from ahn.cli import main
sys.exit(main())
"""


SPOILT = """
import os, sys, torch
from ahn.train import distill
loss, calls = distill.loss, []
def spoilt(*args, **options):
    calls.append(1)
    found = loss(*args, **options)
    return found.nan_to_num() * torch.nan if len(calls) == 3 and os.environ["RANK"] == "1" else found
distill.loss = spoilt

from ahn.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base"), tiny_tokenizer()
    tiny(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def chats(count):
    """Of very different lengths, so that rows have different numbers of tokens that count."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"what of {i}? " * (1 + i % 7)},
                {"role": "assistant", "content": f"the cat sat on {i * i} mats " * (1 + i * i % 11)},
            ]
        }
        for i in range(count)
    ]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def run(base, tmp_path):
    """Writes a recipe and returns its path: `run(output, key=value, ...)`."""
    source = jsonl(tmp_path / "chats.jsonl", chats(60))

    def write(output, **changes):
        path = tmp_path / f"{output}.yaml"
        values = SETTINGS | {"base": base, "data": [source], "output": str(tmp_path / output)} | changes
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def losses(folder, log="log.json"):
    return [entry["loss"] for entry in json.loads((folder / log).read_text()) if "loss" in entry]


def weights(folder):
    return load_file(folder / "adapter" / "adapter.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_the_double_batch(run, tmp_path, base, kind):
    sharded, program = kind == "fsdp", []
    if sharded:
        (tmp_path / "sharded.py").write_text(SHARDED)
        program = [str(tmp_path / "sharded.py")]
    # a small rate: where a gradient is next to nothing, Adam makes a whole step of how it was rounded
    plan = {"checkpointing": sharded, "lr": 1e-3}
    if kind == "ddp":
        plan |= GATES | {"gate_steps": 4, "gate_lr": 1e-3}
    assert main(["train", run("one", **plan)]) == 0
    command = [*program, "train", run("two", batch=2, fsdp=sharded, **plan)]
    out = processes.two(tmp_path / "first.txt", *command)
    assert out.count("adapter in") == 1 and "Traceback" not in out
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    config = ahn.from_pretrained(base, tmp_path / "two" / "adapter").ahn_config
    places = {"store": "learned", "store_size": 8} if kind == "ddp" else {}
    assert config == ahn.AHNConfig("gated_deltanet", 16 if places else 24, 4, **places)
    if sharded:
        measured = json.loads((tmp_path / "two" / "shards.json").read_text())
        assert measured["shards"] == pytest.approx(0.5, abs=0.01)
        assert measured["left"] == 0, "whole weights of the base are still in memory"

    checkpoint = tmp_path / "two" / "checkpoint-6"
    assert not list(checkpoint.glob("*model*")), "a copy of the base"
    if not sharded and Version(transformers.__version__) < Version("5.23"):
        return  # it cannot read an optimiser back in several processes on CPUs ("cpu:0"); on GPUs it can
    (checkpoint / checkpoints.SEAL).unlink()
    before = losses(tmp_path / "two")
    assert "passed over" in processes.two(tmp_path / "second.txt", *command, "--resume")
    assert losses(tmp_path / "two") == before
    for name, tensor in found.items():
        assert torch.equal(weights(tmp_path / "two")[name], tensor), name


@pytest.mark.slow
def test_processes_stop_together(run, tmp_path):
    (tmp_path / "spoilt.py").write_text(SPOILT)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(tmp_path / "spoilt.py"), "train", run("r", batch=2)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stdout.count("step 3: the loss or its gradient is NaN") == 2
    assert checkpoints.latest(tmp_path / "r").name == "checkpoint-2"


def test_one_process_cannot_shard(run, capsys):
    assert main(["train", run("alone", fsdp=True)]) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["cells", "gates"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(run, tmp_path, stage):
    long, folder = {"steps": 60, "save_every": 5}, tmp_path / "killed"
    if stage == "gates":
        long, folder = GATES | {"gate_steps": 60, "steps": 4, "save_every": 5}, folder / "gates"
    process = processes.start(tmp_path / "said.txt", "train", run("killed", **long))
    deadline = time.monotonic() + 100
    while not (folder / "checkpoint-10" / checkpoints.SEAL).exists():
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    time.sleep(0.13)  # somewhere in a later step, or while it saves
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert main(["train", run("killed", **long), "--resume"]) == 0
    assert main(["train", run("whole", **long)]) == 0
    assert len(losses(tmp_path / "whole")) == long["steps"]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    if stage == "gates":
        curves = [losses(tmp_path / name, "gates.json") for name in ("killed", "whole")]
        assert curves[0] == curves[1] and len(curves[0]) == 60
    rates = [
        [entry["learning_rate"] for entry in json.loads((tmp_path / name / "log.json").read_text()) if "loss" in entry]
        for name in ("killed", "whole")
    ]
    assert rates[0] == rates[1]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "killed")[name], tensor), name


def test_a_finished_run_takes_no_step_more(run, tmp_path, capsys):
    assert main(["train", run("r")]) == 0
    expected, curve = weights(tmp_path / "r"), losses(tmp_path / "r")
    (tmp_path / "r" / "log.json").unlink()
    (tmp_path / "r" / "adapter" / "adapter.safetensors").unlink()
    capsys.readouterr()
    assert main(["train", run("r"), "--resume"]) == 0
    assert "step " not in capsys.readouterr().err
    assert losses(tmp_path / "r") == curve and checkpoints.latest(tmp_path / "r").name == "checkpoint-6"
    for name, tensor in expected.items():
        assert torch.equal(weights(tmp_path / "r")[name], tensor), name


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, caplog):
    """Each of the ways, one after the other: every resumed run writes the checkpoint anew."""
    assert main(["train", run("r")]) == 0
    expected, curve = weights(tmp_path / "r"), losses(tmp_path / "r")
    newest = tmp_path / "r" / "checkpoint-6"
    adapter, seal = newest / "adapter.safetensors", newest / checkpoints.SEAL
    damages = {
        "cut": lambda: os.truncate(newest / "optimizer.pt", 1000),
        "zeros": lambda: adapter.write_bytes(bytes(adapter.stat().st_size)),
        "removed": (newest / "trainer_state.json").unlink,
        "unfinished": seal.unlink,
        "no list": lambda: seal.write_text("["),
    }
    for name, damage in damages.items():
        caplog.clear()
        damage()
        assert checkpoints.latest(tmp_path / "r").name == "checkpoint-4", name
        assert main(["train", run("r"), "--resume"]) == 0, name
        assert "checkpoint-6: passed over" in caplog.text, name
        assert losses(tmp_path / "r") == curve, name
        assert all(torch.equal(weights(tmp_path / "r")[key], tensor) for key, tensor in expected.items()), name
        assert checkpoints.latest(tmp_path / "r") == newest, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed: No space left"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(run, tmp_path, monkeypatch, capsys, error):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise error
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    assert main(["train", run("r")]) == 2
    said = capsys.readouterr().err
    folder = tmp_path / "r"
    assert f"{folder / 'checkpoint-4'}: cannot be written" in said and "No space left" in said
    assert f"to go on from {folder / 'checkpoint-2'}" in said and "Traceback" not in said
    assert not (folder / "checkpoint-4").exists()
    monkeypatch.undo()
    assert main(["train", run("r"), "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"), "a GPU was lost"),
        (RuntimeError("CUDA error: unspecified launch failure"), "a GPU was lost"),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), "connection to another process"),
        (torch.OutOfMemoryError("CUDA out of memory."), "checkpointing: true"),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_lost_gpu_is_said_with_what_to_go_on_from(run, tmp_path, monkeypatch, capsys, error, message, steps):
    from ahn.train import distill

    loss, calls = distill.loss, []

    def lost(*args, **kwargs):
        calls.append(1)
        if len(calls) > steps:
            raise error
        return loss(*args, **kwargs)

    monkeypatch.setattr(distill, "loss", lost)
    assert main(["train", run("r")]) == 2
    said = capsys.readouterr().err
    assert f"step {steps + 1}:" in said and message in said and "Traceback" not in said
    assert ("checkpoint-2" if steps else "no checkpoint") in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [{}, {"loss": "attention"}, GATES | {"gate_steps": 6}], ids=["kl", "attention", "gates"]
)
@pytest.mark.parametrize("save_every", [1, 100])
def test_a_rate_that_explodes_saves_nothing(run, tmp_path, capsys, plan, save_every):
    plan = plan | {"lr": 1e30, "gate_lr": 1e30, "save_every": save_every, "clip": 1e30}
    assert main(["train", run("r", **plan)]) == 2
    said = capsys.readouterr().err
    assert "the loss or its gradient is NaN or infinite" in said and "Traceback" not in said
    assert "no checkpoint was written yet" in said
    assert not list((tmp_path / "r").rglob("*.safetensors"))


def test_the_last_step_may_explode_too(run, tmp_path, capsys):
    assert main(["train", run("r", lr=1e30, steps=1, warmup=0)]) == 2
    assert "NaN or infinite" in capsys.readouterr().err
    assert not list((tmp_path / "r").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_with_nan_keeps_its_last_good_checkpoint(run, tmp_path, monkeypatch, capsys, where):
    from ahn.train import distill

    loss, calls = distill.loss, []

    def spoilt(model, *args, **kwargs):
        calls.append(1)
        found = loss(model, *args, **kwargs)
        if len(calls) < 5:
            return found
        if where == "loss":
            return found * torch.nan
        found.register_hook(lambda gradient: gradient * torch.inf)
        return found

    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **o: (steps.append(1), step(self, *a, **o))[1])
    with monkeypatch.context() as patch:
        patch.setattr(distill, "loss", spoilt)
        assert main(["train", run("r")]) == 2
    said, folder = capsys.readouterr().err, tmp_path / "r"
    assert "step 5: the loss or its gradient is NaN" in said
    assert f"to go on from {folder / 'checkpoint-4'}" in said
    assert len(steps) == 4
    assert not (folder / "adapter").exists()
    assert main(["train", run("r"), "--resume"]) == 0


def test_nan_in_the_base_is_named(run, base, tmp_path, capsys):
    spoilt, tokenizer = tmp_path / "spoilt", tiny_tokenizer()
    model = tiny(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(spoilt)
    tokenizer.save_pretrained(spoilt)
    assert main(["train", run("r", base=str(spoilt))]) == 2
    said = capsys.readouterr().err
    assert "step 1:" in said and "model.layers.1.mlp.up_proj.weight" in said and "no checkpoint" in said


@pytest.mark.slow
@pytest.mark.parametrize("where", ["weights", "optimiser"])
def test_a_checkpoint_with_nan_is_passed_over(run, tmp_path, caplog, where):
    assert main(["train", run("r")]) == 0
    newest = tmp_path / "r" / "checkpoint-6"
    if where == "weights":
        tensors = load_file(newest / "adapter.safetensors")
        tensors["layers.0.A_log"][0] = torch.nan
        save_file(tensors, newest / "adapter.safetensors")
    else:
        state = torch.load(newest / "optimizer.pt")
        state["state"][0]["exp_avg"].fill_(torch.inf)
        torch.save(state, newest / "optimizer.pt")
    checkpoints.seal(newest)
    assert checkpoints.latest(tmp_path / "r").name == "checkpoint-4"
    assert "checkpoint-6: passed over" in caplog.text and "NaN" in caplog.text


def test_what_a_killed_save_left_is_swept(run, tmp_path):
    assert main(["train", run("r", steps=2)]) == 0
    torn = tmp_path / "r" / "checkpoint-4"
    torn.mkdir()
    (torn / "optimizer.pt").write_bytes(b"half")
    assert main(["train", run("r", steps=2), "--resume"]) == 0
    assert not torn.exists() and checkpoints.latest(tmp_path / "r").name == "checkpoint-2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [({"cell": "mamba2"}, "adapter for cell='gated_deltanet'"), ({"feature_maps": 1}, "adapter for feature_maps=0")],
)
def test_checkpoints_of_another_memory_are_not_gone_on_from(run, tmp_path, capsys, change, message):
    assert main(["train", run("r", steps=2)]) == 0
    before = sorted((tmp_path / "r" / "checkpoint-2").iterdir())
    assert main(["train", run("r", **change), "--resume"]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert sorted((tmp_path / "r" / "checkpoint-2").iterdir()) == before


def test_the_newest_checkpoints_are_kept(run, tmp_path):
    assert main(["train", run("r", save_every=1)]) == 0
    assert [folder.name for folder in checkpoints.found(tmp_path / "r")] == ["checkpoint-5", "checkpoint-6"]


def test_one_run_at_a_time_in_a_folder(run, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    with FileLock(tmp_path / "r" / ".lock"):
        assert main(["train", run("r")]) == 2
    assert "another run writes there" in capsys.readouterr().err
    assert not list((tmp_path / "r").glob("*.json"))
    assert main(["train", run("r")]) == 0


def test_a_full_disk_between_checkpoints(run, monkeypatch, capsys):
    from ahn.train import progress

    def full(self, args, state, *others, **options):
        if state.global_step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(progress.Progress, "on_log", full)
    assert main(["train", run("r")]) == 2
    said = capsys.readouterr().err
    assert "No space left on device; to go on from" in said and "checkpoint-2" in said and "Traceback" not in said


def test_a_run_that_is_interrupted_says_how_to_go_on(run, monkeypatch, capsys):
    from ahn.train import distill

    loss, calls = distill.loss, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    monkeypatch.setattr(distill, "loss", interrupted)
    assert main(["train", run("r")]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("interrupted at step 4; to go on from") and "checkpoint-2" in said


def test_what_a_run_says(run, base, monkeypatch, capsys, caplog):
    from ahn.train import trainer

    monkeypatch.setattr(trainer, "get_available_reporting_integrations", lambda: [])
    assert main(["train", run("r", log_every=3, report_to=["clearml"])]) == 0
    out, said = capsys.readouterr()
    assert "nothing is written for clearml, which is not installed" in caplog.text
    assert out.count("\n") == 1 and out.startswith("adapter in")
    lines = said.splitlines()
    assert any(line.startswith(f"{base} with gated_deltanet: ") and line.endswith("train, on cpu") for line in lines)
    assert any("rows of 64 tokens" in line for line in lines)
    assert any("6 steps of 4 rows" in line for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("   ")[0] for line in steps] == ["step 3 of 6", "step 6 of 6"]
    assert all("loss " in line and "tokens/s" in line for line in steps)
    assert "it/s" not in said and "{" not in said


def test_sharding_needs_gpus(run, monkeypatch):
    from ahn.train import prepare

    class Processes:
        device, num_processes, distributed_type = torch.device("cpu"), 2, "MULTI_CPU"

    monkeypatch.setattr(prepare, "PartialState", lambda **options: Processes)
    with pytest.raises(ConfigError, match="over GPUs only"):
        prepare.build(recipe.load(run("r", fsdp=True)))


def test_home_in_paths(run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    read = recipe.load(run("r"), ["output=~/runs/a", "data=[~/a.txt, 'hub:a/b']"])
    assert read.output == "/home/someone/runs/a" and read.data == ("/home/someone/a.txt", "hub:a/b")


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for key in dataclasses.fields(recipe.Recipe):
        assert re.search(rf"\b{key.name}\b.*:", said), key.name
    assert "lr=0.001" in said and "limit=null" in said


def test_only_the_recipe_is_required(capsys):
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("required: recipe\n")


@pytest.mark.slow
def test_other_errors_keep_their_traceback(run, monkeypatch):
    from ahn.train import distill

    def broken(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(distill, "loss", broken)
    assert main(["train", run("a")]) == 2  # one line, and where the rest is
    monkeypatch.setenv("AHN_DEBUG", "1")
    with pytest.raises(RuntimeError, match="shapes differ") as caught:
        main(["train", run("r")])
    assert not isinstance(caught.value, TrainingError)


@pytest.mark.slow
def test_an_output_folder_belongs_to_one_run(run, capsys, caplog):
    assert main(["train", run("r"), "--resume", "steps=2"]) == 0
    assert "no checkpoint to go on from" in caplog.text
    assert main(["train", run("r")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", run("r"), "--resume", "steps=4", "lr=1e-3"]) == 0
    assert "lr: 0.01 before, 0.001 now" in caplog.text and "steps: 2 before, 4 now" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_has_the_rate_it_is_given(run, tmp_path):
    assert main(["train", run("r"), "steps=2"]) == 0
    assert main(["train", run("r"), "--resume", "steps=6", "lr=1e-3"]) == 0
    assert main(["train", run("anew"), "steps=6", "lr=1e-3"]) == 0
    resumed, anew = (
        {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry and entry["step"] > 2}
        for log in (json.loads((tmp_path / name / "log.json").read_text()) for name in ("r", "anew"))
    )
    assert resumed == anew and anew


# data


def test_texts_are_tokenized_together_and_rows_stay_the_same(tmp_path, tokenizer, monkeypatch):
    records = [*chats(30), *({"text": "once upon a time " * (i % 9)} for i in range(30))]
    source = jsonl(tmp_path / "a.jsonl", records)
    together = data.rows([source], tokenizer, 64)
    monkeypatch.setattr(data, "CHARACTERS_AT_ONCE", 1)
    alone = data.rows([source], tokenizer, 64)
    assert torch.equal(together.ids, alone.ids) and torch.equal(together.counts, alone.counts)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr("ahn.train.rows.WORTH_KEEPING_S", 0.0)
    return tmp_path / "cache" / "rows"


def same(a, b):
    return torch.equal(a.ids, b.ids) and torch.equal(a.counts, b.counts)


def test_rows_are_kept(tmp_path, tokenizer, kept, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", chats(30))
    first = data.rows([source], tokenizer, 64, cache=kept)
    assert same(first, data.rows([source], tokenizer, 64))
    with monkeypatch.context() as patch:
        patch.setattr(data, "_tokens", None)
        assert same(first, data.rows([source], tokenizer, 64, cache=kept))
        for changed in ({"length": 32}, {"limit": 100}, {"seed": 1}, {"tokenizer": tiny_tokenizer("qwen")}):
            with pytest.raises(TypeError):
                data.rows(**({"sources": [source], "tokenizer": tokenizer, "length": 64, "cache": kept} | changed))
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() * 2)
    assert len(data.rows([source], tokenizer, 64, cache=kept)) > len(first)


def test_damaged_and_unwritable_caches_are_no_error(tmp_path, tokenizer, kept, caplog):
    source = jsonl(tmp_path / "a.jsonl", chats(30))
    first = data.rows([source], tokenizer, 64, cache=kept)
    (file,) = kept.glob("*.safetensors")
    os.truncate(file, 100)
    assert same(first, data.rows([source], tokenizer, 64, cache=kept))
    assert "damaged" in caplog.text
    assert same(first, data.rows([source], tokenizer, 64, cache=Path(source)))  # a file where a folder should be
    assert "not kept" in caplog.text


def test_datasets_from_a_folder_and_parquet(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    records = [{"messages": record["messages"], "document": None} for record in chats(30)]
    expected = data.rows([jsonl(tmp_path / "a.jsonl", chats(30))], tokenizer, 64)
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "folder" / "train.parquet")
    for source in (f"hub:{tmp_path / 'folder'}", f"hub:{tmp_path / 'folder'}:train", "folder/train.parquet"):
        name = source if source.startswith("hub:") else str(tmp_path / source)
        assert same(expected, data.rows([name], tokenizer, 64, cache=tmp_path / "cache"))
    for source, message in (
        (f"hub:{tmp_path / 'folder'}:nothing", "cannot be loaded.*nothing"),
        (f"hub:{tmp_path / 'none'}", "no such folder"),
        (str(tmp_path / "none.parquet"), "no such file"),
    ):
        with pytest.raises(DocumentError, match=message):
            data.rows([source], tokenizer, 64)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DocumentError, match="cannot be loaded"):
        data.rows([str(tmp_path / "bad.parquet")], tokenizer, 64)


def test_hub_datasets_are_streamed(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, read = [], []

    def stream():
        for record in chats(1000):
            read.append(record)
            yield record

    def load_dataset(path, config=None, **options):
        asked.append((path, config, options))
        return stream()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "CHARACTERS_AT_ONCE", 1000)
    data.rows(["hub:nvidia/ChatQA2-Long-SFT-data/long_sft:train"], tokenizer, 64, limit=128)
    assert asked == [("nvidia/ChatQA2-Long-SFT-data", "long_sft", {"split": "train", "streaming": True})]
    assert 0 < len(read) < 50
    data.rows(["hub:owner/books"], tokenizer, 64, limit=64)
    assert asked[1] == ("owner/books", None, {"split": "train", "streaming": True})
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked, though it retries for long"))
    with pytest.raises(DocumentError, match=r"hub:owner/books: cannot be loaded: no route"):
        data.rows(["hub:owner/books"], tokenizer, 64)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DocumentError, match=r"pip install 'ahn\[train\]'"):
        data.rows(["hub:owner/books"], tokenizer, 64)


def test_a_document_precedes_the_first_question(tmp_path, tokenizer):
    record = {
        "document": "the cat sat on the mat.",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "who sat?"},
            {"role": "assistant", "content": "the cat"},
            {"role": "user", "content": "where?"},
        ],
        "answers": ["on the mat", "the mat"],
    }
    rows = data.rows([jsonl(tmp_path / "a.jsonl", [record] * 5)], tokenizer, 32)
    text = tokenizer.decode(rows.ids.flatten())
    assert "the cat sat on the mat.\n\nwho sat?" in text
    predicted = tokenizer.decode(rows.ids.flatten()[1:][rows.counts.flatten()[:-1]])
    assert "the cat<|end|>" in predicted and "on the mat<|end|>" in predicted
    assert "who" not in predicted and "where" not in predicted and "sat on the mat." not in predicted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n", "empty"),
        ("a.txt", b"too short", "tokens to train on: expected at least the 64 of one row"),
        ("a.txt", b"\0\1\2" * 99, "not text"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"not UTF-8 text \(.*\): expected records in UTF-8"),
        ("a.jsonl", b"[1]\n", "list: expected a record"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', "no 'role'"),
        ("a.jsonl.xz", b"not xz", "cannot be read"),
        ("a.csv", b"a,b\n", "unknown kind of file '.csv'; expected .txt"),
        ("a.json", b"{}", "unknown kind of file '.json'"),
    ],
)
def test_bad_sources(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        data.rows([str(tmp_path / name)], tokenizer, 64)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 5}, "'text' is 5: expected text"),
        ({"text": None}, "'text' is None: expected text"),
        ({"messages": "hi"}, "'messages' is 'hi': expected a list of records"),
        ({"messages": ["hi"]}, r"'messages' is \['hi'\]: expected a list of records"),
        ({"messages": [{"role": 1}]}, "'role' is 1: expected text"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "'content' is .*: expected text"),
        ({"messages": [{"role": "user", "content": "hi"}], "document": 3}, "'document' is 3: expected text"),
        ({"messages": [{"role": "user", "content": "hi"}], "answers": "yes"}, "'answers' is 'yes': .* list of texts"),
        ({"paragraphs": {"context": "a"}}, "'paragraphs' is .*: expected a list of records"),
        ({"context": 3, "qas": []}, "'context' is 3: expected text"),
        ({"context": "a", "qas": [{"question": "b", "answers": [{"text": "c"}]}]}, "'answers' is .* list of texts"),
        ({"context": "a", "input": 3, "answers": ["b"]}, "'input' is 3: expected text"),
    ],
)
def test_values_of_the_wrong_type(tmp_path, tokenizer, record, message):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, record])
    with pytest.raises(DocumentError, match=f"a.jsonl, line 2: not of the shape that its keys promise: {message}"):
        data.rows([source], tokenizer, 64)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["a.txt", "a.md.xz"])
def test_texts_of_other_encodings(tmp_path, tokenizer, encoding, name):
    text = "the cat sat on the mat, the caf\xe9 sat.\n" * 20
    (tmp_path / "expected.txt").write_text(text, encoding="utf-8")
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    found, expected = (data.rows([str(tmp_path / file)], tokenizer, 64) for file in (name, "expected.txt"))
    assert torch.equal(found.ids, expected.ids)


def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path, tokenizer):
    lines = [tmp_path / f"{name}.jsonl" for name in ("half", "replaced")]
    for path, sign in zip(lines, ["\\ud800", "\\ufffd"], strict=True):
        path.write_text(f'{{"text": "the cat {sign} sat"}}\n' * 40)
    half, replaced = (data.rows([str(path)], tokenizer, 64) for path in lines)
    assert torch.equal(half.ids, replaced.ids)


def test_folders_are_no_sources(tmp_path, tokenizer):
    for name in ("folder", "folder.jsonl", "folder.txt"):
        (tmp_path / name).mkdir()
        with pytest.raises(DocumentError, match="is a folder; expected"):
            data.rows([str(tmp_path / name)], tokenizer, 64)


def test_tokenizers_without_what_is_needed(tmp_path, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(BaseModelError, match="no chat template"):
        data.rows([jsonl(tmp_path / "a.jsonl", chats(30))], tokenizer, 64)
    tokenizer.eos_token = None
    with pytest.raises(BaseModelError, match="no end-of-text token"):
        data.rows([jsonl(tmp_path / "b.jsonl", [{"text": "once " * 99}])], tokenizer, 64)


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (64, 1), (65, 2), (10**6, None)])
def test_a_limit_is_of_tokens(tmp_path, tokenizer, limit, count):
    (tmp_path / "a.txt").write_text("once upon a time " * 200)
    every = data.rows([str(tmp_path / "a.txt")], tokenizer, 64)
    limited = data.rows([str(tmp_path / "a.txt")], tokenizer, 64, limit)
    assert same(limited, data.Rows(every.ids[:count], every.counts[:count])) and len(every) > 2


def test_byte_order_marks_are_not_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("once upon a time " * 50, encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("once upon a time " * 50)
    with_mark, without = (data.rows([str(tmp_path / name)], tokenizer, 64) for name in ("a.txt", "b.txt"))
    assert same(with_mark, without)


# recipes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=abc", "steps='abc': expected an integer"),
        ("steps=2.5", "steps=2.5: expected an integer"),
        ("steps=true", "steps=True: expected an integer"),
        ("lr=-1", "lr=-1.0: expected a number above 0"),
        ("lr=.nan", "lr=nan"),
        ("batch=0", "batch=0: expected an integer of at least 1"),
        ("fsdp=maybe", "fsdp='maybe': expected true or false"),
        ("base=3", "base=3: expected text"),
        ("data=[1]", "data=[1]: expected a list, each text"),
        ("data=", "data=[None]: expected a list"),
        ("sinks=[a]", "sinks=['a']: expected a list, each an integer"),
        ("sinks=[]", "sinks=[]: expected integers"),
        ("lossless=64", "lossless=[64] with length=64: expected a size of 8 (1/8 of the length) to 63"),
        ("sinks=[32,64]", "sinks=[32, 64] with a lossless size of 16: expected sinks of at most 8"),
        ("report_to=tensorbord", "unknown logger 'tensorbord': expected one of"),
        ("output=long.jsonl", "output='long.jsonl': long.jsonl is no folder"),
        ("output=long.jsonl/r", "long.jsonl is no folder"),
        ("output=/proc/r", "output='/proc/r': cannot be written: "),
        ("data=none.jsonl", "none.jsonl: no such file"),
        ("data=empty.txt", "empty.txt: empty"),
        ("warmup=7", "warmup=7.0: expected a share"),
        ("limit=0", "limit=0: expected"),
        ("cell=lstm", "lstm"),
        ("feature_maps=3", "feature_maps=3: expected one of 0, 1, 2, 4"),
        ("memory_positions=all", "memory_positions='all': expected one of rope, none"),
        ("window=0", "window=0: expected"),
        ("seed=-1", "seed=-1: expected an integer of 0 to 2**32 - 1"),
        ("seed=4294967296", "seed=4294967296: expected"),
        ("1=2", "unknown key"),
        ("length=100000 lossless=20000", "expected at least the 100000 of one row"),
        ("length=1024 lossless=256", "length=1024: the base, which is the teacher, has 512 positions"),
        ("length=1024 lossless=600 loss=ce", "lossless=[600]: the base has 512 positions"),
        ("batch=5000", "rows of 64 tokens: expected at least the 5000 x 1"),
        ("data=folder", "folder: is a folder"),
    ],
)
def test_bad_recipes_are_said_in_one_line(run, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    monkeypatch.setattr("ahn.train.prepare.load_base", lambda *args, **options: pytest.fail("the base was loaded"))
    long = jsonl(tmp_path / "long.jsonl", chats(300))
    changes = {} if "100000" in message else {"data": [long]}
    assert main(["train", run("r", **changes), *change.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_tokenizer_of_another_base(run, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ahn.train.prepare.load_base", lambda *args, **options: pytest.fail("the base was loaded"))
    tiny(vocab_size=100, eos_token_id=1).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    assert main(["train", run("r", base=str(tmp_path / "small"))]) == 2
    assert "its embedding has 100 rows" in capsys.readouterr().err


def test_nothing_to_predict(run):
    from ahn.train.prepare import _check_rows

    rows = data.Rows(torch.zeros(0, 64, dtype=torch.int32), torch.zeros(0, 64, dtype=torch.bool))  # all left out
    with pytest.raises(DocumentError, match="no token is to be predicted behind the first 16 of 64"):
        _check_rows(rows, recipe.load(run("r")), tiny().config, 1)


def test_an_empty_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("")
    with pytest.raises(ConfigError, match="expected keys and values"):
        recipe.load(tmp_path / "r.yaml", ["steps=3"])


@pytest.mark.parametrize(("fsdp", "expected"), [(False, (None, "cuda:1")), (True, (torch.bfloat16, "cpu"))])
def test_each_process_loads_the_base_where_it_belongs(run, monkeypatch, fsdp, expected):
    from ahn.train import prepare

    class Second:
        device, num_processes, distributed_type = torch.device("cuda", 1), 2, "MULTI_GPU"

    class LoadedError(Exception):
        pass

    def load_base(base, dtype=None, device=None):
        raise LoadedError(dtype, str(device))

    monkeypatch.setattr(prepare, "PartialState", lambda **options: Second)
    monkeypatch.setattr(prepare, "load_base", load_base)
    with pytest.raises(LoadedError) as loaded:
        prepare.build(recipe.load(run("r", fsdp=fsdp)))
    assert loaded.value.args == expected
