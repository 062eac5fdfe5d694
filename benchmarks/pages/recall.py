"""Tables of recall and its picture's caption: recall.md, results.md, README.md."""

from __future__ import annotations

from collections.abc import Iterable

from pages.tables import Row, block, numbers, recalled, result, rows, source, table, wrapped

ASKED = "qa-qwen2.5-coder-1.5b"
HEADS = "retrieval heads only"
ADAPTER = "qwen2.5-coder-1.5b-deltanet"
ROUNDS = {"policy": "recall", "adapter": ADAPTER, "rounds": 2}
ROUNDS |= {"second_question": "the best passage of the first round in front"}
BEHIND: dict[str, Row] = {
    "window alone": {"policy": "window"},
    "window, store and cell": {"policy": "ahn", "adapter": ADAPTER},
    "full attention": {"policy": "full"},
    "passages at random, no memory": {"policy": "rag-random"},
    "`rag`: passages by BM25, no memory": {"policy": "rag"},
    "recall: passages by `fused`": {"policy": "recall", "adapter": ADAPTER, "rounds": 1},
    "recall, two rounds": ROUNDS,
    "recall with the retrieval heads alone, no trained memory": {"policy": "recall", "adapter": HEADS},
    "the true passages first, no memory": {"policy": "rag-true"},
}
ELSEWHERE = {
    "dialogues (QMSum)": {"task": "qa/qmsum"},
    "Chinese (LongBench's `multifieldqa_zh`)": {"task": "longbench/multifieldqa_zh"},
    "FairytaleQA, all questions": {"task": "qa/fairytaleqa", "questions": "all 745"},
    "the questions of these with evidence behind the window": {"task": "qa/fairytaleqa", "questions": "all 745"},
}
FORMS = {
    "passages": {"policy": "recall", "context": "passages", "question": None, "adapter": HEADS},
    "memory, passages": {"policy": "recall", "context": "memory and passages", "question": None},
    "question, passages": {"policy": "recall", "context": "passages", "question": "in front and behind"},
    "memory, question, passages": {
        "policy": "recall", "context": "memory and passages", "question": "in front and behind",
    },
}  # fmt: skip
WAYS = {"window": "window", "ahn": "memory", "recall": "recall", "full": "full attention", "rag": "rag"}
SETS = ("SQuAD", "FairytaleQA", "MuSiQue", "HotpotQA")
TITLES = {name.lower(): name for name in (*SETS, "QMSum")}


def question_scores(asked: Row) -> dict[str, dict[str, Row]]:
    """Rows by set of ordinary questions and by way of answering, in texts of 16,384 tokens. Sets without recall are
    left out."""
    sets: dict[str, dict[str, Row]] = {}
    for row in asked["rows"]:
        if row["policy"] in WAYS and row["length"] == 16_384 and "of" not in row:
            task = row["task"].partition("/")[2]
            sets.setdefault(TITLES.get(task, task), {}).setdefault(WAYS[row["policy"]], row)
    return {task: sets[task] for task in SETS if "recall" in sets.get(task, {})}


@table
def picture() -> str:
    """The caption of docs/answers.svg."""
    sets = question_scores(result(ASKED))
    counts = ", ".join(f"{ways['recall']['n']}" for ways in sets.values())
    facts = "recall-qwen2.5-coder-0.5b-default"
    needles = [row["n"] for row in recalled(result(facts)).values()]
    return wrapped(
        f"Left: word F1 of Qwen2.5-Coder-1.5B on {', '.join(sets)} ({counts} questions, "
        f"evidence anywhere in the text; {source(ASKED)[1:]}. Right: Qwen2.5-Coder-0.5B with its default memory, "
        f"{min(needles)} to {max(needles)} examples a task ({source(facts)[1:]}. All texts have 16,384 tokens, of "
        "which 2,048 are kept exactly; "
        "recall reads 512 again. Lines are 95% intervals, where the file has them."
    )


@table
def recall_behind() -> str:
    """F1 of questions whose evidence is behind the window, by way of answering."""
    found = {(task, label): asked(task, **wanted) for task in SETS for label, wanted in BEHIND.items()}
    body = []
    for label in BEHIND:
        cells = [found[task, label] for task in SETS]
        body.append([label, *(f"{cell['behind']['score']:.1f}" if cell else "" for cell in cells)])
    once, twice = "recall: passages by `fused`", "recall, two rounds"
    counts = ", ".join(f"{(found[task, once] or {})['behind']['n']}" for task in SETS)
    everywhere = [
        f"{second['score']:.1f} in place of {first['score']:.1f} on {task}"
        for task in SETS
        if (first := found[task, once]) and (second := found[task, twice])
    ]
    about = (
        f"Qwen2.5-Coder-1.5B, texts of 16,384 tokens, 2,048 lossless, 512 tokens of passages; word F1 of {counts} "
        f"questions. 95% intervals are at most ± {widest(found.values()):.0f} points, on SQuAD "
        f"± {widest(found['SQuAD', label] for label in BEHIND):.0f}. Two rounds were asked of sets whose evidence is "
        f"in several passages; wherever the evidence is, they have {' and '.join(everywhere)}."
    )
    return block(["", *SETS], body, about, ASKED)


