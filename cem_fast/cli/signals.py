"""What may go wrong while the command line still imports its packages, of which torch alone takes seconds: Ctrl-C, and the environment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


@contextmanager
def starting() -> Iterator[None]:
    """The imports of this package: where this process is the command line, what stops them is one line and an exit status."""
    expect()
    try:
        yield
    except (ValueError, RuntimeError) as error:  # the environment asks for what there is not
        if not _is_command_line() or os.environ.get("CEM_FAST_DEBUG") == "1":
            raise
        print(f"cem-fast: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def expect() -> None:
    """From now on Ctrl-C is one line and exit status 130, where this process is the command line; elsewhere it is not ours.

    It is not an exception, because the middle of an import turns one into anything at all.
    """
    if _is_command_line() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def over() -> None:
    """From now on Ctrl-C is an exception again, so that finished work can be kept."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command_line() -> bool:
    return Path(sys.argv[0]).stem == "cem-fast" or ("-m", "cem_fast") in zip(sys.orig_argv, sys.orig_argv[1:])


def _stop(*_: object) -> NoReturn:
    os.write(2, b"cem-fast: interrupted before anything was started\n")
    os._exit(130)
