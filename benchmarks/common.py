"""Parts that several tools share: command lines, result files, models and texts to measure with."""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHARE = 0.74  # of the window's slots, for a store
SINKS = 64
BOOK = HERE.parent / "src" / "ahn" / "data" / "arsene-lupin.txt"


def main(folder: str, about: str, argv: Sequence[str] | None = None) -> None:
    """Run one of the files of a folder.

    A file has a docstring, NAME of its result file, TINY, a command line that takes seconds on any device,
    `arguments(parser)`, and `run(options)`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=about)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted((HERE / folder).glob("[!_]*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            raw = argparse.RawDescriptionHelpFormatter
            command = commands.add_parser(path.stem, help=doc.partition("\n")[0], description=doc, formatter_class=raw)
            if words[:1] != [path.stem]:  # only the chosen file is imported, because each needs other libraries
                continue
            module = import_module(f"{folder}.{path.stem}")
            module.arguments(command)
            command.add_argument("--tiny", action="store_true", help="try it with a tiny model and text")
            command.add_argument("--name", default=module.NAME, help="name of the file in results/ (%(default)s)")
            command.set_defaults(run=module.run)
            if "--tiny" in words:
                inputs = tiny_inputs(Path(scratch)) if "{" in module.TINY else {}
                words = [words[0], *module.TINY.format(**inputs).split(), "--name", "local", *words[1:]]
        options = parser.parse_args(words)
        options.run(options)


@cache
def environment() -> dict[str, Any]:
    """The environment that produces the numbers of a result file."""
    from ahn.eval.results import stamp

    made = stamp()
    commit, plus, changes = (made["commit"] or "").partition("+")
    return made | {"commit": commit[:7] + plus + changes or None}


def write(name: str, **content: Any) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    return path


def now(device: Any) -> float:
    """Seconds, after the device has finished its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes() -> int:
    """Peak bytes of the GPU's memory since its statistics were reset, or without a GPU of resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_rate(device: Any, repeats: int = 20) -> float:
    """FLOPs a second of a large product: bfloat16 on CUDA, float32 and smaller on a CPU."""
    import torch

    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32).unbind()
    for _ in range(3):
        a @ b
    start = now(device)
    for _ in range(repeats):
        a @ b
    return repeats * 2 * size**3 / (now(device) - start)


def random_model(shape: Any, device: Any) -> Any:
    """A Qwen2 of this shape (`ahn.cost.Shape`) with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.D,
        num_attention_heads=shape.N,
        num_key_value_heads=shape.M,
        head_dim=shape.H,
        intermediate_size=shape.F,
        vocab_size=shape.V,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=131072,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        ).eval()


def put_on(model: Any, adapter: str | None, sink_positions: str = "clipped") -> str:
    """Give a model the memory of an adapter, or sinks and window alone, in place of what it has; returns its name.

    `adapter`: a name or folder. "@none" behind it leaves out its store, "@0.74" gives the store that share of the
    window's slots.
    """
    import ahn
    from ahn.adapter_files import read_adapter
    from ahn.hf.weights import apply

    if hasattr(model, "ahn_config"):
        ahn.detach(model)
    if adapter is None:
        ahn.augment(model, ahn.AHNConfig(None, 16, 0, sink_positions=sink_positions))
        return "sinks and window"
    name, _, share = adapter.partition("@")
    found = read_adapter(name)
    config = found.config
    if share == "none":
        config = config.without_store()
    elif share:
        slots = config.store_size + config.window
        size = round(float(share) * slots)
        config = config.replace(store_size=size, window=slots - size)
    ahn.augment(model, config)
    apply(found, model)
    store = f", {config.store} store" if config.store else ""
    return f"{config.cell}{store} ({Path(adapter).name})"


def set_lossless(model: Any, size: int, sinks: int) -> None:
    """Set the number of lossless tokens. `sinks` of them are sinks; the store keeps its share of the others."""
    from ahn.hf.augment import set_window

    config = model.ahn_config.with_lossless(size, sinks)
    set_window(model, config.window, sinks, config.store_size)


def records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, which may be xz-compressed. Ends the program if it cannot be read."""
    try:
        with lzma.open(path, "rt", encoding="utf-8") if is_xz(path) else open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError, lzma.LZMAError) as error:
        print(f"{path}: cannot be read: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def write_records(path: str | Path, made: Iterable[dict[str, Any]]) -> None:
    """Write a file that `records` reads."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in made]
    with lzma.open(path, "wt", encoding="utf-8") if is_xz(path) else open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)
    print(f"{path}: {len(lines)} documents")


def is_xz(path: str | Path) -> bool:
    return str(path).endswith(".xz")


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant:"
TINY_TEXT = "The old cat sat on the mat and looked at 12 mice. Wo ist die Maus? 猫坐在垫子上。 🐈 f(x) = {y: 3};\n"


def tiny_inputs(folder: Path) -> dict[str, Path]:
    """Files for `--tiny`: a random base with its tokenizer, an adapter for it, books and chats as JSON lines."""
    from contextlib import redirect_stdout

    import ahn
    from ahn.bases import load_base

    base, adapter, books, chats, runs = (
        folder / name for name in ("base", "adapter", "books.jsonl", "chats.jsonl", "runs.json")
    )
    write_tiny_base(base)
    model = ahn.augment(load_base(str(base)), ahn.AHNConfig("deltanet", 24, 8))
    ahn.save_adapter(model, adapter)
    messages = [{"role": "user", "content": "Who sat?"}, {"role": "assistant", "content": "The old cat"}]
    with redirect_stdout(sys.stderr):
        write_records(books, ({"text": f"{n} {TINY_TEXT * 40}"} for n in range(3)))
        write_records(chats, ({"document": f"{n} {TINY_TEXT * 8}", "messages": messages} for n in range(4)))
    runs.write_text(json.dumps([{"name": "tiny", "lossless": [300], "sinks": [4], "window": 60, "kept_sinks": 4}]))
    return {"base": base, "adapter": adapter, "books": books, "chats": chats, "runs": runs, "text": BOOK}


def write_tiny_base(folder: Path, size: int = 32, layers: int = 2) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TINY_TEXT] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=size,
        intermediate_size=size,
        num_hidden_layers=layers,
        num_attention_heads=size // 8,
        num_key_value_heads=max(1, size // 16),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
