"""Every `sh` and `python` block of the README and the documentation runs, or names the machine that it needs.

The blocks of a page run in its order, in a folder of its own that holds what pages take for granted: `my.txt` and other
texts, the runs `demo` and `mine`, and models from elsewhere. A real shell runs an `sh` block with shortened commands
(short_command.py); Python blocks run as written, in one namespace. A block that needs more than this is skipped by a
comment before it: `<!-- skip: next "needs 8 GPUs" -->`.
"""

import itertools
import json
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import safetensors.torch
import torch

import glassgpt as g
from docs_harness import PAGES, Skipped, commands_of, name_of, parse, skipped_blocks
from glassgpt.cli.main import COMMANDS
from glassgpt.cli.train import Resume
from glassgpt.config.model import ModelConfig
from glassgpt.interop.hf_models import export_hf
from glassgpt.tokenizers.builtin import BytesTokenizer, gpt2_tokenizer
from glassgpt.utils.errors import UserError

SHORT_COMMAND = Path(__file__).with_name("short_command.py")
WITH_BLOCKS = [page for page in PAGES if re.search(r"^ *```(sh|python)$", page.read_text(encoding="utf-8"), re.M)]
SKIPPED = [skipped for page in WITH_BLOCKS for skipped in skipped_blocks(page)]
LLAMA: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tied_head": False,
}
SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def write_texts(folder: Path) -> None:
    """Write my.txt, which has every printable character, and the other texts."""
    words = "to be or not that is the question whether tis nobler in the mind suffer slings and arrows".split()
    lines = [" ".join(words[(i * 7 + j) % len(words)] for j in range(9)).capitalize() + "." for i in range(120)]
    text = string.printable + "\n" + "\n".join(lines)
    (folder / "books").mkdir()
    for name in ("my.txt", "input.txt", "books/one.txt", "books/two.txt"):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "other.txt").write_text("To be or not to be", encoding="utf-8")


def write_models(folder: Path) -> None:
    """Write GPT-2's place in the hub's cache, a Llama, and a checkpoint of nanoGPT, all small and untrained."""
    commit = "0" * 40
    cached = folder / "home" / "hub" / "models--gpt2"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    gpt2 = ModelConfig(vocab_size=50257, context_length=1024, **SMALL)
    export_hf(g.GPT.create(gpt2, 0), gpt2_tokenizer(), cached / "snapshots" / commit)
    llama = ModelConfig(vocab_size=257, context_length=64, **SMALL, **LLAMA)
    export_hf(g.GPT.create(llama, 0), BytesTokenizer(), folder / "path" / "to" / "llama")
    tensors = safetensors.torch.load_file(cached / "snapshots" / commit / "model.safetensors")
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # nanoGPT stores the transpose
    tensors = {name: tensor.T.contiguous() if name.endswith(linear) else tensor for name, tensor in tensors.items()}
    arguments = {**SMALL, "block_size": 1024, "vocab_size": 50257, "bias": True, "dropout": 0.0}
    (folder / "nanoGPT" / "out").mkdir(parents=True)
    torch.save({"model": tensors, "model_args": arguments, "iter_num": 2000}, folder / "nanoGPT" / "out" / "ckpt.pt")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all that the pages take for granted, and `glassgpt` and `torchrun` in .venv/bin."""
    folder = tmp_path_factory.mktemp("inputs")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("glassgpt", "torchrun"):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SHORT_COMMAND}" {name} "$@"\n')
        (programs / name).chmod(0o755)
    for name in ("python", "python3"):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (programs / name).chmod(0o755)
    write_texts(folder)
    write_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GLASSGPT_CACHE", str(folder / "cache"))
        config = g.recipe("demo", data={"source": "my.txt"}, steps=4, eval_every=2, checkpoint_every=2)
        for name in ("demo", "mine"):
            g.train(config, out=f"runs/{name}")
            (folder / "runs" / name / "prepared").touch()
    return folder


def run_shell(block: str) -> None:
    """Run a block in a shell that ends at the first command that fails; check that the files of its options exist."""
    command = ["bash", "-e", "-o", "pipefail", "-x", "-c", block]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900, stdin=subprocess.DEVNULL)
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}", pytrace=False)
    for words in commands_of(block):
        for option, value in itertools.pairwise(words):
            assert option not in ("--out", "--json") or Path(value).exists(), f"{value} was not written"


@pytest.mark.parametrize("block", ["false\ntrue", "false | true", "echo glassgpt export --out missing"])
def test_a_block_fails_with_any_of_its_commands_and_without_its_files(block: str) -> None:
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        run_shell(block)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_the_blocks_of_a_page_run(
    page: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    folder = tmp_path / "page"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder}/.venv/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for example in parse(page, run_shell):
        with subtests.test(f"line {example.line}"):
            try:
                example.evaluate()
            except SkipTest as reason:
                pytest.skip(f"{name_of(page)}:{example.line} {reason}")
    for status in folder.glob("runs/*/status.json"):
        assert json.loads(status.read_text())["state"] == "finished", status.parent.name


@pytest.mark.parametrize("skipped", SKIPPED, ids=lambda skipped: f"{name_of(skipped.page)}:{skipped.example.line}")
def test_a_skipped_block_says_what_it_needs_and_has_valid_options(skipped: Skipped) -> None:
    assert re.fullmatch(r'"needs [^"]+"', skipped.reason), f'{skipped.reason}: write it as "needs ..."'
    for words in commands_of(skipped.example.parsed):
        if words[0] == "--version":
            continue
        length = 2 if " ".join(words[:2]) in COMMANDS else 1
        command = Resume if "--resume" in words else COMMANDS[" ".join(words[:length])]
        try:
            command.parse(words[0], words[length:])
        except UserError as error:
            pytest.fail(f"glassgpt {' '.join(words)}: {error}", pytrace=False)
