"""The README's commands and its Python run as they are written, with fewer steps, and evaluated on less."""

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

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with the text that the README calls my.txt."""
    words = "to be or not that is the question whether tis nobler in the mind suffer slings and arrows".split()
    lines = [" ".join(words[(i * 7 + j) % len(words)] for j in range(9)).capitalize() + "." for i in range(120)]
    (tmp_path / "my.txt").write_text(string.printable + "\n" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "other.txt").write_text("To be or not to be", encoding="utf-8")
    return tmp_path


def run(code: list[str], folder: Path, standard_input: str = "") -> str:
    """Standard output of a command in `folder`; fails with its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        code, cwd=folder, input=standard_input, capture_output=True, text=True, env=environment, encoding="utf-8"
    )
    assert result.returncode == 0, f"{shlex.join(code)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def blocks(language: str, heading: str) -> list[str]:
    """The code blocks of a language in a section."""
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_commands_run_as_written(folder: Path) -> None:
    (block,) = blocks("sh", "Train on your own text")
    for line in block.splitlines():
        command = line.partition("#")[0].strip()
        before, _, after = command.rpartition("|")
        words = shlex.split(after)
        assert words[0] == "glassgpt", line
        if words[:2] == ["glassgpt", "train"] and "--resume" not in words:
            steps = words.index("--steps") if "--steps" in words else None
            words = [
                *words[:steps],
                *(words[steps + 2 :] if steps is not None else []),
                "--steps",
                "4",
                "--eval-every",
                "2",
            ]
            words += ["--eval-tokens", "3000"]
            words += ["--sample.max-new-tokens", "8"]
        elif "--steps" in words:
            words[words.index("--steps") + 1] = "6"
        if "--out" in words and "--data" not in words:
            words += ["--data", "my.txt"]  # `shakespeare` would be downloaded
        text = shlex.split(before)[1] if before else ""
        run([sys.executable, "-m", *words], folder, text)
    assert (folder / "runs/mine/checkpoints/000006/model.safetensors").is_file()


def test_the_commands_for_text_of_any_size_run(folder: Path) -> None:
    (block,) = blocks("sh", "Text of any size")
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "glassgpt", line
        short = ["--steps", "2", "--eval-tokens", "3000", "--sample.max-new-tokens", "8"] if words[1] == "train" else []
        run([sys.executable, "-m", *words, *short], folder)
    assert (folder / "figures.json").is_file()


def test_the_commands_for_models_from_elsewhere_run(folder: Path) -> None:
    """With a model of ours, exported, in the place of those that would be downloaded."""
    run(
        [
            sys.executable,
            "-m",
            "glassgpt",
            "train",
            "shakespeare-cpu",
            "--data",
            "my.txt",
            "--steps",
            "2",
            "--out",
            "runs/mine",
        ],
        folder,
    )
    run([sys.executable, "-m", "glassgpt", "export", "runs/mine", "--out", "hf/first"], folder)
    stand_ins = dict.fromkeys(("gpt2", "path/to/llama", "nanoGPT/out/ckpt.pt"), "hf/first") | {"runs/demo": "runs/mine"}
    stand_ins |= {"input.txt": "my.txt", "Hello, I'm a language model,": "the"}
    (block,) = blocks("sh", "Models from elsewhere, and for elsewhere")
    for line in block.splitlines():
        words = [stand_ins.get(word, word) for word in shlex.split(line, comments=True)]
        assert words[0] == "glassgpt", line
        short = {
            "train": ["--steps", "2", "--eval-tokens", "3000", "--sample.max-new-tokens", "8"],
            "generate": ["--max-new-tokens", "8"],
        }
        run([sys.executable, "-m", *words, *short.get(words[1], [])], folder)
    assert (folder / "hf/demo/config.json").is_file()


