"""Measures what a memory changes in the predictions: `python benchmarks/loss.py WHAT`, a file of benchmarks/losses."""

from common import main

if __name__ == "__main__":
    main("losses", __doc__)
