"""A folder with a random model and its tokenizer, and one with a random adapter for it."""

from pathlib import Path

import ahn
from conftest import tiny, with_memory
from tiny_tokenizer import tiny_tokenizer

WINDOW, SINKS = 24, 8


def write_base(folder: Path, positions: int = 512, cell: str = "gated_deltanet", **changes) -> tuple[str, str]:
    """Names of the base and of the adapter."""
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=positions, **ids)
    base, adapter = folder / "tiny-base", folder / "tiny-adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    ahn.save_adapter(with_memory(model, cell, WINDOW, SINKS, **changes), adapter)
    return str(base), str(adapter)
