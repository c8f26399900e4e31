"""The directive ``settings``: a table of settings with flag, default and meaning, read from the dataclasses of ``cem_fast.config``."""

from __future__ import annotations

from dataclasses import MISSING, fields
from fnmatch import fnmatch
from typing import Any

from docstring_parser import parse
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cem_fast.config import GridConfig, RunConfig, SharedConfig

CONFIGS = {config.__name__: config for config in (SharedConfig, RunConfig, GridConfig)}


def own_settings(config: type) -> dict[str, tuple[str, str]]:
    """Default and meaning of the settings that a dataclass adds to those it inherits, in their order.

    Raises:
        KeyError: the docstring does not describe a setting.
    """
    meanings = {each.arg_name: each.description or "" for each in parse(config.__doc__ or "").params}
    inherited = {each.name for base in config.__bases__ if base is not object for each in fields(base)}
    return {
        each.name: (_shown(each), " ".join(meanings[each.name].split()))
        for each in fields(config)
        if each.name not in inherited
    }


def _shown(field: Any) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return (
        {None: "none", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


class Settings(SphinxDirective):
    """``{settings} SharedConfig`` with names or patterns such as ``cem_*``; all names if there are none. The order is the class's."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        patterns = " ".join(self.content).split() or ["*"]
        found = {
            name: texts
            for name, texts in own_settings(CONFIGS[self.arguments[0]]).items()
            if any(fnmatch(name, pattern) for pattern in patterns)
        }
        if unused := [p for p in patterns if not any(fnmatch(name, p) for name in found)]:
            raise self.error(f"no setting of {self.arguments[0]} is called {', '.join(unused)}")
        lines = ["| setting | default | meaning |", "|---|---|---|"]
        for name, (default, meaning) in found.items():
            lines.append(f"| `--{name.replace('_', '-')}` | `{default or chr(8203)}` | {_sentence(meaning)} |")
        return self.parse_text_to_nodes("\n".join(lines))


def _sentence(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if text.endswith(".") else text + "."


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
