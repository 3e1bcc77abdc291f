"""The directive `generated`: a part of a page that is written from the package itself when the site is built."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from docutils import nodes
from generated_commands import commands
from generated_lessons import lesson_list
from generated_names import names
from generated_recipes import recipe_table, recipes
from generated_settings import settings, slots
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PARTS: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "lessons": lesson_list,
    "names": names,
    "recipes": recipes,
    "recipe-table": recipe_table,
    "settings": settings,
    "slots": slots,
}


class Generated(SphinxDirective):
    """Insert the Markdown of one of the `PARTS`, such as "```{generated} recipes"."""

    required_arguments = 1
    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Return the nodes of the part, with its sections."""
        self.env.note_reread()  # the part may have changed although the page did not
        return self.parse_text_to_nodes(PARTS[self.arguments[0]](), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
