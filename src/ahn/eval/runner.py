"""Runs tasks with policies: every combination is a folder, and what is done already is not done again.

Everything that can be wrong is found before a model is loaded: names, data, libraries, lengths, adapters.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ahn.config import AHNConfig
from ahn.cost import cost
from ahn.dialogue import Dialogue
from ahn.errors import AHNError, ConfigError, EvalError
from ahn.eval import policies, results
from ahn.eval.policies.base import RECALLED, Recalled
from ahn.eval.processes import Team
from ahn.eval.prompts import Prompt, encode, exact_tokens
from ahn.fingerprint import fingerprint, sampled
from ahn.version import __version__

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ahn.eval.policies.base import Policy, Stored
    from ahn.eval.tasks.base import Example, Task

BIN = 512  # tokens whose loss is averaged where it is kept by position
QUIET_S = 10  # between two signs of progress where there is no terminal to draw a bar on

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What all combinations share.

    Args:
        base: hub id, folder, GGUF file, or "smollm2-135m".
        window, sinks: tokens kept exactly. adapter, store, dtype, device, yarn: see `policies.base.Policy`.
        data: a folder, or a file, with the benchmarks' data; None: from the hub, or generated.
        seed: of everything that is drawn. limit: examples of a task, at most.
        batch: examples that are read at once, at most; of about the same length, from whatever task.
        share: noted where window and sinks are 1/share of each length, so that a report has the lengths together.
    """

    base: str
    window: int
    sinks: int
    adapter: str | None = None
    store: Stored | None = None
    recall: Recalled = RECALLED
    dtype: str | None = None
    device: str | None = None
    yarn: float | None = None
    data: Path | None = None
    seed: int = 0
    limit: int | None = None
    batch: int = 1
    share: int | None = None

    @property
    def memory(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "sinks": self.sinks,
            "adapter": self.adapter,
            "yarn": self.yarn,
            "store": self.store,
            "recall": self.recall,
        }


@dataclass(frozen=True)
class Work:
    """A task at a length: examples, and what a model reads of them."""

    task: Task
    length: int | None
    examples: list[Example]
    prompts: list[Prompt]
    data: str | None  # name of what the examples are from

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer, at most."""
        return max(
            len(prompt.ids) + (example.max_new_tokens if self.task.kind == "generate" else 0)
            for example, prompt in zip(self.examples, self.prompts, strict=True)
        )

    @property
    def mean(self) -> int:
        """Tokens of a prompt."""
        return round(sum(len(prompt.ids) for prompt in self.prompts) / len(self.prompts))


class Plain:
    """The base without a memory, between policies and between runs, so that it is loaded once."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] | None = None
        self._model: PreTrainedModel | None = None

    def take(self, of: tuple[Any, ...]) -> PreTrainedModel | None:
        """The base loaded for `of` (name, dtype, device), if it is the one held. Until `put` nothing is held: a policy
        that fails leaves its model changed."""
        model, self._model = self._model, None
        return model if self._of == of else None

    def put(self, of: tuple[Any, ...], model: PreTrainedModel) -> None:
        self._of, self._model = of, model


@dataclass(frozen=True)
class Job:
    """An example that is to be done."""

    work: Work
    example: Example
    prompt: Prompt
    folder: Path


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
    check(names, options)
    return run_prepared(prepare(tasks, lengths, options), names, options, output, say)


def check(names: Sequence[str], options: Options, longest: int = 1) -> None:
    """Whether these policies can read `longest` tokens. Raises ConfigError, AdapterError, BaseModelError."""
    from ahn.bases import base_config, torch_device, torch_dtype

    classes = [policies.get(name) for name in names]
    torch_dtype(options.dtype, torch_device(options.device))
    config = base_config(options.base)
    for cls in classes:
        cls.check(config, longest, **options.memory)


def prepare(tasks: Sequence[Task], lengths: Sequence[int | None], options: Options) -> list[Work]:
    """The prompts of every task at every length; no model is needed. Raises EvalError, ConfigError."""
    from ahn.bases import load_tokenizer

    tokenizer = load_tokenizer(options.base)
    return [_prepare(task, length, tokenizer, options) for task in tasks for length in dict.fromkeys(lengths)]


def run_prepared(
    work: Sequence[Work],
    names: Sequence[str],
    options: Options,
    output: Path,
    say: Say = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
    plain: Plain | None = None,
) -> list[Path]:
    """`run` on what `prepare` returned.

    Args:
        stop: asked before each batch; true leaves the rest for another time.
        plain: holds the base, for several runs one after the other.
    """
    from ahn.bases import base_config

    config, classes = base_config(options.base), [policies.get(name) for name in dict.fromkeys(names)]
    for one in work:
        for cls in classes:
            try:
                cls.check(config, one.longest, **options.memory)
            except ConfigError as error:
                raise ConfigError(f"{one.task.name}: {error}") from error
    team = Team()
    about = _about(options, config)
    say = say if team.first else lambda line: None
    return list(_run_all(classes, work, about, options, output, team, say, stop, plain or Plain()))


