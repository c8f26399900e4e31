"""Optional packages: imported when they are needed, with an error that says how to install them."""

from __future__ import annotations

import importlib
from types import ModuleType


def load(module: str, needed_by: str, install: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: name of the module.
        needed_by: what needs the package, for the error.
        install: name under which pip installs the package.

    Returns:
        The module.

    Raises:
        ImportError: the package is missing or fails in its import; the error gives the reason and the command that installs it.

    Example:
        >>> from cem_fast._support import optional
        >>> optional.load("json", "this example", "json").loads("[1]")
        [1]
        >>> optional.load("package_of_nobody", "this example", "package-of-nobody")
        Traceback (most recent call last):
        ...
        ImportError: this example needs the package package_of_nobody: pip install package-of-nobody
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in (package, module):
            raise ImportError(f"{needed_by} needs the package {package}: pip install {install}") from None
        reason: Exception = error
    except Exception as error:  # packages with compiled parts raise many kinds if they do not fit the others
        reason = error
    raise ImportError(
        f"{needed_by} needs the package {package}, which fails in its import ({type(reason).__name__}: {reason}): "
        f"pip install --force-reinstall {install}"
    ) from reason
