"""Statistics, and what a report says of results made up for it."""

import json
import math
import re

import numpy as np
import pytest

from ahn import cli
from ahn.eval import compare, report, results, statistics

POLICIES = ("full", "window", "compressive-max", "ahn")
EXACT = (100, 20)


def write(folder, policy, task="made/one", length=1000, score=lambda i: 0.5, count=40, kind="generate", **settings):
    """Results of `count` examples whose evidence moves from the first token to the last."""
    if policy != "full":
        settings = {"window": 100, "sinks": 20, "sink_positions": "clipped", "layers": None} | settings
    identifying = {"task": task, "length": length, "policy": policy, "settings": settings}
    identifying |= {"base": "tiny", "base_config": "c", "dtype": "float32", "seed": 0}
    path = results.folder_of(folder, identifying)
    path.mkdir(parents=True)
    cost = {"tokens": length, "cache_bytes": 1000, "mixing_flops": 2e12, "model_flops": 4e12, "parameters_added": 7}
    cost |= {"full_cache_bytes": 4000, "full_mixing_flops": 4e12, "full_model_flops": 5e12}
    made = {"package": "0.1.0", "commit": "c" * 40, "device": "cpu", "versions": {"torch": "2", "transformers": "5"}}
    config = identifying | {"version": 1, "suite": task.split("/")[0], "kind": kind, "cost": cost, "made_with": [made]}
    config |= {"window": settings.get("window"), "sinks": settings.get("sinks"), "adapter": "tiny-adapter"}
    results.write_config(path, config)
    for i in range(count):
        row = {"id": str(i), "prompt": "p", "prompt_tokens": length, "score": score(i)}
        if kind == "loss":
            row |= {"losses": [score(i)] * 3}
        else:
            at = i * (length - 10) // max(count - 1, 1)
            row |= {"evidence": None if i == 7 else [at, at + 10], "depth": i / count}
        results.append(path, 0, row)
    return path


@pytest.fixture
def folder(tmp_path):
    for length in (1000, 2000):
        write(tmp_path, "full", length=length, score=lambda i: 1.0)
        write(tmp_path, "window", length=length, score=lambda i: i % 2)
        write(tmp_path, "compressive-max", length=length, score=lambda i: float(i % 4 == 3))  # worse
        write(tmp_path, "ahn", length=length, score=lambda i: float(i % 2 or i % 4 == 0))  # better
    return tmp_path


def test_interval_against_the_normal_distribution():
    values = np.random.default_rng(3).normal(5, 2, 400)
    found = statistics.interval(values)
    error = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found.count == 400
    assert (found.low, found.high) == pytest.approx((found.mean - error, found.mean + error), abs=0.02)
    assert statistics.interval(values) == found
    assert statistics.interval(values, seed=1) != found


def test_interval_of_several_tasks_is_of_the_mean_of_their_means():
    one, many = [0.0, 1.0] * 5, [1.0] * 990
    found = statistics.interval(one, many)
    assert found.mean == 0.75
    alone = statistics.interval(one)
    assert found.high - found.low == pytest.approx((alone.high - alone.low) / 2, rel=0.1)


def test_interval_of_little():
    assert math.isnan(statistics.interval([0.3]).low) and statistics.interval([0.3]).sign == 0
    assert statistics.interval([0.3] * 9).sign == 0 and statistics.interval([0.3] * 10).sign == 1
    with pytest.raises(ValueError, match="no values"):
        statistics.interval([])


def test_differences_are_paired(folder):
    found = {r.config["policy"]: r for r in results.find([folder]) if r.config["length"] == 1000}
    gains = statistics.differences(found["ahn"], found["window"])
    assert sorted(set(gains)) == [0, 1] and sum(gains) == 10
    found["window"].rows["0"]["prompt"] = "another"
    assert len(statistics.differences(found["ahn"], found["window"])) == 39
    del found["window"].rows["1"]
    assert len(statistics.differences(found["ahn"], found["window"])) == 38


@pytest.mark.parametrize(
    ("evidence", "where"),
    [
        ([5, 15], "inside"),
        ([950, 960], "inside"),
        ([900, 910], "inside"),
        ([899, 909], "partly"),
        ([15, 25], "partly"),
        ([20, 30], "outside"),
        ([890, 900], "outside"),
        (None, "unknown"),
    ],
)
def test_place(evidence, where):
    assert statistics.place({"evidence": evidence, "prompt_tokens": 1000}, EXACT) == where


