"""Compressive Transformer with average pooling."""

from ahn.eval.policies.compressive import Compressive


class CompressiveAvg(Compressive):
    """Sinks, window, and the evicted keys and values pooled by fours: the mean."""

    name = "compressive-avg"
    maximum = False