@pytest.mark.distributed
def test_the_commands_for_many_processes_run(folder: Path) -> None:
    """Begun on two processes, gone on with on two in parts, then on one."""
    (block,) = blocks("sh", "Many processes")
    lengths = {"3000": "6", "4000": "8"}
    for line in block.splitlines():
        words = [lengths.get(word, word) for word in shlex.split(line, comments=True)]
        if "--resume" not in words:
            words += ["--steps", "4", "--eval-every", "2", "--eval-tokens", "3000", "--sample.max-new-tokens", "8"]
        if words[0] == "torchrun":
            words[0] = "torch.distributed.run"
        assert words[0] in ("torch.distributed.run", "glassgpt"), line
        run([sys.executable, "-m", *words], folder)
    assert (folder / "runs/two/checkpoints/000008/model.safetensors").is_file()
    assert json.loads((folder / "runs/two/status.json").read_text())["state"] == "finished"


def test_the_commands_that_look_inside_run(folder: Path) -> None:
    """With a short run in the place of both; `play` is asked for its page, then ended."""
    for name in ("demo", "mine"):
        steps = ["--steps", "2", "--eval-tokens", "3000", "--sample.max-new-tokens", "8"]
        run(
            [
                sys.executable,
                "-m",
                "glassgpt",
                "train",
                "shakespeare-cpu",
                "--data",
                "my.txt",
                "--out",
                f"runs/{name}",
                *steps,
            ],
            folder,
        )
    (block,) = blocks("sh", "Look inside")
    for line in block.splitlines():
        words = ["runs/demo@2" if word == "runs/demo@240" else word for word in shlex.split(line, comments=True)]
        if words[:2] != ["glassgpt", "play"]:
            run([sys.executable, "-m", *words], folder)
            continue
        command = [sys.executable, "-m", *words, "--no-browser"]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[1]
            with urllib.request.urlopen(address) as page:
                assert b"<title>glassgpt</title>" in page.read()
            server.terminate()
    assert (folder / "report.html").is_file()


def test_the_python_of_the_glass_runs(folder: Path) -> None:
    document = (ROOT / "docs" / "glass.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    steps = ["--steps", "2", "--eval-tokens", "3000", "--sample.max-new-tokens", "8"]
    run(
        [
            sys.executable,
            "-m",
            "glassgpt",
            "train",
            "shakespeare-cpu",
            "--data",
            "my.txt",
            "--out",
            "runs/demo",
            *steps,
        ],
        folder,
    )
    run([sys.executable, "-c", block], folder)


def test_every_slot_is_in_the_table() -> None:
    table = README.partition("| slot | values |")[2].partition("\n\n")[0]
    sizes = {"vocab_size", "vocab_multiple", "context_length", "n_layer", "n_head", "n_embd"}
    missing = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in sizes and f"`{field.name}`" not in table
    ]
    assert missing == []


def test_the_python_runs_as_written(folder: Path) -> None:
    (block,) = blocks("python", "In Python")
    assert "steps=200" in block
    assert block.rstrip().endswith('print(piece, end="")')
    output = run([sys.executable, "-c", block.replace("steps=200", "steps=2, eval_every=0, eval_tokens=3000")], folder)
    # Behind the run's last line stands what the loop has printed: 100 characters, without the prompt.
    written = output.partition("done: runs/short\n")[2]
    assert len(written) == 100
    assert not written.startswith("The function")
    assert (folder / "runs/short/metrics.jsonl").is_file()


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/results.md",
        "docs/data.md",
        "docs/evaluation.md",
        "docs/distributed.md",
        "docs/glass.md",
        "docs/scale.md",
    ],
)
def test_links_lead_to_files(document: str) -> None:
    path = ROOT / document
    targets = [
        target for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")) if "://" not in target
    ]
    assert targets or document != "README.md"
    for target in targets:
        assert (path.parent / target.partition("#")[0]).exists(), target


def test_every_recipe_is_in_the_table() -> None:
    from glassgpt.config.recipes import recipe_names

    table = README.partition("| recipe |")[2].partition("\n\n")[0]
    for name in recipe_names():
        assert f"`{name}`" in table, f"the recipe {name} is not in the README"
