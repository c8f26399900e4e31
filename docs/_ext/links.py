"""References that Sphinx does not resolve by itself.

An object is documented under its public path, ``cem_fast.CEMLoss``. A docstring may also name it by the module that defines it,
``cem_fast.loss.CEMLoss``. A Markdown file outside of the documentation is linked as a file, not as a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

MARKDOWN_LINK = re.compile(r"\]\((\.\./[^)#\s]+\.md)\)")


def shortened(path: str) -> Iterator[str]:
    """A dotted path without some modules between its first and its last part, the longest first."""
    parts = path.split(".")
    for gone in range(1, len(parts) - 1):
        for start in range(1, len(parts) - gone):
            yield ".".join(parts[:start] + parts[start + gone :])


def _resolve(app: Sphinx, env: Any, node: nodes.Element, child: nodes.Node) -> nodes.Element | None:
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("cem_fast."):
        return None
    objects = env.get_domain("py").objects
    for name in shortened(target):
        if name in objects:
            entry = objects[name]
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, child, name)
    return None


def _mark_files(app: Sphinx, docname: str, source: list[str]) -> None:
    folder = Path(app.env.doc2path(docname)).parent

    def marked(match: re.Match[str]) -> str:
        inside = (folder / match[1]).resolve().is_relative_to(app.srcdir)
        return match[0] if inside else f"](path:{match[1]})"

    source[0] = MARKDOWN_LINK.sub(marked, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects both to the build."""
    app.connect("missing-reference", _resolve)
    app.connect("source-read", _mark_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
