"""A calibration that is chosen on results: `ahn calibrate`."""

import json

import pytest

from ahn import cli
from ahn.adapter_files import read_adapter, write_adapter
from ahn.eval import results
from conftest import retrieval
from tiny_base import write_base


def results_of(folder, task, policy="recall", adapter="heads", rounds=1, **signals):
    """Three questions, with these signals of support."""
    config = {
        "version": results.VERSION, "task": task, "suite": "qa", "kind": "generate", "policy": policy, "base": "b",
        "cost": {}, "length": 16384, "adapter": adapter,
        "settings": {"recall": {"tokens": 512, "finder": "fused", "rounds": rounds}},
    }  # fmt: skip
    path = folder / task / f"{policy}-{adapter}-{rounds}"
    path.mkdir(parents=True)
    results.write_config(path, config)
    for i in range(3):
        support = {name: value[i] for name, value in signals.items()}
        row = {"id": str(i), "prompt": "p", "score": 0.5, "found": i / 2, "support": support}
        results.append(path, 0, row)


def test_calibration_of_results(tmp_path, capsys):
    for part in ("a", "b"):
        low = 3.0 if part == "a" else 1.0
        results_of(tmp_path / part, "qa/squad", said=[low, 4, 5], words=[0, 1, 1])
        results_of(tmp_path / part, "qa/squad-absent", said=[-1, 0, 3.5 if part == "b" else 1], words=[0, 1, 0])
        results_of(tmp_path / part, "qa/squad", rounds=2, said=[-9, -9, -9], words=[0, 0, 0])
        results_of(tmp_path / part, "qa/squad", policy="rag", said=[-9, -9, -9], words=[0, 0, 0])
    _, adapter = write_base(tmp_path)
    found = read_adapter(adapter)
    summary = tmp_path / "summary.json"
    argv = ["calibrate", str(tmp_path / "a"), "--report", str(tmp_path / "b"), "--summary", str(summary)]
    argv += ["--adapter", adapter, "-o", adapter]
    assert cli.main(argv) == 2 and "no retrieval heads" in capsys.readouterr().err
    found.retrieval = retrieval()
    write_adapter(found, adapter)
    assert cli.main(argv) == 0
    assert "* said: area under the curve: calibrate 1.000, report 0.889" in capsys.readouterr().out
    written = json.loads(summary.read_text())
    assert written["calibration"] == {"signals": ["said"], "weights": [1.0], "threshold": 3.0}
    (chosen,) = [one for one in written["candidates"] if one["chosen"]]
    assert chosen["area"] == {"calibrate": 1.0, "report": pytest.approx(8 / 9)}
    squad, absent = chosen["report"]["qa/squad"], chosen["report"]["qa/squad-absent"]
    assert (squad["refused"], squad["with_evidence"], squad["refused_with_evidence"]) == (33.33, 1, 0)
    assert (squad["score"], squad["score_with_refusals"]) == (50, 33.33) and absent["answered"] == 33.33
    assert read_adapter(adapter).retrieval.calibration.to_dict() == written["calibration"]

    results_of(tmp_path / "a", "qa/squad", adapter="coder", said=[1, 1, 1], words=[0, 0, 0])
    assert cli.main(argv) == 2 and "choose by --of" in capsys.readouterr().err
    assert cli.main([*argv, "--of", "heads", "--signals", "words"]) == 0
    assert read_adapter(adapter).retrieval.calibration.signals == ("words",)
    assert cli.main([*argv[:-2], "--of", "heads"]) == 2 and "go together" in capsys.readouterr().err
    assert cli.main([*argv, "--policy", "rag-true"]) == 2 and "no results with signals" in capsys.readouterr().err