def _prepare(task: Task, length: int | None, tokenizer: Any, options: Options) -> Work:
    found = task.examples(tokenizer=tokenizer, length=length, data=options.data, seed=options.seed, limit=options.limit)
    examples = list(found)
    if not examples:
        raise ConfigError(f"{task.name}: no examples: expected at least one")
    if len({example.id for example in examples}) < len(examples):
        raise ConfigError(f"{task.name}: two examples have the same id")
    if task.kind == "generate":
        for example in examples:  # a library that is missing, or a field that cannot be used, is missed now
            _check_scoring(task, example)
    dialogue = Dialogue(tokenizer)
    prompts = [encode(tokenizer, example, dialogue) for example in examples]
    if task.kind == "loss":
        prompts = [Prompt(prompt.ids[:length], None) for prompt in prompts]
        for example, prompt in zip(examples, prompts, strict=True):
            if len(prompt.ids) < 2:
                raise ConfigError(f"{task.name}, {example.id}: {len(prompt.ids)} tokens: expected at least 2")
    return Work(task, length, examples, prompts, None if options.data is None else options.data.name)


def _check_scoring(task: Task, example: Example) -> None:
    try:
        task.score(example, "")
    except AHNError:
        raise
    except Exception as error:  # of a library that counts words, or a field of another type than is expected
        raise EvalError(f"{task.name}, {example.id}: cannot be scored: {type(error).__name__}: {error}") from error


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
    work: Sequence[Work],
    about: dict[str, Any],
    options: Options,
    output: Path,
    team: Team,
    say: Say,
    stop: Callable[[], bool],
    plain: Plain,
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
            todo.append((one, identifying, folder))
        team.wait()
        jobs = [_pending(one, folder) for one, _, folder in todo]
        texts = [list(found) for _, found in groupby((job for pending in jobs for job in pending), _text)]
        mine = [job for text in team.mine(texts) for job in text]  # whoever reads a text answers all questions on it
        policy: Policy | None = None
        of = (options.base, about["dtype"], options.device or team.device)
        if mine and not stop():
            model = plain.take(of)
            say(f"{cls.name}: {'loading' if model is None else 'on'} {about['base']}, {sum(map(len, jobs))} examples")
            policy = cls(of[0], dtype=of[1], device=of[2], model=model, **options.memory)
        try:
            _run_policy(policy, mine, todo, jobs, options, team, say, stop, held)
        finally:
            if policy is not None:
                plain.put(of, policy.release())
        team.wait()
        for one, _, folder in todo:
            if team.first:
                results.merge(folder, one.ids)
            if (folder / results.CONFIG).is_file():
                yield folder


def _run_policy(
    policy: Policy | None,
    mine: list[Job],
    todo: list[tuple[Work, dict[str, Any], Path]],
    jobs: list[list[Job]],
    options: Options,
    team: Team,
    say: Say,
    stop: Callable[[], bool],
    held: dict[tuple[str, int | None], dict[str, int]],
) -> None:
    """Do this process's share of what one policy has to do. Without a `policy` there is nothing to do."""
    weights = "" if policy is None else fingerprint(policy.model)
    for (one, identifying, folder), pending in zip(todo, jobs, strict=True) if team.first else ():
        if policy is not None and pending:
            _describe(policy, one, identifying, folder, options, weights)
        if not (folder / results.CONFIG).is_file():  # stopped before it was begun
            continue
        cost = results.load(folder).config["cost"]
        held.setdefault((one.task.name, one.length), {})[identifying["policy"]] = cost["cache_bytes"]
        check_budgets(held[one.task.name, one.length])
        say(
            f"{identifying['policy']}: {one.task.name}: {len(one.examples)} examples, {len(pending)} to do, "
            f"cache {cost['cache_bytes']:,} bytes after {cost['tokens']:,} tokens"
        )
    if policy is None:
        return
    every = 0.1 if sys.stderr.isatty() else QUIET_S
    with tqdm(total=len(mine), unit="example", desc=policy.name, disable=not team.first, mininterval=every) as bar:
        for batch in batches(mine, options.batch, policy.recalls):
            if stop():
                return
            for job, row in zip(batch, _do_fitting(policy, batch, options), strict=True):
                results.append(job.folder, team.rank, row)
            bar.update(len(batch))


