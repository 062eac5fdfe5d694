"""Measures time and memory: `python benchmarks/speed.py WHAT`, where WHAT is a file of benchmarks/speeds."""

from common import main

if __name__ == "__main__":
    main("speeds", __doc__)
