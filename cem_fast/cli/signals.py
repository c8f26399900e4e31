"""Signals of the command line: Ctrl-C, SIGTERM, and clean exits while it imports torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Terminated(BaseException):
    """SIGTERM arrived."""


def heed_sigterm() -> None:
    """Raise ``Terminated`` at SIGTERM from now on."""
    signal.signal(signal.SIGTERM, _terminate)


@contextmanager
def clean_imports() -> Iterator[None]:
    """Turn Ctrl-C and errors of environment variables during imports into one line and an exit status.

    Ctrl-C ends the process at once, since an exception in the middle of an import may turn into any other exception.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    try:
        yield
    except (ValueError, RuntimeError) as error:  # the environment asks for a missing backend
        if os.environ.get("CEM_FAST_DEBUG") == "1":
            raise
        print(f"cem-fast: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: object) -> NoReturn:
    os.write(2, b"cem-fast: interrupted before anything was started\n")
    os._exit(130)


def _terminate(*_: object) -> NoReturn:
    raise Terminated
