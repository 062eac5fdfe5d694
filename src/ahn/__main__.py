"""`python -m ahn`, as launchers such as torchrun start it."""

import sys

from ahn.cli import main

if __name__ == "__main__":
    sys.exit(main())
