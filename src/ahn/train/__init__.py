"""Trains memories by self-distillation (paper, section 3.1): the base with full attention teaches the base with window
and memory.

recipe.py       a run as a YAML file: base, data, settings, all checked
run.py          a whole run: output folder, stages, resuming
prepare.py      from a recipe to a trainer that is ready to start
trainer.py      the Hugging Face Trainer around the distillation: steps, checkpoints, faults
distill.py      the loss and the two forwards that it compares, without ever holding all logits
gates.py        the training of a store's gates, for which the store decides softly
windows.py      the sinks and the window that a batch is trained with

data.py         packs sources into rows of equal length
sources.py      opens files and datasets, reads their texts and records
records.py      which tokens of a record are to be predicted
rows.py         rows of tokens, and the folder that keeps them

check.py        compares this machine's gradients with plain torch
checkpoints.py  which checkpoint of a run is whole
progress.py     reports a run while it runs
heads.py        chooses the retrieval heads of a base
"""