def batches(jobs: Sequence[Job], size: int, recalls: bool = False) -> list[list[Job]]:
    """At most `size` jobs in each: questions on one text, or jobs of one kind, of lengths that differ by less than a
    fifth, since padding is read too, and with answers of about the same length. One by one they keep their order.

    Args:
        recalls: `Policy.recalls`.
    """
    if size == 1:
        return [[job] for job in jobs]
    asking = [job for job in jobs if _apart(job, recalls)]
    if asking:
        rest = [job for job in jobs if not _apart(job, recalls)]
        texts = [list(found) for _, found in groupby(asking, _text)]
        shared = [text[low : low + size] for text in texts for low in range(0, len(text), size)]
        return shared + (batches(rest, size) if rest else [])

    def alike(job: Job) -> tuple[str, int]:
        return job.work.task.kind, round(4 * math.log2(len(job.prompt.ids)))

    found: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: (alike(job), job.example.max_new_tokens, len(job.prompt.ids))):
        if not found or len(found[-1]) == size or alike(found[-1][0]) != alike(job):
            found.append([])
        found[-1].append(job)
    return found


def _apart(job: Job, recalls: bool) -> bool:
    """Whether the text is read apart from the question. Where there is no need, a prompt is read as one, as others."""
    return job.prompt.asks is not None and (recalls or job.example.apart)


def _text(job: Job) -> tuple[Path, Any]:
    """Alike for questions on one text."""
    return job.folder, job.example.id if job.prompt.asks is None else job.prompt.text


def _pending(work: Work, folder: Path) -> list[Job]:
    """The examples that are not done, or were done with another prompt."""
    done = {id: row["prompt"] for id, row in results.read_rows(folder).items()}
    every = zip(work.examples, work.prompts, strict=True)
    return [Job(work, example, prompt, folder) for example, prompt in every if done.get(example.id) != prompt.digest]


def _describe(
    policy: Policy, work: Work, identifying: dict[str, Any], folder: Path, options: Options, weights: str
) -> None:
    """Write the config, or check that the one there is of the same weights and note what goes on with it."""
    tokens = work.length or work.mean
    mixing, model = policy.flops(tokens)
    full = cost(policy.shape, tokens, AHNConfig(None))
    made_with = {"package": __version__, **results.environment()}
    config = {
        "version": results.VERSION,
        **identifying,
        "suite": work.task.suite,
        "kind": work.task.kind,
        "window": policy.window if policy.uses_window else None,
        "sinks": policy.sinks if policy.uses_window else None,
        "share": options.share if policy.uses_window else None,
        "adapter": None if options.adapter is None else Path(options.adapter).name,
        "data": work.data,
        "limit": options.limit,
        "fingerprint": weights,
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
        if before["fingerprint"] not in (weights, sampled(policy.model)):
            raise ConfigError(f"{folder}: results of a model with other weights: choose another output folder")
        config["made_with"] = [*(made for made in before["made_with"] if made != made_with), made_with]
    results.write_config(folder, config)


def _do_fitting(policy: Policy, batch: Sequence[Job], options: Options) -> list[results.Row]:
    """`_do`, in smaller batches where the memory of the device does not hold them."""
    import torch

    try:
        return _do(policy, batch, options)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(batch) // 2
    return [row for part in (batch[:half], batch[half:]) for row in _do_fitting(policy, part, options)]


def _do(policy: Policy, batch: Sequence[Job], options: Options) -> list[results.Row]:
    """Lines of the results for jobs of one kind."""
    ids = [job.prompt.ids for job in batch]
    if batch[0].work.task.kind == "loss":
        return [_measured(job, losses) for job, losses in zip(batch, policy.losses(ids), strict=True)]
    if not _apart(batch[0], policy.recalls):
        answers = policy.answers(ids, [job.example.max_new_tokens for job in batch])
        said: list[tuple[list[int], dict[str, Any]]] = [(answer, {}) for answer in answers]
    else:
        said = policy.asked([(job.prompt, job.example) for job in batch])
    return [
        _answered(policy, job, policy.tokenizer.decode(answer, skip_special_tokens=True), options) | more
        for job, (answer, more) in zip(batch, said, strict=True)
    ]


def _row(job: Job) -> results.Row:
    return {"id": job.example.id, "prompt": job.prompt.digest, "prompt_tokens": len(job.prompt.ids)}


def _measured(job: Job, losses: Tensor) -> results.Row:
    by_position = [round(part.mean().item(), 6) for part in losses.split(BIN)]
    return _row(job) | {"score": round(losses.mean().item(), 6), "losses": by_position}


def _answered(policy: Policy, job: Job, prediction: str, options: Options) -> results.Row:
    example, prompt = job.example, job.prompt
    row = _row(job) | {"prediction": prediction, "score": job.work.task.score(example, prediction)}
    row |= {"evidence": prompt.evidence, "depth": example.depth}
    if prompt.needs:  # of a fact's places the first may be a sink, the last may be in the window
        row["needs"] = [[fact[0], fact[-1]] if len(fact) > 1 else [fact[0]] for fact in prompt.needs]
    if example.extra.get("evidence_cut"):
        row["evidence_cut"] = True
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
