"""Docstrings as autodoc reads them, and the comments of attributes, which become their descriptions."""

from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import glassgpt
from glassgpt.cli.options import field_comments
from glassgpt.config.validation import StrictConfig


def process_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Change the lines of a docstring in place: indented text becomes a literal block, comments become attributes."""
    for number in range(len(lines) - 2, 0, -1):
        before, line, after = lines[number - 1 : number + 2]
        if not line and after.startswith(" ") and before and not before.startswith((" ", "- ")):
            lines[number:number] = ["", "::"]
    if isinstance(obj, type) and not issubclass(obj, StrictConfig):
        comments = field_comments(obj)
        for attribute in filter(comments.get, vars(obj).get("__annotations__", {})):
            lines += ["", f".. py:attribute:: {attribute}", "   :no-index:", "", f"   {comments[attribute]}"]


def skip_member(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples, which have comments instead."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, result: str | None
) -> tuple[str, str | None] | None:
    """Leave out the arguments of a config: they are the settings, which have a page of their own."""
    is_config = isinstance(obj, type) and issubclass(obj, StrictConfig)
    return ("(**settings)", result) if is_config else None


def name_origins(app: Sphinx, doctree: nodes.document) -> None:
    """Give names that are documented as `glassgpt.NAME` the address of their module too: pages of code link there."""
    for node in doctree.findall(addnodes.desc_signature):
        if node.get("module") == "glassgpt":
            node["module"] = getattr(glassgpt, node["fullname"].partition(".")[0]).__module__
            node["ids"].append(f"{node['module']}.{node['fullname']}")


def leave_as_code(app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Element) -> Any:
    """Show a name between backticks that is not on a page of its own: an argument, a file, a word of code."""
    return content if node.get("reftype") == "obj" else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the handlers."""
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("doctree-read", name_origins, priority=400)  # before viewcode's
    app.connect("missing-reference", leave_as_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
