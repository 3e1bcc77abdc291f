"""Pages: code blocks that the tests can run, options that exist, complete tables, and links to existing files."""

import dataclasses
import io
import re
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from docs_harness import PAGES, ROOT, name_of
from glassgpt.cli.main import COMMANDS, main
from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe_names

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^\n]*)\n(?P<body>.*?)^ *(?P=fence)$", re.M | re.S)
# `sh` and `python` blocks are run. A `{directive}` of MyST is markup, not code.
LANGUAGES = {"sh", "python", "toml", "json", "diff", "text"}
PROGRAMS = "glassgpt torchrun python python3 pip make sbatch srun sphinx-build git uv conda docker curl wget export"
COMMAND = re.compile(rf"^\s*(?:\$ |% |>>> |(?:\S*/)?(?:{'|'.join(PROGRAMS.split())}) )", re.M)

OPTION = r"(?<![\w-])--[a-z][\w.-]*\w"
OTHER_OPTIONS = set(
    "--max-restarts --shutdown-timeout --rdzv-id --rdzv-conf "  # torchrun
    "--batch --signal --always_save_checkpoint --version".split()  # scancel, nanoGPT, glassgpt without a command
)


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


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Return the options of all commands, from their help, and of the benchmarks, from their code."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")]
    for command in [*COMMANDS, "train --resume x"]:
        output = io.StringIO()
        with redirect_stdout(output), pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        texts.append(output.getvalue())
    return {option for text in texts for option in re.findall(OPTION, text)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_in_the_text_exists(page: Path, options: set[str]) -> None:
    """Options in `code` outside of blocks, which nothing runs."""
    spans = re.findall(r"`[^`\n]+`", FENCE.sub("", TEXTS[page]))
    assert {option for span in spans for option in re.findall(OPTION, span)} <= options | OTHER_OPTIONS


def missing(names: set[str], head: str, directive: str) -> set[str]:
    """Return the names that are in no table with this head, unless a page generates the table from the code."""
    if any(f"{{generated}} {directive}\n" in text for text in TEXTS.values()):
        return set()
    tables = [text.partition(head)[2].partition("\n\n")[0] for text in TEXTS.values()]
    return {name for name in names if not any(f"`{name}`" in table for table in tables)}


def test_tables_hold_every_model_setting_and_every_recipe() -> None:
    sizes = {"vocab_size", "vocab_multiple", "context_length", "n_layer", "n_head", "n_embd"}
    settings = {field.name for field in dataclasses.fields(ModelConfig)} - sizes
    assert missing(settings, "| setting | values |", "settings") == set()
    assert missing(set(recipe_names()), "| recipe |", "recipe-table") == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_existing_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target
