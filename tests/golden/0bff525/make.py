"""Wrote the files beside it, with the code of commit 0bff525: `PYTHONPATH=src:tests python make.py FOLDER` there."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import ahn
from ahn.train import recipe
from ahn.train.trainer import train
from conftest import in_pieces, storing, tiny, token_ids, with_memory
from tiny_tokenizer import tiny_tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 512}
FORMS = {
    "paper": ("gated_deltanet", {"sink_positions": "absolute"}),
    "maps": ("deltanet", {"memory_positions": "none", "key_maps": 1, "make_room": True}),
    "wide": ("mamba2", {"key_maps": 4, "make_room": True}),
    "layers": ("gated_deltanet", {"layers": (1,)}),
    "window": (None, {}),
    "store": ("deltanet", {"store": "learned", "store_size": 8, "store_span": 3}),
}
RECIPE = {
    "cell": "gated_deltanet", "length": 64, "batch": 2, "steps": 4, "save_every": 2, "log_every": 1, "lr": 1e-2,
    "lossless": [16, 32], "sinks": [0, 4], "window": 24, "kept_sinks": 4, "key_maps": 1, "make_room": True,
    "memory_positions": "none", "report_to": [],
}  # fmt: skip

os.chdir(sys.argv[1])
tokenizer = tiny_tokenizer()
ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}


def base():
    return tiny(vocab_size=len(tokenizer), **ids, **SMALL)


base().save_pretrained("base")
tokenizer.save_pretrained("base")
for name, (cell, changes) in FORMS.items():
    model = storing(changes.pop("store"), cell, base(), **changes) if "store" in changes else None
    model = model or with_memory(base(), cell, **changes)
    if cell is not None:
        ahn.save_adapter(model, name)
    for rows in (1, 2):
        text = token_ids(65, batch=rows)
        mask = torch.ones_like(text)
        mask[1:, :11] = 0
        ahn.read(model, text[:, :60], attention_mask=mask[:, :60] if rows == 2 else None).save(f"{name}-{rows}.ahn")
        logits = in_pieces(model, text, [60, 5], mask if rows == 2 else None)[:, 60:].contiguous()
        save_file({"logits": logits}, f"{name}-{rows}.safetensors")

Path("text.txt").write_text("".join(f"{i} once upon a time {i * i} there was a cat. " for i in range(60)))
train(recipe.from_dict(RECIPE | {"base": "base", "data": ["text.txt"], "output": "run"}))
shutil.rmtree("run/checkpoint-4")
Path("recipe.json").write_text(json.dumps(RECIPE, indent=1) + "\n")
