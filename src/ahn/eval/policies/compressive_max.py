"""Compressive Transformer with maximum pooling."""

from ahn.eval.policies.compressive import Compressive


class CompressiveMax(Compressive):
    """The largest of four, number by number."""

    name = "compressive-max"
    maximum = True
