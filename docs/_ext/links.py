"""References that Sphinx does not resolve by itself.

An object is documented under its public path, ``cem_fast.CEMLoss``. A docstring may also name it by the module that defines it,
``cem_fast.loss.CEMLoss``, or by its bare name. A Markdown file outside of the documentation is linked as a file, not as a page.
Links of an included file are relative to that file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

LINK = re.compile(r"(?<!!)(\[[^\[\]]*\]\()([^)#:\s]+)\)")
# files of the project that are shown as pages
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}


def shortened(path: str) -> Iterator[str]:
    """A dotted path without some modules between its first and its last part, the longest first."""
    parts = path.split(".")
    for gone in range(1, len(parts) - 1):
        for start in range(1, len(parts) - gone):
            yield ".".join(parts[:start] + parts[start + gone :])


def _resolve(app: Sphinx, env: Any, node: nodes.Element, child: nodes.Node) -> nodes.Element | None:
    target, objects = node.get("reftarget", ""), env.get_domain("py").objects
    if node.get("refdomain") != "py":
        return None
    if "." in target:
        found = [name for name in shortened(target) if name in objects]
    else:  # an annotation that Sphinx could not evaluate: a class by its bare name
        found = [name for name, entry in objects.items() if name.endswith("." + target) and not entry.aliased]
        found = found if len(found) == 1 else []
    if not found:
        return None
    entry = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, child, found[0])


def relinked(text: str, written: Path, shown: Path, top: Path) -> str:
    """Markdown with links that are right where it is shown: to pages of the documentation, or to files outside of it.

    Args:
        text: Markdown with links relative to ``written``.
        written: folder of the file that holds the text.
        shown: folder of the page that shows it.
        top: folder of the documentation.
    """

    def replaced(match: re.Match[str]) -> str:
        target = (written / match[2]).resolve()
        if not target.exists():
            return match[0]
        page = top / PAGES.get(target.name, "") if target.parent == top.parent else target
        is_page = page.suffix == ".md" and page.is_relative_to(top)
        path = os.path.relpath(page if is_page else target, shown)
        return f"{match[1]}{path if is_page else 'path:' + path})"

    return LINK.sub(replaced, text)


def _relink_page(app: Sphinx, docname: str, source: list[str]) -> None:
    folder = Path(app.env.doc2path(docname)).parent
    source[0] = relinked(source[0], folder, folder, Path(app.srcdir))


def _relink_included(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    top = Path(app.srcdir)
    content[0] = relinked(content[0], (top / path).parent, Path(app.env.doc2path(docname)).parent, top)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the resolvers to the build."""
    app.connect("missing-reference", _resolve)
    app.connect("source-read", _relink_page)
    app.connect("include-read", _relink_included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
