"""Runs tasks with policies: every combination is a folder, and what is done already is not done again.

Everything that can be wrong is found before a model is loaded: names, data, libraries, lengths, adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import ahn
from ahn.cost import cost
from ahn.errors import AHNError, ConfigError
from ahn.eval import policies, results
from ahn.eval.processes import Team
from ahn.eval.prompts import Prompt, encode, exact_tokens
from ahn.memory_file import fingerprint

if TYPE_CHECKING:
    from ahn.eval.policies.base import Policy, Stored
    from ahn.eval.tasks.base import Example, Task

BIN = 512  # tokens whose loss is averaged where it is kept by position

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What all combinations share.

    Args:
        base: hub id, folder, GGUF file, or "smollm2-135m".
        window, sinks: tokens kept exactly. adapter, store, dtype, device, yarn: see `policies.base.Policy`.
        data: a folder, or a file, with the benchmarks' data; None: from the hub, or generated.
        seed: of everything that is drawn. limit: examples of a task, at most.
    """

    base: str
    window: int
    sinks: int
    adapter: str | None = None
    store: Stored | None = None
    dtype: str | None = None
    device: str | None = None
    yarn: float | None = None
    data: Path | None = None
    seed: int = 0
    limit: int | None = None

    @property
    def memory(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "sinks": self.sinks,
            "adapter": self.adapter,
            "yarn": self.yarn,
            "store": self.store,
        }


@dataclass(frozen=True)
class Work:
    """A task at a length."""

    task: Task
    length: int | None
    examples: list[Example]
    digests: list[str]  # of their prompts
    longest: int  # tokens, prompt and answer
    mean: int  # tokens of a prompt

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]


def run(
    tasks: Sequence[Task],
    names: Sequence[str],
    lengths: Sequence[int | None],
    options: Options,
    output: Path,
    say: Say = lambda line: None,
) -> list[Path]:
    """Run every task at every length with every policy.

    Args:
        tasks: from `ahn.eval.tasks`. names: of policies. lengths: in tokens, None for the task's own.
        output: folder for the results, made if need be.
        say: told what goes on, line by line, by the first process.

    Returns:
        the folders of results, one for each combination.

    Raises:
        AHNError: something that is asked for cannot be done; before any model is loaded, unless it is about weights.
    """
    from ahn.bases import base_config, load_tokenizer

    for name in names:
        policies.check_name(name)
    team = Team()
    try:
        config, tokenizer = base_config(options.base), load_tokenizer(options.base)
        classes = [policies.get(name) for name in dict.fromkeys(names)]
        for cls in classes:
            cls.check(config, 1, **options.memory)
        work = [_prepare(task, length, tokenizer, options) for task in tasks for length in dict.fromkeys(lengths)]
        for cls in classes:
            for one in work:
                try:
                    cls.check(config, one.longest, **options.memory)
                except ConfigError as error:
                    raise ConfigError(f"{one.task.name}: {error}") from error
        say = say if team.first else lambda line: None
        return list(_run_all(classes, work, tokenizer, _about(options, config), options, output, team, say))
    finally:
        team.close()


def _prepare(task: Task, length: int | None, tokenizer: Any, options: Options) -> Work:
    found = task.examples(tokenizer=tokenizer, length=length, data=options.data, seed=options.seed, limit=options.limit)
    examples = list(found)
    if not examples:
        raise ConfigError(f"{task.name}: no examples: expected at least one")
    if len({example.id for example in examples}) < len(examples):
        raise ConfigError(f"{task.name}: two examples have the same id")
    if task.kind == "generate":
        task.score(examples[0], "")  # a library or a field that is missing is missed now
    digests, sizes, longest = [], [], 0
    for example in examples:
        prompt = _encode(task, length, tokenizer, example)
        digests.append(prompt.digest)
        sizes.append(len(prompt.ids))
        longest = max(longest, len(prompt.ids) + (example.max_new_tokens if task.kind == "generate" else 0))
    return Work(task, length, examples, digests, longest, round(sum(sizes) / len(sizes)))


def _encode(task: Task, length: int | None, tokenizer: Any, example: Example) -> Prompt:
    prompt = encode(tokenizer, example)
    return prompt if task.kind == "generate" else Prompt(prompt.ids[:length], None)


def _about(options: Options, config: Any) -> dict[str, Any]:
    """What identifies the model, whatever folder it is in."""
    import torch

    path = Path(options.base)
    sizes = config.to_dict()
    sizes.pop("_name_or_path", None), sizes.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode()).hexdigest()[:10]
    cuda = torch.cuda.is_available() if options.device is None else options.device.startswith("cuda")
    return {
        "base": path.resolve().name if path.exists() else options.base,
        "base_config": digest,
        "dtype": options.dtype or ("bfloat16" if cuda else "float32"),
        "seed": options.seed,
    }


