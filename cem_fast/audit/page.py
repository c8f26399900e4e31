"""Files of an audit: audit.json and report.html."""

from __future__ import annotations

import json
from pathlib import Path

from cem_fast._support.files import check_target, write_atomically
from cem_fast._support.text import shell_line
from cem_fast.audit.records import Audit
from cem_fast.report import charts

RESULT, PAGE = "audit.json", "report.html"
MARKS = {RESULT: b'"schema": 1', PAGE: b"<title>cem_fast: audit"}


def check(folder: str | Path) -> None:
    """Fails early if the files could not be written later.

    Args:
        folder: where they go.

    Raises:
        ValueError: the folder cannot be written to, or holds another program's files.

    Example:
        >>> import tempfile
        >>> from cem_fast.audit import page
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page.check(folder)
    """
    check_target(folder, MARKS)


def write(result: Audit, folder: str | Path, *, command: str) -> Path:
    """Writes audit.json and report.html.

    Args:
        result: the audit.
        folder: where they go; created if needed.
        command: command that made it, for the page.

    Returns:
        The page.

    Raises:
        ValueError: as :func:`check`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.audit import audit, page
        >>> result = audit(torch.nn.AvgPool2d(2), torch.rand(20, 1, 8, 8), attacks=["ridge"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page.write(result, folder, command="").name
        'report.html'
    """
    check(folder)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    content = render(result, command=command).encode()
    write_atomically(place / RESULT, (json.dumps(result.to_json(), indent=1) + "\n").encode())
    write_atomically(place / PAGE, content)
    return place / PAGE


def render(result: Audit, *, command: str) -> str:
    """Returns the page.

    Args:
        result: the audit.
        command: command that made it.

    Example:
        >>> import torch
        >>> from cem_fast.audit import audit, page
        >>> result = audit(torch.nn.AvgPool2d(2), torch.rand(20, 1, 8, 8), attacks=["ridge"])
        >>> page.render(result, command="").splitlines()[0]
        '<!doctype html>'
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("cem_fast.audit", "."), PackageLoader("cem_fast.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {name: [charts.picture(image) for image in images] for name, images in result.pictures.items()}
    return environment.get_template("audit.html").render(
        result=result, pictures=pictures, strongest=result.attacks[result.strongest], command=shell_line(command)
    )
