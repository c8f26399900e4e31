"""The command line ``cem-fast``."""

from typing import NoReturn

from cem_fast.cli.signals import clean_imports


def command() -> NoReturn:
    """Run the command line in this process and exits with its status."""
    with clean_imports():
        from cem_fast.cli import torchrun
        from cem_fast.cli.console import escape_warnings
        from cem_fast.cli.main import main
    escape_warnings()
    torchrun.leave(main())