def _run_all(
    classes: list[type[Policy]],
    work: list[Work],
    tokenizer: Any,
    about: dict[str, Any],
    options: Options,
    output: Path,
    team: Team,
    say: Say,
) -> Iterator[Path]:
    held: dict[tuple[str, int | None], dict[str, int]] = {}
    for cls in classes:
        todo = []
        for one in work:
            identifying: dict[str, Any] = {"task": one.task.name, "length": one.length, "policy": cls.name}
            identifying |= {"settings": cls.settings(**options.memory), **about}
            folder = results.folder_of(output, identifying)
            if team.first:
                folder.mkdir(parents=True, exist_ok=True)
                results.merge(folder, one.ids)
            team.wait()
            todo.append((one, identifying, folder, _pending(one, folder)))
        count = sum(len(pending) for *_, pending in todo)
        mine = sum(len(team.mine(pending)) for *_, pending in todo)
        policy: Policy | None = None
        if mine:
            say(f"{cls.name}: loading {about['base']} for {count} examples")
            policy = cls(options.base, dtype=about["dtype"], device=options.device or team.device, **options.memory)
        for one, identifying, folder, pending in todo if team.first else ():
            if policy is not None and pending:
                _describe(policy, one, identifying, folder, options)
            cost = results.load(folder).config["cost"]
            held.setdefault((one.task.name, one.length), {})[cls.name] = cost["cache_bytes"]
            check_budgets(held[one.task.name, one.length])
            say(
                f"{cls.name}: {one.task.name}: {len(one.examples)} examples, {len(pending)} to do, "
                f"cache {cost['cache_bytes']:,} bytes after {cost['tokens']:,} tokens"
            )
        with tqdm(total=mine, unit="example", desc=cls.name, disable=None if team.first else True) as bar:
            for one, _, folder, pending in todo:
                for example in team.mine(pending):
                    assert policy is not None
                    results.append(folder, team.rank, _do(policy, one, example, options))
                    bar.update()
        team.wait()
        for one, _, folder, _ in todo:
            if team.first:
                results.merge(folder, one.ids)
            yield folder
        del policy


def _pending(work: Work, folder: Path) -> list[Example]:
    """The examples that are not done, or were done with another prompt."""
    done = {id: row["prompt"] for id, row in results.read_rows(folder).items()}
    return [
        example for example, digest in zip(work.examples, work.digests, strict=True) if done.get(example.id) != digest
    ]


def _describe(policy: Policy, work: Work, identifying: dict[str, Any], folder: Path, options: Options) -> None:
    """Write the config, or check that the one there is of the same weights and note what goes on with it."""
    tokens = work.length or work.mean
    mixing, model = policy.flops(tokens)
    full = cost(policy.shape, tokens, cell=None)
    made_with = {"package": ahn.__version__, **results.environment()}
    config = {
        "version": results.VERSION,
        **identifying,
        "suite": work.task.suite,
        "kind": work.task.kind,
        "window": policy.window if policy.uses_window else None,
        "sinks": policy.sinks if policy.uses_window else None,
        "adapter": None if options.adapter is None else Path(options.adapter).name,
        "data": None if options.data is None else options.data.name,
        "limit": options.limit,
        "fingerprint": fingerprint(policy.model),
        "cost": {
            "tokens": tokens,
            "cache_bytes": policy.cache_bytes(tokens),
            "mixing_flops": mixing,
            "model_flops": model,
            "parameters_added": policy.parameters_added,
            "full_cache_bytes": policy.shape.kv_elements(tokens) * policy.model.dtype.itemsize,
            "full_mixing_flops": full.mixing.full,
            "full_model_flops": full.flops.full,
        },
        "made_with": [made_with],
    }
    if (folder / results.CONFIG).is_file():
        before = results.load(folder).config
        if before["fingerprint"] != config["fingerprint"]:
            raise ConfigError(f"{folder}: results of a model with other weights: choose another output folder")
        config["made_with"] = [*(made for made in before["made_with"] if made != made_with), made_with]
    results.write_config(folder, config)


def _do(policy: Policy, work: Work, example: Example, options: Options) -> results.Row:
    prompt = _encode(work.task, work.length, policy.tokenizer, example)
    row: results.Row = {"id": example.id, "prompt": prompt.digest, "prompt_tokens": len(prompt.ids)}
    if work.task.kind == "loss":
        losses = policy.losses(prompt.ids)
        if not len(losses):
            raise ConfigError(f"{work.task.name}, {example.id}: {len(prompt.ids)} tokens: expected at least 2")
        by_position = [round(part.mean().item(), 6) for part in losses.split(BIN)]
        return row | {"score": round(losses.mean().item(), 6), "losses": by_position}
    ids = policy.generate(prompt.ids, example.max_new_tokens)
    prediction = policy.tokenizer.decode(ids, skip_special_tokens=True)
    row |= {"prediction": prediction, "score": work.task.score(example, prediction)}
    row |= {"evidence": prompt.evidence, "depth": example.depth}
    if prompt.evidence is not None and policy.uses_window:
        exact = exact_tokens(prompt.evidence, len(prompt.ids), options.window, options.sinks)
        row |= {"inside": exact, "outside": prompt.evidence[1] - prompt.evidence[0] - exact}
    return row


def check_budgets(held: dict[str, int]) -> None:
    """That no baseline with a bounded cache holds more than the memory it is compared with.

    Args:
        held: bytes by policy.

    Raises:
        AHNError: one does.
    """
    memory = held.get("ahn")
    for name, size in held.items():
        if memory is not None and name != "full" and size > memory:
            raise AHNError(
                f"policy {name} holds {size:,} bytes, more than the {memory:,} of the memory: not comparable"
            )