def asked(task: str, **wanted: object) -> Row | None:
    """The first row of a set of questions with these values, texts of 16,384 tokens, the passages alone in front."""
    wanted = {"context": "passages", "question": None, "finder": "fused", "questions": None} | wanted
    if wanted["policy"] != "recall":
        wanted = {"policy": wanted["policy"], "question": None, "questions": None}
    every = rows(ASKED, task=f"qa/{task.lower()}", length=16_384, **wanted)
    return next(iter(every), None)


def widest(found: Iterable[Row | None]) -> float:
    """Half of the widest interval of questions whose evidence is behind the window."""
    spans = [row["behind"]["interval_95"] for row in found if row]
    return max(float(high - low) for low, high in spans) / 2


@table
def recall_elsewhere() -> str:
    """F1 on other kinds of text. A row of fewer questions than the set has is an empty cell."""
    body = []
    for label, wanted in ELSEWHERE.items():
        found = [row for row in rows(ASKED, **wanted) if row.get("context") != "memory and passages"]
        every = {row["policy"]: row["behind"] if "behind" in label else row for row in found}
        count = max(row["n"] for row in every.values())
        cells = [every[way]["score"] if way in every and every[way]["n"] == count else None for way in WAYS]
        body.append([label, f"{count}", *numbers(cells, "{:.1f}")])
    about = (
        "As above, evidence anywhere in the text; word F1, of QMSum ROUGE-L. Texts of 16,384 tokens, those in Chinese "
        "whole."
    )
    return block(["", "questions", *(f"`{way}`" if way == "rag" else way for way in WAYS.values())], body, about, ASKED)


@table
def recall_evidence() -> str:
    """The share of the evidence behind the window that is found."""
    every = [row for row in rows(ASKED) if row["length"] == 16_384 and "found" in row and "question" not in row]
    body = []
    for task in SETS:
        for policy, finder in (("rag", "bm25"), ("recall", "fused"), ("recall", "heads")):
            row = next(
                row for row in every
                if (row["task"], row["policy"], row["finder"]) == (f"qa/{task.lower()}", policy, finder)
                and row["rounds"] == 1
            )  # fmt: skip
            shares = [f"{row['found'][budget]:.1f}" for budget in ("256", "512", "1024")]
            body.append([task, f"`{finder}`", *shares, f"{row['lowest_third']['found']:.1f}"])
    head = ["", "finder", "256 tokens", "512 tokens", "1,024 tokens", "512 tokens, fewest shared words"]
    about = (
        "Qwen2.5-Coder-1.5B, texts of 16,384 tokens: evidence behind the window that is among the passages, %. Fewest "
        "shared words: the third of the questions that share the fewest with their passage."
    )
    return block(head, body, about, ASKED)


@table
def recall_forms() -> str:
    """F1 by the parts of the prompt in front of the question."""
    body, counts = [], {}
    for label, wanted in FORMS.items():
        cells = []
        for task in SETS:
            row = next(
                row for row in rows(ASKED)
                if row["length"] == 16_384 and row["task"] == f"qa/{task.lower()}" and "of" not in row
                and {"finder": "fused", "rounds": 1} | wanted
                == {key: row.get(key) for key in ("finder", "rounds", *wanted)}
            )  # fmt: skip
            cells.append(f"{row['score']:.1f}")
            counts[task] = row["n"]
        body.append([label, *cells])
    asked = ", ".join(f"{counts[task]}" for task in SETS)
    about = f"As above, without a trained memory; word F1 of {asked} questions, evidence anywhere in the text."
    return block(["in front of the question", *SETS], body, about, ASKED)


@table
def support_errors() -> str:
    """The questions that a calibration refuses and that it lets pass."""
    name = "support-qwen2.5-coder-1.5b"
    (chosen,) = (one for one in result(name)["candidates"] if one["chosen"])
    body = []
    for task in ("squad", "fairytaleqa", "musique"):
        kept, absent = (chosen["report"].get(f"qa/{task}{end}") for end in ("", "-absent"))
        body.append(
            [
                TITLES[task], f"{kept['questions']}", f"{kept['refused']:.1f}", f"{kept['refused_with_evidence']:.1f}",
                f"{absent['questions']}" if absent else "", f"{absent['answered']:.1f}" if absent else "",
            ]
        )  # fmt: skip
    head = ["", "with an answer", "refused, %", "refused though found, %", "without an answer", "answered, %"]
    about = (
        "Qwen2.5-Coder-1.5B with its adapter, texts of 16,384 tokens; the threshold was chosen on 150 questions with "
        "and 150 without an answer in articles of SQuAD's training part, and on 26 of QMSum. Refused though found: of "
        "the questions whose evidence was read again. Some fairy-tale questions without an answer fit the other tale."
    )
    return block(head, body, about, name)


