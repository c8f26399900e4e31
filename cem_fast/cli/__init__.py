"""The command line ``cem-fast``."""

from typing import NoReturn

from cem_fast.cli.signals import clean_imports


def command() -> NoReturn:
    """Runs the command line as a process of its own and exits with its status."""
    with clean_imports():  # torch alone takes seconds
        from cem_fast._support import ranks
        from cem_fast.cli.main import main
    ranks.leave(main())
