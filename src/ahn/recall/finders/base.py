"""What a finder is: it scores the passages of an archive for a question."""

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
        """float32 [P], by passage, higher for those that answer. Only their order counts.

        Whatever depends on the text alone is kept by `passages.archive.memo`.

        Raises:
            ConfigError: the archive lacks what this finder needs; says what.
        """
        raise NotImplementedError
