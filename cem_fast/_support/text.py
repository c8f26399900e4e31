"""Text from files and servers, made safe to print and to paste."""

from __future__ import annotations

import shlex


def printable(text: str) -> str:
    """Text with its control characters escaped, except for line breaks and tabs, so that it cannot command the terminal.

    Args:
        text: the text.

    Example:
        >>> from cem_fast._support.text import printable
        >>> printable("Not Found\\x1b[2J")
        'Not Found\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, *, at_most: int = 300) -> str:
    """The start of a text from elsewhere, such as another package's error, on one line that is safe to print.

    Args:
        text: the text.
        at_most: characters that are kept.

    Example:
        >>> from cem_fast._support.text import one_line
        >>> one_line("not\\n  a message")
        'not a message'
    """
    return " ".join(printable(text[:at_most]).split())


def shell_line(recorded: str) -> str:
    """A recorded command as one that a shell runs without a pipe, an expansion or a second command.

    Args:
        recorded: the command, as a file gives it.

    Example:
        >>> from cem_fast._support.text import shell_line
        >>> shell_line("cem-fast evaluate --name 'my grid'"), shell_line("cem-fast demo; rm -r *")
        ("cem-fast evaluate --name 'my grid'", "cem-fast 'demo;' rm -r '*'")
    """
    try:
        return printable(shlex.join(shlex.split(recorded)))
    except ValueError:  # an open quote
        return printable(shlex.quote(recorded))