def test_split_is_the_same_for_all_policies(folder):
    counts = set()
    for result in results.find([folder]):
        if result.config["length"] == 1000:
            found = [statistics.place(row, EXACT) for row in result.rows.values()]
            counts.add(tuple(found.count(where) for where in statistics.WHERE))
    assert len(counts) == 1 and sum(counts.pop()) == 40


def test_markdown(folder):
    text = report.markdown(results.find([folder]))
    assert "## tiny, 120 lossless tokens (20 sinks + 100 window)" in text
    scores, against, split = (
        re.findall(rf"### made, 1,000 tokens: {name}.*?(?=\n### )", text, re.S)[0]
        for name in (
            "scores",
            "difference to the window",
            "evidence outside and inside",
        )
    )
    assert [line.split(" | ")[0] for line in scores.splitlines() if line.startswith("| ")][2:] == [
        f"| {p}" for p in POLICIES
    ]
    assert "| window | +7 | 1.00 kB (25.0%) | 2.00 T (50.0%) | 4.00 T (80.0%) | 50.0 [35.0, 65.0] |" in scores
    assert re.search(r"\| ahn \| \+25\.0 \[.*\] better \| 1 / 0 / 0 \|", against)
    assert re.search(r"\| compressive-max \| -25\.0 \[.*\] worse \| 0 / 1 / 0 \|", against)
    assert "| evidence outside | to the window | evidence inside | to the window |" in split
    assert all(re.search(rf"\| {policy} \|.* n=34 \|.* n=5 \|.* n=1 \|", split) for policy in POLICIES)
    assert "ahn 0.1.0 at cccccccccccc; torch 2, transformers 5; cpu" in text


def test_wins_and_losses_come_first_and_those_of_memory_beside_them(folder):
    write(folder, "window", "made/book", kind="loss", score=lambda i: 3.0 + i % 2, count=10)
    write(folder, "ahn", "made/book", kind="loss", score=lambda i: 3.1 + i % 2, count=10)
    text = report.markdown(results.find([folder]))
    summary = text.split("\n### ")[1]
    assert summary.startswith("Wins and losses")
    # of the 34 and 36 examples whose evidence is outside
    assert re.search(r"\| ahn \| 2 / 1 / 0 \| \+2\d\.\d \[.*\] better \| 70 in 2 \|", summary)
    assert re.search(r"\| compressive-max \| 0 / 2 / 0 \| -2\d\.\d \[.*\] worse \|", summary)
    assert "| window |" not in summary
    tables = [line for line in text.splitlines() if line.startswith("### made, 2,000")]
    assert next(title.partition(": ")[2] for title in tables) == "evidence outside and inside"


def test_evidence_that_truncation_took_is_a_column_of_its_own(tmp_path):
    for policy in ("window", "ahn"):
        path = write(tmp_path, policy, count=4)
        results.append(path, 0, {"id": "x", "prompt": "p", "prompt_tokens": 9, "score": 0.0, "evidence_cut": True})
    text = report.markdown(results.find([tmp_path]))
    assert "| evidence cut |" in text and "0.0 n=1 |" in text and "truncation has taken it out of the prompt" in text


def test_many_tasks_are_rows_and_a_missing_one_leaves_no_average(tmp_path):
    for i in range(9):
        for policy in ("window", "ahn"):
            if (i, policy) != (4, "ahn"):
                write(tmp_path, policy, f"made/set_{i}", count=3)
    text = report.markdown(results.find([tmp_path]))
    assert "|  | window | ahn |" in text
    assert "| set_4 (n=3) | 50.0 [50.0, 50.0] | - |" in text
    assert "| average | 50.0 [50.0, 50.0] | - |" in text


def test_less_loss_is_better(tmp_path):
    write(tmp_path, "window", kind="loss", score=lambda i: 3.0 + i / 100)
    write(tmp_path, "ahn", kind="loss", score=lambda i: 2.9 + i / 90)
    text = report.markdown(results.find([tmp_path]))
    assert "1,000 tokens: losses" in text and re.search(r"\| ahn \| -0\.0\d\d \[.*\] better", text)


def test_two_examples_say_nothing(tmp_path):
    write(tmp_path, "window", count=2, score=lambda i: 0.0)
    write(tmp_path, "ahn", count=2, score=lambda i: 1.0)
    text = report.markdown(results.find([tmp_path]))
    assert "| +100.0 [+100.0, +100.0] | 0 / 0 / 1 |" in text
    assert not re.search(r"\] (better|worse) ", text)


