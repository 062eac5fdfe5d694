"""Measures the loss of predictions: `python benchmarks/loss.py WHAT`, where WHAT is a file of benchmarks/losses."""

from common import main

if __name__ == "__main__":
    main("losses", __doc__)