@table
def ruler_15b() -> str:
    name = "ruler-qwen2.5-coder-1.5b"
    found = {(row["task"], row["policy"]): row for row in rows(name)}
    policies = ("ahn", "recall", "rag", "full")
    body = [
        [f"`{task}`", *(f"{found[task, policy]['score']:.0f}" for policy in policies)]
        for task in dict.fromkeys(task for task, _ in found)
    ]
    (short,) = (row for row in rows(name) if "of" in row)
    about = (
        "Qwen2.5-Coder-1.5B with its adapter, texts of 16,384 tokens, 2,048 lossless, 496 of them stored: mean score "
        f"of {max(row['n'] for row in found.values())} examples (recall on `{short['task']}`: {short['n']})."
    )
    return block(["", "memory with store", "recall", "`rag`", "full attention"], body, about, name)


@table
def recall_small() -> str:
    """Recall with the smaller bases."""
    bases = {"Qwen2.5-Coder-0.5B": "recall-qa-qwen2.5-coder-0.5b", "SmolLM2-135M": "recall-qa-smollm2-135m"}
    body: list[list[str]] = []
    counts: list[int] = []
    for base, name in bases.items():
        found = {(row["task"], row["policy"]): row for row in rows(name)}
        for task in SETS[:2]:
            ways = [found.get((f"qa/{task.lower()}", policy)) for policy in ("window", "ahn", "full", "rag", "recall")]
            shares = [f"{way['found']['512']:.1f}" for way in ways[3:] if way]
            counts += [way["behind"]["n"] for way in ways if way]
            body.append([base, task, *(f"{way['behind']['score']:.1f}" if way else "" for way in ways), *shares])
    head = ["base", "", "window", "memory", "full attention", "`rag`", "recall", "found by `rag`, %", "by recall, %"]
    about = (
        f"Texts of 16,384 tokens, 2,048 lossless, 512 tokens of passages; word F1 of {min(counts)} to {max(counts)} "
        "questions whose evidence is behind the window, and the share of it that is among the passages. SmolLM2 has "
        "8,192 positions, so full attention was not asked."
    )
    return block(head, body, about, *bases.values())


@table
def finding() -> str:
    name, large = "find-cpu-finding", "find-cpu-1.5b-shape"
    body = []
    for finder in ("bm25", "heads", "fused"):
        cells = [f"{result(name)['finding'][finder]['first_cpu_s']:.1f}"]
        cells += [f"{1000 * result(file)['finding'][finder]['later_cpu_s']:.0f}" for file in (name, large)]
        body.append([f"`{finder}`", *cells])
    tokens, size = result(name)["tokens"], result(name)["bytes_per_token"]
    question = 1000 * result(large)["finding"]["queries_cpu_s"]
    about = (
        f"{tokens:,} tokens, {size:.0f} bytes of keys a token, {tokens * size / 1e6:.0f} MB; seconds of all threads "
        "together, because other work used the cores. They include the question's way through the model, of the 1.5B "
        f"{question:.0f} ms."
    )
    head = [
        "",
        "first question of a process, s",
        "each further one, ms",
        "each further one, 9 layers of the 1.5B's shape, ms",
    ]
    return block(head, body, about, name, large)


@table
def keeping() -> str:
    """The cost of keeping an archive: while a text is read, and on an H200 while a question is asked."""
    cpu, gpu, reading = (f"find-{part}" for part in ("cpu-reading", "h200", "h200-reading"))
    body = [
        [label, f"{ratios[f'{kept}{key}_ratio']:.2f}", *numbers(ratios[f"{kept}{key}_ratio_quartiles"], "{:.2f}")]
        for kept in ("text", "keys")
        for device, name, key in (("2 CPU cores, all threads", cpu, "_cpu_s"), ("H200", reading, ""))
        for label, ratios in [(f"{kept} kept, {device}", result(name)["reading"])]
    ]
    small, large = (result(name)["reading"] for name in (cpu, reading))
    low, high = small["keys_s_ratio_quartiles"][0], small["text_s_ratio_quartiles"][1]
    found, asking = result(gpu)["finding"], result(gpu)["asking"]
    more = (asking["keys"]["recall_bytes"] - asking["text"]["recall_bytes"]) / 1e6
    same = asking["keys"]["plain_bytes"] == asking["none"]["plain_bytes"]
    about = (
        f"Time to read, over that without an archive: medians of {small['repeats']} pairs on the CPU "
        f"({small['tokens']:,} tokens) and {large['repeats']} on the H200 ({large['tokens']:,}). By the clock, "
        f"quartiles of the CPU's pairs reach from {low:.1f} to {high:.1f}, which tells nothing. On the H200 `fused` "
        f"finds passages in {result(gpu)['tokens']:,} tokens in {1000 * found['fused']['later_s']:.0f} ms, of which "
        f"{1000 * found['queries_s']:.0f} are the question's way through the model. Asking without recall takes "
        f"{'the same' if same else 'other'} bytes of the device with and without an archive. With recall, keys come to "
        f"the device in blocks and take {more:.0f} MB more than `bm25`."
    )
    return block(["", "times as long", "lower quartile", "upper quartile"], body, about, cpu, reading, gpu)
