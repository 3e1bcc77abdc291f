"""Pages: code blocks that the tests can run, complete tables, and links to existing files."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from docs_harness import PAGES, name_of
from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe_names

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^\n]*)\n(?P<body>.*?)^ *(?P=fence)$", re.M | re.S)
# `sh` and `python` blocks are run. A `{directive}` of MyST is markup, not code.
LANGUAGES = {"sh", "python", "toml", "json", "diff", "text"}
PROGRAMS = "glassgpt torchrun python python3 pip make sbatch srun sphinx-build git uv conda docker curl wget export"
COMMAND = re.compile(rf"^\s*(?:\$ |% |>>> |(?:\S*/)?(?:{'|'.join(PROGRAMS.split())}) )", re.M)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language_and_only_sh_and_python_blocks_hold_commands(page: Path) -> None:
    assert not re.search(r"~~~|\{code[\w-]*\}", TEXTS[page]), "write ```sh or ```python, which the tests run"
    assert TEXTS[page].count("```") == sum(2 for _ in FENCE.finditer(TEXTS[page]))
    for block in FENCE.finditer(TEXTS[page]):
        language = block["language"].strip()
        where = f"{name_of(page)}:{TEXTS[page].count(chr(10), 0, block.start()) + 1}"
        if re.fullmatch(r"\{[\w-]+\}.*", language):
            continue
        assert language in LANGUAGES, f"{where}: the language {language!r} is none of {sorted(LANGUAGES)}"
        if language == "text":
            assert not COMMAND.search(block["body"]), f"{where}: commands belong in an sh block, which the tests run"
        if language == "toml":
            tomllib.loads(block["body"])


def test_every_model_setting_is_in_a_table() -> None:
    tables = [text.partition("| setting | values |")[2].partition("\n\n")[0] for text in TEXTS.values()]
    sizes = {"vocab_size", "vocab_multiple", "context_length", "n_layer", "n_head", "n_embd"}
    names = {field.name for field in dataclasses.fields(ModelConfig)} - sizes
    assert {name for name in names if not any(f"`{name}`" in table for table in tables)} == set()


def test_every_recipe_is_in_a_table() -> None:
    tables = [text.partition("| recipe |")[2].partition("\n\n")[0] for text in TEXTS.values()]
    assert {name for name in recipe_names() if not any(f"`{name}`" in table for table in tables)} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_existing_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target
