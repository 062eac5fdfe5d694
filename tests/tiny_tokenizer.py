"""A tokenizer small enough to be trained in a test."""

from typing import Any

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEXT = ['The cat sat.\n\nWho sat? The (old) cat.\n\nA "quote".\n\nWhy?\n\n* one\n* two\n\n12 cats: 3 mice!\n\n'] * 40


def tiny_tokenizer(pre_tokenizer: str = "gpt2", template: str | None = TEMPLATE, vocabulary: int = 320) -> Any:
    """Byte-level BPE, cut like GPT-2's or like Qwen's, or BPE in the manner of sentencepiece ("metaspace")."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if pre_tokenizer == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|\n|▁"), "isolated")  # for the training only
        alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    elif pre_tokenizer == "qwen":
        cut = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(cut, "isolated"), byte_level])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    if pre_tokenizer == "metaspace":
        tokenizer.pre_tokenizer = None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:],
    )
    fast.chat_template = template
    return fast
