"""The examples of tasks, and their prompts. No model is needed for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.dialogue import Dialogue
from ahn.errors import AHNError, ConfigError, EvalError
from ahn.eval import results
from ahn.eval.options import Options
from ahn.eval.prompts import Prompt, encode

if TYPE_CHECKING:
    from ahn.eval.tasks.base import Example, Task


@dataclass(frozen=True)
class Work:
    """A task at a length: its examples and their prompts."""

    task: Task
    length: int | None
    examples: list[Example]
    prompts: list[Prompt]
    data: str | None  # name of the file or folder that the examples are from

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(
            len(prompt.ids) + (example.max_new_tokens if self.task.kind == "generate" else 0)
            for example, prompt in zip(self.examples, self.prompts, strict=True)
        )

    @property
    def mean(self) -> int:
        """Tokens of a prompt on average."""
        return round(sum(len(prompt.ids) for prompt in self.prompts) / len(self.prompts))


@dataclass(frozen=True)
class Job:
    """An example to do, and the folder of its results."""

    work: Work
    example: Example
    prompt: Prompt
    folder: Path


def prepare(tasks: Sequence[Task], lengths: Sequence[int | None], options: Options) -> list[Work]:
    """The prompts of every task at every length; no model is needed. Raises EvalError, ConfigError."""
    from ahn.bases import load_tokenizer

    tokenizer = load_tokenizer(options.base)
    return [_prepare(task, length, tokenizer, options) for task in tasks for length in dict.fromkeys(lengths)]


def _prepare(task: Task, length: int | None, tokenizer: Any, options: Options) -> Work:
    found = task.examples(tokenizer=tokenizer, length=length, data=options.data, seed=options.seed, limit=options.limit)
    examples = list(found)
    if not examples:
        raise ConfigError(f"{task.name}: no examples: expected at least one")
    if len({example.id for example in examples}) < len(examples):
        raise ConfigError(f"{task.name}: two examples have the same id")
    if task.kind == "generate":
        for example in examples:  # finds a missing library or an unusable field before a model is loaded
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
    except Exception as error:  # from a library that counts words, or from a field of the wrong type
        raise EvalError(f"{task.name}, {example.id}: cannot be scored: {type(error).__name__}: {error}") from error


def pending(work: Work, folder: Path) -> list[Job]:
    """The examples that are not done yet, or were done with another prompt."""
    done = {id: row["prompt"] for id, row in results.read_rows(folder).items()}
    every = zip(work.examples, work.prompts, strict=True)
    return [Job(work, example, prompt, folder) for example, prompt in every if done.get(example.id) != prompt.digest]
