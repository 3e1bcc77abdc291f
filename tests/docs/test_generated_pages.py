"""The generated parts of the site: every command, option, setting, recipe and public name is on one of its pages."""

import dataclasses
import importlib
import io
import re
import runpy
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
from docutils import nodes
from docutils.core import publish_doctree
from generated_commands import PAGES, commands
from generated_names import names
from generated_recipes import recipe_table, recipes
from generated_settings import settings, slots
from markup import escaped
from myst_parser.parsers.docutils_ import Parser

import glassgpt
from glassgpt.cli.main import COMMANDS, main
from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe_names, recipe_text
from glassgpt.config.schema import TrainConfig
from glassgpt.config.validation import flatten

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_configuration_names_extensions_that_exist() -> None:
    for name in runpy.run_path(str(DOCS / "conf.py"))["extensions"]:
        assert callable(importlib.import_module(name).setup)


def test_every_option_of_a_command_is_on_its_page_or_on_that_of_the_settings() -> None:
    sections = dict(re.findall(r"^## glassgpt (.*)\n((?:(?!## ).*\n)*)", commands(), re.MULTILINE))
    assert sections.keys() == {*COMMANDS, "train --resume"}
    of_settings = {f"--{name.replace('_', '-')}" for name in re.findall(r"\{confval\} (\S+)", settings())}
    for name, section in sections.items():
        output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with redirect_stdout(output), suppress(SystemExit):
            main([*PAGES[name], "--help"])
        output.seek(0)
        options = set(re.findall(r"^│ (--[a-z][\w.-]*)", output.read(), re.MULTILINE))
        shown = set(re.findall(r"^```\{option\} (--[a-z][\w.-]*)", section, re.MULTILINE))
        assert options - shown <= (of_settings if name in ("train", "plan", "train --resume") else set()), name
        assert shown <= options, name


def test_every_setting_has_its_default() -> None:
    entries = dict(re.findall(r"```\{confval\} (\S+)\n(.*?)```\n", settings(), re.DOTALL))
    defaults = dict(flatten(dataclasses.asdict(TrainConfig(steps=1)), keep=("mixture",)))
    assert entries.keys() == defaults.keys()
    for name in defaults.keys() - {"steps"}:
        value = "empty" if defaults[name] in ([], {}) else defaults[name]
        value = str(value).lower() if value is None or isinstance(value, bool) else value
        assert re.search(rf"Default: `?{re.escape(str(value))}`?\.\n", entries[name]), (name, value)


def test_every_value_of_a_slot_is_in_the_table() -> None:
    """A model can be built with each value that the table lists, and no value is missing."""
    rows = re.findall(r"^\| \{confval\}`model\.(\w+)` \| (.*) \|$", slots(), re.MULTILINE)
    assert {"position", "norm", "activation", "attention"} <= {name for name, _ in rows}
    for name, cell in rows:
        values = re.findall(r"`(\w+)`", cell)
        assert values[0] == getattr(ModelConfig(), name)
        for value in values:
            assert getattr(ModelConfig.from_dict({name: value}), name) == value
        with pytest.raises(glassgpt.UserError) as error:
            ModelConfig.from_dict({name: "unknown"})
        assert re.findall(r"'(\w+)'", str(error.value))[:-1] == sorted(values, key=str(error.value).index)


def test_every_recipe_is_shown_with_its_values_and_comments() -> None:
    for name in recipe_names():
        assert f"[`{name}`](#{name})" in recipe_table()
        section = recipes().partition(f"## {name}\n")[2].partition("\n## ")[0]
        (block,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
        assert tomllib.loads(block) == tomllib.loads(recipe_text(name))
        for comment in re.findall(r"^.+# (.*)$", recipe_text(name), re.MULTILINE):
            assert comment in block
        for comment in re.findall(r"^# (.*)$", recipe_text(name), re.MULTILINE):
            assert escaped(comment) in section


def test_every_public_name_is_in_the_table_and_on_one_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference" / "python").glob("*.md"))
    documented = re.findall(r"^\.\. auto(?:function|class):: glassgpt\.(\w+)$", pages, re.MULTILINE)
    assert sorted(documented) == sorted(glassgpt.__all__)
    assert re.findall(r"`~glassgpt\.(\w+)`", names()) == glassgpt.__all__


@pytest.mark.parametrize(
    "text", ["a_b_c *x* [y](z) <|end|> $1 and $2 # | ~~no~~ {role}`", "plain", "\\n and 2 * 3 * 4"]
)
def test_escaped_text_reads_as_the_text(text: str) -> None:
    assert document(escaped(text)).astext() == text


def test_options_and_code_become_code() -> None:
    code = [node.astext() for node in document(escaped("use `a_b` or --top-k, not --")).findall(nodes.literal)]
    assert code == ["a_b", "--top-k"]


def document(markdown: str) -> nodes.document:
    """Parse Markdown as the site does."""
    return publish_doctree(markdown, parser=Parser())


def test_formulas_become_mathml(tmp_path: Path) -> None:
    config = f"""import sys
sys.path.insert(0, {str(DOCS / "_ext")!r})
extensions = ["myst_parser", "mathml"]
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
"""
    (tmp_path / "conf.py").write_text(config, encoding="utf-8")
    (tmp_path / "index.md").write_text("# T\n\nInline $a_1$.\n\n$$\\frac{q k^T}{\\sqrt{D}}$$\n", encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(tmp_path), str(tmp_path / "out")]
    subprocess.run(command, check=True)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'<math [^>]*display="inline".*<msub><mi>a</mi><mn>1</mn></msub>', page)
    assert re.search(r'<math [^>]*display="block".*<mfrac>.*<msqrt>', page)
    assert "mathjax.js" not in page.lower()
