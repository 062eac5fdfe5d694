"""Tables of recall and its picture's caption: recall.md, results.md, README.md."""

from __future__ import annotations

from pages.tables import Row, block, result, rows, source, table, wrapped

ASKED = "qa-qwen2.5-coder-1.5b"
HEADS = "retrieval heads only"
BEHIND = {
    "window": "window alone",
    "ahn": "window, store and cell",
    "full": "full attention",
    "rag-random": "passages at random, no memory",
    "rag": "`rag`: passages by BM25, no memory",
    "recall": "recall: passages by `fused`",
    "rag-true": "the true passages first, no memory",
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
    return wrapped(
        f"Left: word F1 of Qwen2.5-Coder-1.5B on {', '.join(sets)} ({counts} questions, "
        f"evidence anywhere in the text; {source(ASKED)[1:]}. Right: Qwen2.5-Coder-0.5B with its default memory, 100 "
        f"to 200 examples a task ({source(facts)[1:]}. All texts have 16,384 tokens, of which 2,048 are kept exactly; "
        "recall reads 512 again. Lines are 95% intervals, where the file has them."
    )


@table
def recall_behind() -> str:
    """F1 of questions whose evidence is behind the window, by way of answering."""
    found = {(row["task"], row["policy"]): row for row in reversed(rows(ASKED)) if row["length"] == 16_384}
    body = []
    for policy, label in BEHIND.items():
        cells = [found.get((f"qa/{task.lower()}", policy), {}).get("behind") for task in SETS]
        body.append([label, *(f"{cell['score']:.1f}" if cell else "" for cell in cells)])
    counts = [found[f"qa/{task.lower()}", "recall"]["behind"]["n"] for task in SETS]
    widths = [row["behind"]["interval_95"] for row in found.values() if "behind" in row and row["policy"] in BEHIND]
    about = (
        f"Qwen2.5-Coder-1.5B, texts of 16,384 tokens, 2,048 lossless, 512 tokens of passages; word F1 of "
        f"{', '.join(map(str, counts))} questions. 95% intervals are at most "
        f"± {max(high - low for low, high in widths) / 2:.0f} points, on SQuAD ± 6."
    )
    return block(["", *SETS], body, about, ASKED)


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
    body = []
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
        body.append([label, *cells])
    about = (
        "As above, without a trained memory; word F1 of 240, 240, 98 and 90 questions, evidence anywhere in the text."
    )
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
        f"of 25 examples (recall on `{short['task']}`: {short['n']})."
    )
    return block(["", "memory with store", "recall", "`rag`", "full attention"], body, about, name)


@table
def recall_small() -> str:
    """Recall with the smaller bases."""
    bases = {"Qwen2.5-Coder-0.5B": "recall-qa-qwen2.5-coder-0.5b", "SmolLM2-135M": "recall-qa-smollm2-135m"}
    body = []
    for base, name in bases.items():
        found = {(row["task"], row["policy"]): row for row in rows(name)}
        for task in SETS[:2]:
            ways = [found.get((f"qa/{task.lower()}", policy)) for policy in ("window", "ahn", "full", "rag", "recall")]
            shares = [f"{way['found']['512']:.1f}" for way in ways[3:] if way]
            body.append([base, task, *(f"{way['behind']['score']:.1f}" if way else "" for way in ways), *shares])
    head = ["base", "", "window", "memory", "full attention", "`rag`", "recall", "found by `rag`, %", "by recall, %"]
    about = (
        "Texts of 16,384 tokens, 2,048 lossless, 512 tokens of passages; word F1 of 122 to 209 questions whose "
        "evidence is behind the window, and the share of it that is among the passages. SmolLM2 has 8,192 positions, "
        "so full attention was not asked."
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
    about = (
        f"{result(name)['tokens']:,} tokens, {result(name)['bytes_per_token']:.0f} bytes of keys a token; seconds of "
        "all threads together, because other work used the cores."
    )
    head = ["", "first question of a process, s", "each further one, ms", "the same, 9 layers of the 1.5B's shape, ms"]
    return block(head, body, about, name, large)
