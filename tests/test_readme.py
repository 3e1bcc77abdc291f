"""The README's commands and Python code run as written, but with fewer steps and less text."""

import dataclasses
import json
import os
import re
import shlex
import string
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GLASSGPT = [sys.executable, "-m", "glassgpt"]
SHORT = ["--eval-tokens", "3000", "--sample.max-new-tokens", "8"]
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a folder with the texts that the README calls my.txt and other.txt."""
    words = "to be or not that is the question whether tis nobler in the mind suffer slings and arrows".split()
    lines = [" ".join(words[(i * 7 + j) % len(words)] for j in range(9)).capitalize() + "." for i in range(120)]
    (tmp_path / "my.txt").write_text(string.printable + "\n" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "other.txt").write_text("To be or not to be", encoding="utf-8")
    return tmp_path


def run(command: list[str], folder: Path, standard_input: str = "") -> str:
    """Run a command in `folder`; return its standard output, or fail with its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, input=standard_input, capture_output=True, text=True, env=environment, encoding="utf-8"
    )
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def train(folder: Path, out: str) -> None:
    """Train a run of two steps."""
    run(
        [*GLASSGPT, "train", "shakespeare-cpu", "--data", "my.txt", "--out", out, "--steps", "2", *SHORT],
        folder,
    )


def blocks(language: str, heading: str) -> list[str]:
    """Return the code blocks of a language in a section."""
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def commands(heading: str) -> list[list[str]]:
    """Return the `glassgpt` and `torchrun` commands of a section as lists of words; the first word is the program."""
    (block,) = blocks("sh", heading)
    lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
    return [shlex.split(line) for line in lines]


def without_steps(words: list[str]) -> list[str]:
    """Return a command without its `--steps N`."""
    if "--steps" not in words:
        return words
    place = words.index("--steps")
    return words[:place] + words[place + 2 :]


@pytest.mark.slow
def test_train_on_your_own_text(folder: Path) -> None:
    for words in commands("Train on your own text"):
        text = ""
        if "|" in words:
            text, words = words[1], words[words.index("|") + 1 :]
        assert words[0] == "glassgpt"
        if "--resume" in words and "--steps" in words:
            words = [*without_steps(words), "--steps", "6"]
        elif words[1] == "train" and "--resume" not in words:
            words = [*without_steps(words), "--steps", "4", "--eval-every", "2", *SHORT]
        run([*GLASSGPT, *words[1:]], folder, text)
    assert (folder / "runs/mine/checkpoints/000006/model.safetensors").is_file()


@pytest.mark.slow
def test_text_of_any_size(folder: Path) -> None:
    for words in commands("Text of any size"):
        assert words[0] == "glassgpt"
        run([*GLASSGPT, *words[1:], *(["--steps", "2", *SHORT] if words[1] == "train" else [])], folder)
    assert (folder / "figures.json").is_file()


@pytest.mark.slow
def test_models_from_elsewhere(folder: Path) -> None:
    """An exported model of ours replaces the models that would be downloaded."""
    train(folder, "runs/mine")
    run([*GLASSGPT, "export", "runs/mine", "--out", "hf/first"], folder)
    replacements = dict.fromkeys(("gpt2", "path/to/llama", "nanoGPT/out/ckpt.pt"), "hf/first") | {
        "runs/demo": "runs/mine"
    }
    replacements |= {"input.txt": "my.txt", "Hello, I'm a language model,": "the"}
    short = {"train": ["--steps", "2", *SHORT], "generate": ["--max-new-tokens", "8"]}
    for line in commands("Models from elsewhere, and for elsewhere"):
        words = [replacements.get(word, word) for word in line]
        assert words[0] == "glassgpt"
        run([*GLASSGPT, *words[1:], *short.get(words[1], [])], folder)
    assert (folder / "hf/demo/config.json").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_many_processes(folder: Path) -> None:
    """The run starts on two processes, resumes on two with FSDP, then on one."""
    lengths = {"3000": "6", "4000": "8"}
    for line in commands("Many processes"):
        words = [lengths.get(word, word) for word in line]
        if "--resume" not in words:
            words += ["--steps", "4", "--eval-every", "2", *SHORT]
        program = "torch.distributed.run" if words[0] == "torchrun" else "glassgpt"
        run([sys.executable, "-m", program, *words[1:]], folder)
    assert (folder / "runs/two/checkpoints/000008/model.safetensors").is_file()
    assert json.loads((folder / "runs/two/status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_look_inside(folder: Path) -> None:
    """`play` serves the page, and `report` writes its file."""
    for name in ("demo", "mine"):
        train(folder, f"runs/{name}")
    for line in commands("Look inside"):
        words = ["runs/demo@2" if word == "runs/demo@240" else word for word in line]
        if words[:2] != ["glassgpt", "play"]:
            run([*GLASSGPT, *words[1:]], folder)
            continue
        with subprocess.Popen(
            [*GLASSGPT, *words[1:], "--no-browser"], cwd=folder, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            address = next(word for word in server.stdout.readline().split() if word.startswith("http"))
            with urllib.request.urlopen(address.partition("#")[0]) as page:
                assert b"<title>glassgpt</title>" in page.read()
            server.terminate()
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_the_python_code_of_the_playground_docs_runs(folder: Path) -> None:
    document = (ROOT / "docs" / "guides" / "look-inside.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    train(folder, "runs/demo")
    run([sys.executable, "-c", block], folder)


def test_the_python_code_of_the_readme_runs(folder: Path) -> None:
    (block,) = blocks("python", "In Python")
    assert "steps=200" in block
    output = run([sys.executable, "-c", block.replace("steps=200", "steps=2, eval_every=0, eval_tokens=3000")], folder)
    generated = output.partition("done: runs/short\n")[2]  # the loop's output comes after the run's last line
    assert len(generated) == 100  # one character per token, without the prompt
    assert not generated.startswith("The function")
    assert (folder / "runs/short/metrics.jsonl").is_file()


def test_every_model_setting_is_in_the_table() -> None:
    table = README.partition("| setting | values |")[2].partition("\n\n")[0]
    sizes = {"vocab_size", "vocab_multiple", "context_length", "n_layer", "n_head", "n_embd"}
    names = {field.name for field in dataclasses.fields(ModelConfig)} - sizes
    assert {name for name in names if f"`{name}`" not in table} == set()


def test_every_recipe_is_in_the_table() -> None:
    table = README.partition("| recipe |")[2].partition("\n\n")[0]
    assert {name for name in recipe_names() if f"`{name}`" not in table} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_to_existing_files(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), target