def test_two_adapters_have_their_names_and_their_own_baseline(tmp_path):
    write(tmp_path, "window", score=lambda i: 0.1)
    write(tmp_path, "window", score=lambda i: 0.2, sink_positions="absolute")
    write(tmp_path, "ahn", score=lambda i: 0.5, adapter_digest="aaaaaaaaaa")
    write(tmp_path, "ahn", score=lambda i: 0.6, adapter_digest="bbbbbbbbbb", sink_positions="absolute")
    text = report.markdown(results.find([tmp_path]))
    assert "| ahn (tiny-adapter, aaaaaa) | +40.0" in text and "| ahn (tiny-adapter, bbbbbb) | +40.0" in text
    assert "window (sink_positions absolute)" in text


def test_windows_are_compared_apart_and_full_with_each(tmp_path):
    write(tmp_path, "full")
    write(tmp_path, "window")
    write(tmp_path, "window", window=200)
    groups = compare.grouped(results.find([tmp_path]))
    assert [group.exact for group in groups] == [{1000: (100, 20)}, {1000: (200, 20)}]
    assert all(set(group.results[1000]["made/one"]) == {"full", "window"} for group in groups)


def test_lengths_with_the_same_share_of_lossless_tokens_are_together(tmp_path):
    for length in (1000, 2000):
        for policy in ("full", "window", "ahn"):
            path = write(tmp_path, policy, length=length, **({} if policy == "full" else {"window": length // 10}))
            config = results.load(path).config
            results.write_config(path, config | {"share": 8 if policy != "full" else None})
    write(tmp_path, "window", length=3000, window=77)
    share, fixed = sorted(compare.grouped(results.find([tmp_path])), key=lambda group: group.share is None)
    assert share.title == "tiny, 1/8 of the tokens lossless" and fixed.share is None
    assert share.exact == {1000: (100, 20), 2000: (200, 20)}
    assert all(set(share.results[length]["made/one"]) == {"full", "window", "ahn"} for length in (1000, 2000))
    assert {*fixed.results} == {3000}, "full is only where there is something to compare"
    (summary,) = (table for table in report.tables(share) if table.title == "Wins and losses")
    outside = [r for n in (1000, 2000) for r in share.results[n]["made/one"]["ahn"].rows.values()]
    count = sum(statistics.place(row, share.exact[row["prompt_tokens"]]) == "outside" for row in outside)
    assert summary.rows[-1][-1] == f"{count} in 2"


@pytest.mark.slow
def test_page(folder, capsys):
    pytest.importorskip("matplotlib")
    write(folder, "window", "made/book", kind="loss", score=lambda i: 3.0, count=3)
    write(folder, "ahn", "made/book", kind="loss", score=lambda i: 2.9, count=3)
    output = folder / "report.html"
    assert cli.main(["report", str(folder), "-o", str(output)]) == 0
    text = output.read_text()
    assert text.count("<svg") == 4
    for name in ("Score by length", "Score by depth of the needle", "Score by cache and by FLOPs", "Loss by position"):
        assert f'aria-label="{name}"' in text
    assert 'class="better"' in text and 'class="worse"' in text
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", "")), "something that is not in the page"
    output.unlink()
    assert cli.main(["report", str(folder), "-o", str(output)]) == 0
    assert output.read_text() == text, "the same page from the same results"


def test_bad_input(tmp_path, folder, capsys):
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(tmp_path / "empty")], "no results in this folder"),
        ([str(folder), "-o", "report.pdf"], "ends in .html, .md or .json"),
    ):
        assert cli.main(["report", *argv]) == 2
        assert message in capsys.readouterr().err
    next(folder.rglob("config.json")).write_text('{"version": 9}')
    assert cli.main(["report", str(folder)]) == 2
    assert "version 9" in capsys.readouterr().err


