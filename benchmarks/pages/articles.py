"""Tables of questions about SQuAD articles, behind the window and in it: results.md, store.md."""

from __future__ import annotations

from pages.tables import block, numbers, one, table

SMALL_MEMORIES = {
    "sinks and window": "sinks and window",
    "gated_deltanet": "smollm2-135m-gated_deltanet",
    "mamba2": "smollm2-135m-mamba2",
    "deltanet": "smollm2-135m-deltanet@none",
    "deltanet and its store (default)": "smollm2-135m-deltanet",
}


def answers(name: str, tokens: int, memories: dict[str, str], base: str) -> str:
    """Word F1 and the loss of the right answer, of questions whose evidence is behind the window or in it."""
    body, every = [], []
    for label, memory in memories.items():
        both = [one(name, tokens=tokens, memory=memory, group=group) for group in ("behind", "within")]
        every += both
        body.append(
            [label, *numbers((row["f1"] for row in both), "{:.1f}"), *numbers((row["loss"] for row in both), "{:.2f}")]
        )
    asked = {row["group"]: row["questions"] for row in every}
    size = next(row["lossless"] for row in every if row["memory"] == "sinks and window")
    about = (
        f"{base}, SQuAD articles of {tokens:,} tokens, {size:,} lossless: word F1, and loss of the right answer (nats "
        f"a token), of {asked['behind']} questions on text behind the window and {asked['within']} on text in it. "
        f"Standard errors are at most {max(row['f1_se'] for row in every):.1f} points of F1 and "
        f"{max(row['loss_se'] for row in every):.2f} nats."
    )
    within = {row["memory"]: row["f1"] for row in every if row["group"] == "within"}
    if stored := [label for label in memories if "store (default)" in label]:
        change = within[memories[stored[0]]] - within["sinks and window"]
        about += f" In it, F1 with the default store is {change:+.1f} points from that of sinks and window alone."
    return block(["", "F1 behind", "F1 in it", "loss behind", "loss in it"], body, about, name)


@table
def answers_smollm2() -> str:
    memories = {"full attention": "full attention"} | SMALL_MEMORIES
    return answers("qa-smollm2-135m-cells", 8192, memories, "SmolLM2-135M")


@table
def answers_smollm2_long() -> str:
    return answers("qa-smollm2-135m-cells", 16384, SMALL_MEMORIES, "SmolLM2-135M")


@table
def answers_smollm2_large_store() -> str:
    memories = {
        "full attention": "full attention",
        "sinks and window": "sinks and window",
        "deltanet": "smollm2-135m-deltanet@none",
        "deltanet and a store of three quarters": "smollm2-135m-deltanet",
    }
    return answers("qa-smollm2-135m-store", 8192, memories, "SmolLM2-135M")


@table
def answers_qwen() -> str:
    adapter = "qwen2.5-coder-0.5b-gated_deltanet"
    memories = {
        "full attention": "full attention",
        "sinks and window": "sinks and window",
        "gated_deltanet": f"{adapter}@none",
        "gated_deltanet and its store (default)": adapter,
        "gated_deltanet, three quarters stored (not shipped)": "16k gates for three quarters, @0.74",
    }
    return answers("qa-qwen2.5-coder-0.5b", 16384, memories, "Qwen2.5-Coder-0.5B")
