"""Parts of the benchmarks that could be wrong without anyone seeing it."""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import ahn
from conftest import retrieval, tiny, with_memory

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("no benchmarks in this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))


def test_flops_of_a_step():
    from ahn.cost import PAPER
    from ahn.train.recipe import from_dict
    from speeds import train

    shape = PAPER["qwen2.5-3b"]
    recipe = from_dict(train.RECIPE | {"length": 1024, "batch": 2})
    weights = 36 * (2 * 2048 * (2048 + 256) + 3 * 2048 * 11008)
    pairs, kept = 1024 * 1024 // 2, 512 * 512 // 2 + 512 * 512
    attention = 36 * 4 * 2048 * (pairs + 3 * kept)
    cells = 36 * 512 * 3 * 2 * (2 * 16 * 128 * 128 + 3 * 2048 * 16)
    head = 512 * 3 * 2 * 2048 * 151936
    assert train.flops(shape, recipe, 500, 12) == 2 * (3 * 2 * 1024 * weights + attention + cells + head)


def test_floors_of_a_gpu():
    """Bytes of a step and products of reading, by hand, of Qwen2.5-3B with 32,640 + 128 lossless tokens."""
    from ahn.cost import PAPER
    from speeds import gpu

    floors = gpu.Floors(PAPER["qwen2.5-3b"], 2, 32640, 128, gpu.Ceilings(matmul=1e15, copy=1e12))
    linear = 36 * (2 * 2048 * 128 * (16 + 2) + 3 * 2048 * 11008)
    cell = 36 * (3 * 2048 * 16 + 16 * 128 * 128 + 3 * 16 + 128)
    head = 151936 * 2048
    kept, state = 36 * 2 * 2 * 128 * 32768, 36 * 16 * 128 * 128
    expected = 2 * (linear + cell + head + 8 * kept) + 8 * 2 * 4 * state
    assert floors.decode_bytes("gated_deltanet", 8, 10**6) == expected
    assert floors.decode("gated_deltanet", 8, 10**6) == pytest.approx(expected / 1e12)
    full = 2 * (linear + head + 36 * 2 * 2 * 128 * 65536)
    assert floors.decode_bytes("full", 1, 65536) == full
    reading = 2 * linear * 32768 + 36 * 2 * 2048 * 32768**2 + 2 * head
    assert floors.read("gated_deltanet", 1, 32768) == pytest.approx(reading / 1e15)
    gb = [round(floors.decode_bytes("gated_deltanet", batch, 131072) / 1e9, 1) for batch in (1, 8, 32)]
    pflop = [round(floors.read_flops("gated_deltanet", 1, length) / 1e15, 2) for length in (65536, 131072, 2**20)]
    assert gb == [7.5, 16.5, 47.3] and pflop == [0.84, 1.84, 15.84]  # as in docs/performance.md


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Runs benchmarks/speeds/gpu.py on tiny shapes; returns whether it ran to its end, its rows and what it skipped."""
    import common
    from speeds import gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "matmul_rate", lambda device: 1e12)
    monkeypatch.setattr(gpu, "copy_rate", lambda device: 1e11)

    def run(**changes):
        options = {"seconds": 600, "only": None, "base": None, "cell": "gated_deltanet", "tiny": True, "authors": None}
        options |= {"profile": False, "raises": False, "name": "gpu"} | changes
        whole = gpu.Bench(argparse.Namespace(**options)).run()
        written = json.loads((tmp_path / "gpu.json").read_text())
        return whole, written["rows"], written["skipped"]

    return run


@pytest.mark.slow
def test_a_table_of_a_gpu(table):
    whole, rows, skipped = table(only=["gated_deltanet", "full:decode"], raises=True)
    assert whole and len(skipped) == 1
    kinds = [(row["cell"], row["what"]) for row in rows]
    assert kinds == [*2 * [("gated_deltanet", "decode")], ("gated_deltanet", "read"), *2 * [("full", "decode")],
                     ("gated_deltanet", "load")]  # fmt: skip
    assert rows[2]["cache_over_model"] == 0
    assert rows[-1]["file_mb"] > 0.02 and rows[-1]["load_s"] < rows[-1]["first_token_s"]


@pytest.mark.slow
@pytest.mark.parametrize("recovers", [True, False])
def test_a_cell_that_fails_costs_no_other(table, monkeypatch, recovers):
    from speeds import gpu

    def broken(*args):
        raise RuntimeError("no memory\nof it")

    monkeypatch.setattr(gpu, "generate", broken)
    monkeypatch.setattr(gpu.Bench, "recovers", lambda bench: recovers)
    whole, rows, skipped = table(only=["gated_deltanet:decode", "read:full"])
    assert whole == recovers
    assert rows[0]["error"] == "RuntimeError: no memory" and rows[0]["decode_ms"] > 0
    assert len(rows) == (3 if recovers else 1) and not any("error" in row for row in rows[1:])
    assert recovers or [text.partition(": ")[0] for text in skipped] == [
        "tiny:gated_deltanet:decode:2:300", "tiny:full:read:1:500",
    ]  # fmt: skip


def test_real_weights_on_a_gpu(table, tmp_path, monkeypatch):
    from speeds import _measures
    from tiny_base import write_base

    base, _ = write_base(tmp_path)
    monkeypatch.setattr(_measures, "ANSWER", 8)
    whole, rows, _ = table(base=base, raises=True)
    assert whole and [row["length"] for row in rows] == [300, 500]
    assert all(row["memory"] == "gated_deltanet" and row["answer_tokens_per_s"] > 0 for row in rows)


def test_a_share_for_the_store(tmp_path):
    from common import put_on, set_lossless

    model = with_memory(tiny(), window=12, sinks=2, store="recency", store_size=36)
    ahn.save_adapter(model, tmp_path / "a")
    for share, sizes in (("", (36, 12)), ("@0.25", (12, 36)), ("@none", (0, 12))):
        put_on(model, f"{tmp_path / 'a'}{share}")
        assert (model.ahn_config.store_size, model.ahn_config.window) == sizes
    put_on(model, f"{tmp_path / 'a'}@0.25")
    set_lossless(model, 26, 2)
    assert (model.ahn_config.store_size, model.ahn_config.window) == (6, 18)


SLOW = ("lengths", "stream")  # they start processes
TOOLS = [
    pytest.param(folder, path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
    for folder in ("speeds", "losses")
    for path in sorted((BENCHMARKS / folder).glob("[!_]*.py"))
    if path.stem != "kernels"
]


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "what"), TOOLS)
def test_a_tool_runs_on_a_tiny_model(folder, what, tmp_path, monkeypatch):
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for name in ("matmul_rate", "copy_rate"):  # large products, which only real runs need
        for module in ("common", "speeds.gpu", "speeds.train"):
            monkeypatch.setattr(import_module(module), name, lambda device: 1e12, raising=False)
    common.main(folder, "", [what, "--tiny"])
    written = json.loads((tmp_path / "local.json").read_text())
    assert written.pop("environment").keys() >= {"date", "commit", "device", "threads", "python", "torch"}
    assert written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_need_a_gpu():
    import common

    with pytest.raises(SystemExit, match="no GPU here"):
        common.main("speeds", "", ["kernels", "--tiny"])


def test_data_of_a_few_records(capsys):
    import data

    data.main(["--tiny"])
    assert capsys.readouterr().out.count("2 documents") == 3


def test_adapters_are_put_together(tmp_path):
    import data
    from ahn.adapter_files import read_adapter, write_adapter

    for name, store in (("cells", {}), ("gates", {"store": "learned", "store_size": 8})):
        ahn.save_adapter(with_memory(tiny(), "deltanet", 24, 8, **store), tmp_path / name)
    heads = read_adapter(tmp_path / "cells")
    heads.retrieval = retrieval()
    write_adapter(heads, tmp_path / "heads")
    parts = [str(tmp_path / name) for name in ("cells", "whole", "gates", "heads")]
    data.main(["join", *parts[:2], "--gates", parts[2], "--heads", parts[3]])
    whole, gates = (read_adapter(tmp_path / name) for name in ("whole", "gates"))
    assert (whole.config.store, whole.config.store_size) == ("learned", 8) and whole.retrieval is not None
    stored = {name for name in whole.tensors if ".store." in name}
    assert stored and stored == {name for name in gates.tensors if ".store." in name}


SUITES = [*sorted((BENCHMARKS / "suites").glob("*.yaml")), BENCHMARKS.parent / "docs" / "evaluation.md"]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suites_say_what_ahn_eval_knows(path, tmp_path):
    from ahn.cli import eval as command
    from ahn.eval import policies, suite, tasks
    from ahn.recall import finders

    if path.suffix == ".md":
        (tmp_path / "page.yaml").write_text(path.read_text("utf-8").partition("```yaml\n")[2].partition("```")[0])
        path = tmp_path / "page.yaml"
    for keys in suite.load(path).runs:
        run = command._parsed(keys, str(path))
        assert tasks.expand(run.tasks) and all(policies.get(name) for name in run.policies)
        assert run.finder in finders.names()
