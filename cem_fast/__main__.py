"""``python -m cem_fast`` is the command line ``cem-fast``."""

from cem_fast.cli import command

if __name__ == "__main__":
    command()