def test_stores_are_named_and_stand_behind_the_memory_without(tmp_path):
    for length in (1000, 2000, 3000, 4000):  # folders are found in the order of their names' digests
        write(tmp_path, "window", length=length)
        write(tmp_path, "ahn", length=length)
        for span in (1, 4):
            write(tmp_path, "ahn", length=length, store={"name": "learned", "size": 1468, "span": span})
    text = report.markdown(results.find([tmp_path]))
    alone = report.markdown([r for r in results.find([tmp_path]) if "store" in r.config["settings"]][:1])
    assert "| ahn (learned store of 1,468" in alone
    labels = ("ahn", "ahn (learned store of 1,468)", "ahn (learned store of 1,468 in spans of 4)")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ahn")]
    assert rows and rows == [*labels] * (len(rows) // 3)


def test_a_cell_of_fewer_examples_says_so(tmp_path):
    write(tmp_path, "window", count=3)
    write(tmp_path, "ahn", count=2)
    text = report.markdown(results.find([tmp_path]))
    assert "one (n=3)" in text and "50.0 [50.0, 50.0] n=2 |" in text


def recalled(folder, policy, score, found=None, **settings):
    """Results of 30 questions whose evidence moves from the first token to the last: the later, the more words it
    shares with its question."""
    path = write(folder, policy, "made/asked", count=30, score=score, **settings)
    if found is not None:
        rows = results.load(path).rows.values()
        results.merge(path, [])
        (path / results.PREDICTIONS).unlink()
        for i, row in enumerate(rows):
            by_budget = {"256": found(i) / 2, "512": found(i), "1024": 1.0}
            more = {"recalled": 500, "found": found(i), "found_by_budget": by_budget, "overlap": i / 30}
            results.append(path, 0, row | more)
    return path


def test_evidence_found_stands_apart_from_scores(tmp_path, capsys):
    recalled(tmp_path, "window", lambda i: 0.0)
    recalled(tmp_path, "recall", lambda i: i / 30, lambda i: float(i >= 5), recall={"tokens": 512})
    behind = [i for i in range(30) if statistics.place(next(iter(_rows(tmp_path, "window", i))), EXACT) == "outside"]
    within = [i for i in range(30) if statistics.place(next(iter(_rows(tmp_path, "window", i))), EXACT) == "inside"]
    third = behind[: len(behind) // 3]

    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "report.json")]) == 0
    (group,) = json.loads((tmp_path / "report.json").read_text())["groups"]
    window, recall = group["recall"]
    assert (window["task"], window["length"], window["policy"]) == ("made/asked", 1000, "window")
    assert recall["behind"] == {"n": len(behind), "score": pytest.approx(np.mean(behind) / 30)}
    assert recall["within"] == {"n": len(within), "score": pytest.approx(np.mean(within) / 30)}
    share = np.mean([i >= 5 for i in behind])
    assert recall["found"] == {"256": pytest.approx(share / 2), "512": pytest.approx(share), "1024": 1.0}
    low = {"n": len(third), "score": pytest.approx(np.mean(third) / 30), "found": np.mean([i >= 5 for i in third])}
    assert recall["lowest_third"] == low and 0 < low["found"] < 1
    assert window["lowest_third"] == {"n": len(third), "score": 0.0, "found": None}
    assert window["found"] == {"256": None, "512": None, "1024": None}

    capsys.readouterr()
    assert cli.main(["report", str(tmp_path)]) == 0
    table = re.search(r"1,000 tokens: evidence found\n\n.*?\n\n(.*?)\n\n", capsys.readouterr().out, re.S)[
        1
    ].splitlines()
    assert len({len(line) for line in table}) == 1, "aligned"
    head, _, first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert head[8:11] == ["found in 256", "found in 512", "found in 1,024"]
    assert first == [
        "asked",
        "window",
        "30",
        "0.0",
        str(len(behind)),
        "0.0",
        str(len(within)),
        "0.0",
        *"---",
        str(len(third)),
        "0.0",
        "-",
    ]
    assert second[8:11] == [f"{50 * share:.1f}", f"{100 * share:.1f}", "100.0"]
    assert second[-2:] == [f"{100 * np.mean(third) / 30:.1f}", f"{100 * low['found']:.1f}"]


def _rows(folder, policy, i):
    return [r.rows[str(i)] for r in results.find([folder]) if r.config["policy"] == policy]


def test_nothing_is_said_of_recall_where_nothing_was_read_again(folder):
    assert "evidence found" not in report.markdown(results.find([folder]))


@pytest.mark.parametrize(
    ("needs", "where"),
    [
        ([[[500, 510]]], "outside"),
        ([[[500, 510], [950, 960]]], "inside"),
        ([[[5, 9], [500, 510]]], "inside"),
        ([[[500, 510]], [[950, 960]]], "partly"),
        ([[[500, 510]], [[600, 610]]], "outside"),
        ([[[895, 905]]], "partly"),
        ([[[5, 9]], [[950, 960]]], "inside"),
    ],
)
def test_place_of_facts(needs, where):
    row = {"evidence": [500, 960], "needs": needs, "prompt_tokens": 1000}
    assert statistics.place(row, EXACT) == where
