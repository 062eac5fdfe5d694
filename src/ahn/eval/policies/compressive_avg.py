"""Compressive Transformer with average pooling."""

from ahn.eval.policies.compressive import Compressive


class CompressiveAvg(Compressive):
    """The mean of four."""

    name = "compressive-avg"
    maximum = False
