"""Compressive Transformer with maximum pooling."""

from ahn.eval.policies.compressive import Compressive


class CompressiveMax(Compressive):
    """Sinks, window, and the evicted keys and values pooled by fours: the largest, number by number."""

    name = "compressive-max"
    maximum = True
