"""The directive ``settings``: a table of settings with type, default and meaning, read from the dataclasses of ``cem_fast.config``."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cem_fast import config


class Settings(SphinxDirective):
    """``{settings} RunConfig`` with the name of a group of settings."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        group = " ".join(self.content)
        found = [s for s in config.described(getattr(config, self.arguments[0])).values() if s.group == group]
        if not found:
            raise self.error(f"{self.arguments[0]} has no settings in the group {group!r}")
        lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for s in found:
            text = s.text.replace("|", "\\|")
            lines.append(f"| `--{s.name.replace('_', '-')}` | {s.type} | {_shown(s.default)} | {text} |")
        return self.parse_text_to_nodes("\n".join(lines))


def _shown(value: Any) -> str:
    """A default as one writes it on the command line."""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`" if value else ""
    if value is None or value == {}:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
