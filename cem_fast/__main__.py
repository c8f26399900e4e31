"""``python -m cem_fast`` is the command line ``cem-fast``."""

import sys

from cem_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
