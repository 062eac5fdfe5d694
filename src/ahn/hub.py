"""Asks whether the hub answers, and knows the folder of converted bases."""

from __future__ import annotations

import os
from pathlib import Path

from ahn.errors import BaseModelError

_HUB_TIMEOUT_S = 5


def cache_folder() -> Path:
    """The folder of converted bases: `$AHN_CACHE`, else `$XDG_CACHE_HOME/ahn`, else `~/.cache/ahn`."""
    own = os.environ.get("AHN_CACHE")
    path = expanded(own or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ahn"))
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise BaseModelError(f"{path}: there is no such home folder; AHN_CACHE can name another folder")
    return path


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` replaced by the home folder, if there is one."""
    return Path(os.path.expanduser(path))


def hub_unreachable(repo: str, kind: str = "model") -> str | None:
    """Why the hub cannot be asked for a repository, so that only its local cache is left. None if it answers.

    This asks once and quickly; the loaders would retry for half a minute.

    Args:
        kind: "model" or "dataset".

    Raises:
        BaseModelError: the hub says that there is no such repository.
    """
    from huggingface_hub import constants, dataset_info, model_info
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        (dataset_info if kind == "dataset" else model_info)(repo, timeout=_HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        raise BaseModelError(f"the hub has no {kind} {repo!r}, or it is private and you are not logged in") from None
    except Exception as error:  # the hub client's HTTP library, and so its errors, differ between its versions
        return str(error) or type(error).__name__
    return None


def check_dataset(repo: str) -> None:
    """Raises ConnectionError or BaseModelError at once if the hub does not have a dataset or does not answer.

    With HF_HUB_OFFLINE the hub is not asked: the datasets library then looks in its cache, without retries.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and (reason := hub_unreachable(repo, "dataset")):
        raise ConnectionError(reason)
