"""The documentation site. Build it with `make docs`; it opens from disk and loads nothing from another host."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "glassgpt"
author = "The glassgpt developers"
copyright = author
release = version = importlib.metadata.version("glassgpt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docstrings",
    "generated",
    "lessons",
    "mathml",
]
exclude_patterns = ["_*"]
# Documented elsewhere: a link to another project would need a file from its site at build time.
nitpick_ignore_regex = [("py:class", r"(torch|numpy|pathlib|collections\.abc)\..+"), ("py:class", "BlockMask")]
smartquotes = False  # they make one dash of two, also in the names of options

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath", "html_image"]
myst_heading_anchors = 3  # `#a-heading`, as GitHub makes them

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
default_role = "py:obj"  # of docstrings: a name between backticks is a link if it has a page, otherwise code
python_maximum_signature_line_length = 140
add_module_names = False

html_theme = "furo"
html_title = "glassgpt"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_search_summary = False  # it would fetch pages, which browsers refuse for files
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0072b2",
        "color-brand-content": "#0065a0",
        "color-api-name": "#0065a0",
        "color-api-pre-name": "#0065a0",
    },
    "dark_css_variables": {
        "color-brand-primary": "#56b4e9",
        "color-brand-content": "#6cbdeb",
        "color-api-name": "#6cbdeb",
        "color-api-pre-name": "#6cbdeb",
    },
}
copybutton_exclude = ".linenos, .gp, .go, .c1"  # prompts, output and comments of commands
