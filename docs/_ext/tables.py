"""Tables of settings and flags, read from ``cem_fast.config`` and ``cem_fast.cli``: the directives ``settings`` and ``flags``."""

from __future__ import annotations

from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cem_fast import config
from cem_fast.cli.commands import COMMANDS


class Settings(SphinxDirective):
    """``{settings} RunConfig`` with the name of a group of settings."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        group = " ".join(self.content)
        found = [s for s in config.described(getattr(config, self.arguments[0])).values() if s.group == group]
        if not found:
            raise self.error(f"{self.arguments[0]} has no settings in the group {group!r}")
        rows = [(f"`--{s.name.replace('_', '-')}`", s.type, _shown(s.default), s.text) for s in found]
        return self.parse_text_to_nodes(_table(("setting", "type", "default", "meaning"), rows))


class Flags(SphinxDirective):
    """``{flags} train``: what a command does, and its arguments and flags that are no settings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = COMMANDS[self.arguments[0]]
        context = click.Context(command)
        own = [param for param in command.params if getattr(param, "group", "options") in ("options", "arguments")]
        records = [record for param in own if (record := param.get_help_record(context))]
        rows = [(f"`{name}`", text) for name, text in records]
        return self.parse_text_to_nodes(f"{command.help}\n\n{_table(('flag', 'meaning'), rows)}")


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    """A default as one writes it on the command line."""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`" if value else ""
    if value is None or value == {}:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directives."""
    app.add_directive("settings", Settings)
    app.add_directive("flags", Flags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
