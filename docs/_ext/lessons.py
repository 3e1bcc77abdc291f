"""Write each lesson as a page without a server: the notebook runs once per value of each control.

Text becomes MyST, so that it can be searched; other results are HTML. A result that depends on a control is kept for
each of its values, and `_static/lessons.js` shows the one that the reader chooses. A control with other than a few
values is refused, and so is a result that depends on two controls: their pages would grow with the product.
"""

import ast
import hashlib
import html
import json
import re
import runpy
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import marimo
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.parallel import ParallelTasks

import glassgpt
from glassgpt.learn.catalog import Lesson, lessons
from glassgpt.utils.files import write_atomic

logger = logging.getLogger(__name__)
MOST_VALUES = 12
CONTROLS = (marimo.ui.slider, marimo.ui.dropdown)


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook: its source, whether the page shows it, and the names that it defines."""

    source: str
    is_shown: bool
    names: frozenset[str]


@dataclass(frozen=True)
class Control:
    """A slider or a menu: its values, as the reader sees them and as the notebook gets them."""

    label: str
    values: Mapping[str, Any]
    start: int
    is_menu: bool


def cells_of(source: str) -> Iterator[Cell]:
    """The cells that have a result (which may be None), in order: all but the setup."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not node.decorator_list:
            continue
        decorator = ast.unparse(node.decorator_list[0])
        is_cell = decorator.startswith("app.cell")  # otherwise a function or class, which readers can import
        body = [part for part in node.body if not isinstance(part, ast.Return)] if is_cell else [node]
        first = body[0].lineno
        text = textwrap.dedent("\n".join(source.splitlines()[first - 1 : body[-1].end_lineno]))
        nodes = (each for part in body for each in ast.walk(part)) if is_cell else ()
        names = {each.id for each in nodes if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
        yield Cell(text, "hide_code=True" not in decorator, frozenset(names))


def load_app(path: Path) -> marimo.App:
    """The notebook's app."""
    app: marimo.App = runpy.run_path(str(path))["app"]
    return app


def controls_of(definitions: Mapping[str, Any]) -> dict[str, Control]:
    """The notebook's sliders and menus by name."""
    found = {}
    for name, value in definitions.items():
        if isinstance(value, marimo.ui.slider):
            assert value.steps, f"slider {name} needs `steps`"
            values = {f"{step:g}": step for step in value.steps}
        elif isinstance(value, marimo.ui.dropdown):
            values = dict(value.options)
        else:
            continue
        assert 1 < len(values) <= MOST_VALUES, f"control {name} has {len(values)} values"
        label = re.sub("<[^>]+>", "", marimo.md(value._args.label).text).strip()
        start = list(values.values()).index(value.value)
        found[name] = Control(label, values, start, isinstance(value, marimo.ui.dropdown))
    return found


def run(app: marimo.App, cells: list[Cell], overrides: Mapping[str, Any]) -> list[Any]:
    """The result of each cell; None for the cells of overridden controls, which do not run."""
    results = iter(app.run(defs={name: SimpleNamespace(value=value) for name, value in overrides.items()})[0])
    return [None if cell.names & overrides.keys() else next(results) for cell in cells]


def as_html(result: Any) -> str:
    """A result as HTML. Formulas become MathML."""
    text = result.text if hasattr(result, "text") else result._repr_html_()
    text = text.replace('dark:prose-invert contents"', '"')  # furo shows an error for a class `contents`
    formula = re.compile(r'<marimo-tex class="arithmatex">\|\|([(\[])(.*?)\|\|[)\]]</marimo-tex>', re.DOTALL)
    return formula.sub(lambda m: convert(html.unescape(m[2]), "block" if m[1] == "[" else "inline"), text)


def as_myst(markdown: str) -> str:
    """Markdown as marimo reads it, as MyST reads it: folded blocks are written as HTML."""
    folded = re.compile(r"^/// details \| (.+?)$\n(.*?)^///$", re.MULTILINE | re.DOTALL)
    head, tail = '<details class="answer"><summary>{}</summary>', _raw("</details>")
    return folded.sub(lambda m: f"{_raw(head.format(html.escape(m[1])))}\n\n{m[2]}\n\n{tail}\n", markdown)


def page_of(lesson: Lesson) -> str:
    """A lesson as a MyST document."""
    source = lesson.path.read_text(encoding="utf-8")
    cells, app = list(cells_of(source)), load_app(lesson.path)
    results, definitions = app.run()
    controls = controls_of(definitions)
    shown = [None if result is None or isinstance(result, CONTROLS) else as_html(result) for result in results]
    variants: dict[int, tuple[str, list[str]]] = {}
    for name, control in controls.items():
        columns = [run(app, cells, {name: value}) for value in control.values.values()]
        for place, result in enumerate(shown):
            texts = [as_html(column[place]) for column in columns] if result is not None else []
            if len(set(texts)) > 1:
                assert place not in variants, f"{lesson.path.name}: a result depends on {variants[place][0]} and {name}"
                variants[place] = name, texts
    parts = []
    for place, cell in enumerate(cells):
        if cell.is_shown:
            parts.append(f"```python\n{cell.source}\n```")
        for name in cell.names & controls.keys():
            parts.append(_raw(_control(name, controls[name])))
        if place in variants:
            name, texts = variants[place]
            parts.append(_raw(_variants(name, texts, controls[name].start)))
        elif shown[place] is not None:
            markdown = getattr(results[place], "_markdown_text", None)
            parts.append(_raw(f'<div class="result">{shown[place]}</div>') if markdown is None else as_myst(markdown))
    return "\n\n".join(parts) + "\n"


def _raw(markup: str) -> str:
    return f"````{{raw}} html\n{re.sub(chr(10) + '+', chr(10), markup)}\n````"


def _control(name: str, control: Control) -> str:
    """The control as HTML; its value is the number of a value."""
    label = f'<label for="control-{name}">{html.escape(control.label)}</label>'
    if control.is_menu:
        options = (
            f'<option value="{number}"{" selected" if number == control.start else ""}>{html.escape(text)}</option>'
            for number, text in enumerate(control.values)
        )
        return f'<p class="control">{label} <select id="control-{name}" disabled>{"".join(options)}</select></p>'
    values, start = html.escape(json.dumps(list(control.values))), list(control.values)[control.start]
    return (
        f'<p class="control">{label} <input type="range" id="control-{name}" min="0" max="{len(control.values) - 1}" '
        f'disabled value="{control.start}" data-values="{values}" aria-valuetext="{start}"> '
        f'<output for="control-{name}">{start}</output></p>'
    )


def _variants(name: str, texts: list[str], start: int) -> str:
    divisions = (
        f'<div data-value="{number}"{"" if number == start else " hidden"}>{text}</div>'
        for number, text in enumerate(texts)
    )
    return f'<div class="result" data-control="control-{name}" aria-live="polite">{"".join(divisions)}</div>'


def write_page(target: Path, lesson: Lesson) -> None:
    """Write a lesson's page, unless it was made from the same lesson, exporter and package."""
    used = [Path(__file__), lesson.path, lesson.path.parent / "exercises" / lesson.path.name]
    used += sorted(Path(glassgpt.__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in used)).hexdigest()
    if not target.exists() or not target.read_text(encoding="utf-8").startswith(f"% {digest}\n"):
        logger.info("running lesson %d, %s", lesson.number, lesson.title)
        write_atomic(target, f"% {digest}\n{page_of(lesson)}")  # another build may write it, too


def write_pages(app: Sphinx) -> None:
    """Write the pages of all lessons, on as many processes as Sphinx uses."""
    folder = Path(app.srcdir, "learn", "lessons")
    folder.mkdir(exist_ok=True)
    found = lessons()
    for old in set(folder.glob("*.md")) - {folder / f"{lesson.path.stem}.md" for lesson in found}:
        old.unlink()
    tasks = ParallelTasks(app.parallel)
    for lesson in found:
        tasks.add_task(lambda each: write_page(folder / f"{each.path.stem}.md", each), lesson)
    tasks.join()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write_pages)
    app.add_js_file("lessons.js")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
