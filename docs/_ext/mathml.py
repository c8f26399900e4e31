"""Formulas as MathML, which browsers show by themselves: pages need neither a script nor a network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx


def _markup(self: Any, node: nodes.Element, *, block: bool) -> None:
    self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer under the name ``mathml``."""
    app.add_html_math_renderer(
        "mathml",
        (lambda self, node: _markup(self, node, block=False), None),
        (lambda self, node: _markup(self, node, block=True), None),
    )
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
