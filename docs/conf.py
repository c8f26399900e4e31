"""Settings of the documentation: Sphinx, MyST Markdown and the Furo theme. ``make docs`` builds it without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

import cem_fast  # noqa: E402

project = "cem_fast"
author = "the authors of cem_fast"
copyright = "the authors of cem_fast"  # Sphinx prescribes the name
release = version = cem_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "links",
    "mathml",
    "tables",
]
root_doc = "index"
exclude_patterns = ["_*"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"cem_fast\._support\..*|cem_fast\.mixture\.fitted\..*|cem_fast\..*\.[A-Z]"),
    ("py:class", r"dict\[str"),  # of a field with a default factory, whose signature Sphinx cannot parse
]  # parts that no user calls, type variables

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_ivar = True
napoleon_use_rtype = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # overridden methods are described where they are declared
python_use_unqualified_type_names = True
maximum_signature_line_length = 90

# the inventories are kept here, so that a build needs no network; _inventories/make.py writes them
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "_inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable", "_inventories/torch.inv"),
    "numpy": ("https://numpy.org/doc/stable", "_inventories/numpy.inv"),
}

html_theme = "furo"
html_title = "cem_fast"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b63a5", "color-brand-content": "#0b63a5"},
    "dark_css_variables": {"color-brand-primary": "#6db3ea", "color-brand-content": "#6db3ea"},
}
highlight_language = "text"
pygments_style = "friendly"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
