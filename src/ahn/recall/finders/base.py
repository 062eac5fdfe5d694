"""The interface of a finder, which scores the passages of an archive for a question."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from ahn.recall.passages import Passages
    from ahn.recall.question import Question


class Finder:
    """Scores passages for a question. One is made for each question.

    Another package adds one through the entry-point group `ahn.recall.finders`, say for an embedding model.
    """

    name: ClassVar[str]

    def scores(self, passages: Passages, question: Question) -> np.ndarray:
        """Scores float32 [P], higher for passages that answer. Only their order counts.

        `passages.archive.memo` keeps a value that depends on the text alone.

        Raises:
            ConfigError: the archive lacks something that this finder needs. The message names it.
        """
        raise NotImplementedError
