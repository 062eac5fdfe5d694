"""Training the memories by self-distillation (paper, section 3.1): the base with full attention teaches itself with
window and memory.

recipe.py       what to train on what, for how long: a YAML file, checked
data.py         texts and chats as rows of equal length, with the tokens that count
windows.py      which sinks and window a batch is trained with
distill.py      the two forwards and the loss, without ever holding all logits
trainer.py      the Hugging Face Trainer around them: loop, resume, logging, several GPUs
gates.py        the same for the gates of a store, which then decides softly
check.py        this machine's gradients against plain torch
progress.py     what a run says while it runs
checkpoints.py  which checkpoint is whole
"""
