"""Runs tasks with policies. Every combination has a folder of results, and finished examples are not done again.

All errors in names, data, libraries, lengths and adapters are found before a model is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ahn.errors import ConfigError
from ahn.eval import policies, results
from ahn.eval.batches import batches, text_of
from ahn.eval.description import check_budgets, describe, model_of
from ahn.eval.options import Options
from ahn.eval.processes import Team
from ahn.eval.rows import rows_of
from ahn.eval.work import Job, Work, pending, prepare
from ahn.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ahn.eval.policies.base import Policy
    from ahn.eval.tasks.base import Task

QUIET_S = 10  # between two signs of progress where there is no terminal to draw a bar on

Say = Callable[[str], None]


class Plain:
    """Holds the base without a memory between policies and between runs, so that it is loaded once."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] | None = None
        self._model: PreTrainedModel | None = None

    def take(self, of: tuple[Any, ...]) -> PreTrainedModel | None:
        """The base loaded for `of` (name, dtype, device), if it is the one held. Nothing is held until the next `put`,
        because a policy that fails leaves its model changed."""
        model, self._model = self._model, None
        return model if self._of == of else None

    def put(self, of: tuple[Any, ...], model: PreTrainedModel) -> None:
        self._of, self._model = of, model


@dataclass(frozen=True)
class Control:
    """The caller's hold on a run.

    Args:
        say: called with each line of progress, by the first process only.
        stop: asked before each batch; true leaves the rest for another time.
        plain: holds the base, for several runs one after the other.
    """

    say: Say = lambda line: None
    stop: Callable[[], bool] = lambda: False
    plain: Plain = field(default_factory=Plain)


@dataclass(frozen=True)
class _Run:
    """The objects that all policies of a run share.

    Args:
        model: the keys that identify the model.
        held: bytes of the cache by (task, length) and policy; filled as policies are run.
    """

    options: Options
    output: Path
    team: Team
    control: Control
    model: dict[str, Any]
    held: dict[tuple[str, int | None], dict[str, int]] = field(default_factory=dict)

    def say(self, line: str) -> None:
        if self.team.first:
            self.control.say(line)


@dataclass(frozen=True)
class _Part:
    """A task at a length with one policy: the keys that identify its results, their folder, and the jobs to do."""

    work: Work
    identifying: dict[str, Any]
    folder: Path
    jobs: list[Job]


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
        tasks: from `ahn.eval.tasks`.
        names: of policies.
        lengths: in tokens, None for the task's own.
        output: folder for the results, made if need be.
        say: called with each line of progress, by the first process only.

    Returns:
        the folders of results, one for each combination.

    Raises:
        AHNError: a request that cannot be met. Except for faults of weights, it is raised before a model is loaded.
    """
    check(names, options)
    return run_prepared(prepare(tasks, lengths, options), names, options, output, Control(say))


def check(names: Sequence[str], options: Options, longest: int = 1) -> None:
    """Check that these policies can read `longest` tokens. Raises ConfigError, AdapterError, BaseModelError."""
    from ahn.bases import base_config, torch_device, torch_dtype

    classes = [policies.get(name) for name in names]
    torch_dtype(options.dtype, torch_device(options.device))
    config = base_config(options.base)
    for cls in classes:
        cls.check(config, longest, options.kept)


def run_prepared(
    work: Sequence[Work], names: Sequence[str], options: Options, output: Path, control: Control | None = None
) -> list[Path]:
    """`run` for the work that `prepare` returned."""
    from ahn.bases import base_config

    config, classes = base_config(options.base), [policies.get(name) for name in dict.fromkeys(names)]
    for one in work:
        for cls in classes:
            try:
                cls.check(config, one.longest, options.kept)
            except ConfigError as error:
                raise ConfigError(f"{one.task.name}: {error}") from error
    shared = _Run(options, output, Team(), control or Control(), model_of(options, config))
    return [folder for cls in classes for folder in _run_policy(shared, cls, work)]


def _run_policy(run: _Run, cls: type[Policy], work: Sequence[Work]) -> Iterator[Path]:
    """Run one policy on all the work. Yields the folders that hold results."""
    options, team = run.options, run.team
    parts = _parts(run, cls, work)
    texts = [list(found) for _, found in groupby((job for part in parts for job in part.jobs), text_of)]
    mine = [job for text in team.mine(texts) for job in text]  # one process answers all questions on a text
    policy: Policy | None = None
    of = (options.base, run.model["dtype"], options.device or team.device)
    if mine and not run.control.stop():
        model = run.control.plain.take(of)
        count = sum(len(part.jobs) for part in parts)
        run.say(f"{cls.name}: {'loading' if model is None else 'on'} {run.model['base']}, {counted(count)}")
        policy = cls(of[0], options.kept, dtype=of[1], device=of[2], model=model)
    try:
        if team.first:
            weights = "" if policy is None else fingerprint(policy.model)
            for part in parts:
                if policy is not None and part.jobs:
                    describe(policy, part.work, part.identifying, part.folder, options, weights)
                _announce(run, part)
        if policy is not None:
            _do(run, policy, mine)
    finally:
        if policy is not None:
            run.control.plain.put(of, policy.release())
    team.wait()
    for part in parts:
        if team.first:
            results.merge(part.folder, part.work.ids)
        if (part.folder / results.CONFIG).is_file():
            yield part.folder


def _parts(run: _Run, cls: type[Policy], work: Sequence[Work]) -> list[_Part]:
    """The parts of a policy's work. Their folders are made, and what several processes wrote there is merged."""
    todo = []
    for one in work:
        identifying: dict[str, Any] = {"task": one.task.name, "length": one.length, "policy": cls.name}
        identifying |= {"settings": cls.settings(run.options.kept), **run.model}
        folder = results.folder_of(run.output, identifying)
        if run.team.first:
            folder.mkdir(parents=True, exist_ok=True)
            results.merge(folder, one.ids)
        todo.append((one, identifying, folder))
    run.team.wait()
    return [_Part(one, identifying, folder, pending(one, folder)) for one, identifying, folder in todo]


def _announce(run: _Run, part: _Part) -> None:
    """Say how much of a part is to be done. Raises AHNError if its cache is larger than the memory's."""
    name, task = part.identifying["policy"], part.work.task.name
    if not (part.folder / results.CONFIG).is_file():  # stopped before it was begun
        return
    cost = results.load(part.folder).config["cost"]
    held = run.held.setdefault((task, part.work.length), {})
    held[name] = cost["cache_bytes"]
    check_budgets(held)
    run.say(
        f"{name}: {task}: {counted(len(part.work.examples))}, {len(part.jobs)} to do, "
        f"cache {cost['cache_bytes']:,} bytes after {cost['tokens']:,} tokens"
    )


def _do(run: _Run, policy: Policy, jobs: list[Job]) -> None:
    """Do this process's jobs, and write each row as soon as it is there."""
    team, every = run.team, 0.1 if sys.stderr.isatty() else QUIET_S
    with tqdm(total=len(jobs), unit="example", desc=policy.name, disable=not team.first, mininterval=every) as bar:
        for batch in batches(jobs, run.options.batch, policy.recalls):
            if run.control.stop():
                return
            for job, row in zip(batch, rows_of(policy, batch), strict=True):
                results.append(job.folder, team.rank, row)
            bar.update(len(batch))


def counted(examples: int) -> str:
    return f"{examples} example{'s' * (examples != 1)}"
