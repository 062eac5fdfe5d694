"""Articles whose questions have one answer each."""

FILLER = "It was a day like any other day, and nobody said a thing about it. "
NAMES = ["compass", "lantern", "anchor", "rudder", "barrel", "cannon", "hammock", "sextant"]


def article(word):
    text = f"{FILLER}The {word} was under the {word}stone. {FILLER * 2}"
    return {"context": text, "qas": [{"question": f"Where was the {word}?", "answers": [f"under the {word}stone"]}]}
