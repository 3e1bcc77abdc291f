"""The house: imports run downwards only, and third-party libraries stay in the rooms they were given."""

import ast
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest

from glassgpt.errors import UserError
from glassgpt.pickles import read_plain_pickle

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "glassgpt"

# A file may import what stands below it. A new file gets its place here.
FLOORS = """
cli commands.evaluation commands.machine commands.models commands.text commands.training commands.play commands.shared console parsing
play.server play.app play.assets play.answers play.follow play.workshop play.offers play.questions play.packing play.guard report.page
report.tables report.charts report.runs report.series report plan bench training recorder log_targets trainer room pace probe
probe.snapshot probe.kinds probe.intervention probe.lens probe.weights probe.seeing probe.bounds dataset_view tokenizer_view
tokenizer_training progress evaluate reference run_directory foreign hf hf_families checkpoint generation writing scale optim recompute
distributed.strategies distributed.ranks distributed.watch part_norms parts model attention norm loss summary hardware
data.training_data data.prepare data.facts data.making data.workers data.groups data.duplicates data.plan data.sources data.batches
data.tokens data.foreign_datasets data.shards data.python_docs data.readers data.parquet data.rows data.parts data.compression
tokenizers hf_tokenizer vocabulary visible data.hub_datasets data.hub_layout data.source_files data.meters data.download hub pickles
config checked seeding published json_text files errors
""".split()

# Who may import what, besides the standard library.
OWNERS = {
    "tyro": {"parsing", *(f"commands.{name}" for name in ("evaluation", "machine", "models", "play", "shared", "text", "training"))},
    "rich": {"console"},
    "plotly": {"report.page", "play.assets"},
    "starlette": {"play.app"},
    "uvicorn": {"play.server"},
    "tensorboard": {"log_targets"},
    "wandb": {"log_targets"},
    "fastokens": {"tokenizers"},
    "tokenizers": {"hf_tokenizer", "tokenizer_training"},
    "safetensors": {"checkpoint", "hf"},
    "huggingface_hub": {"hub"},
    "pyarrow": {"data.parquet"},
    "backports": {"data.compression"},
    "filelock": {"run_directory", "data.prepare", "data.groups", "data.sources", "data.download"},
    "platformdirs": {"data.download"},
    "psutil": {"hardware", "distributed.ranks", "run_directory"},
    "tomli_w": {"config"},
}


def modules() -> dict[str, ast.Module]:
    """Each module of the package by its dotted name, `__init__` files aside."""
    files = {path: path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    return {".".join(name.parts): ast.parse(path.read_text(encoding="utf-8")) for path, name in files.items()}


def imports(name: str, tree: ast.Module) -> set[str]:
    """What a module imports: `.x` for the package's own, the top-level name for others."""
    found = set()
    depth = name.count(".") + 1
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: depth - node.level]
            here = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                deeper = f"{here}.{alias.name}".strip(".")
                found.add(f".{deeper}" if deeper in FLOORS or any(floor.startswith(f"{deeper}.") for floor in FLOORS) else f".{here}")
    return found


def floor(name: str) -> int:
    """How far down a module stands; the files of `evaluate` share its place, those of `probe` have their own below it."""
    return FLOORS.index(name) if name in FLOORS else next(i for i, floor in enumerate(FLOORS) if name.startswith(f"{floor}."))


def loads_weights_only(call: ast.Call) -> bool:
    """Whether a call says `weights_only=True`, in just these words."""
    return any(k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def test_every_module_has_its_place() -> None:
    for name in modules():
        assert any(name == place or name.startswith(f"{place}.") for place in FLOORS), f"{name} is not in FLOORS"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_downwards(name: str) -> None:
    for target in imports(name, modules()[name]):
        if target.startswith("."):
            below = target[1:]
            if name.startswith("evaluate") and below.startswith("evaluate"):
                continue
            assert floor(below) > floor(name), f"{name} imports {below}, which does not stand below it"


def test_only_one_folder_knows_of_processes() -> None:
    for name, tree in modules().items():
        assert "torch.distributed" not in ast.unparse(tree) or name.startswith("distributed."), name


def test_libraries_stay_in_their_rooms() -> None:
    for name, tree in modules().items():
        for library in imports(name, tree) & OWNERS.keys():
            assert name in OWNERS[library], f"{name} imports {library}, which belongs to {OWNERS[library]}"


# Who may read a file in PyTorch's own format, which is a pickle: with weights_only=True, so that nothing in it is run.
READ_FOREIGN_FILES = {"pickles"}


def test_nothing_is_unpickled_freely() -> None:
    for name, tree in modules().items():
        text = ast.unparse(tree)
        assert not imports(name, tree) & {"dill", "joblib", "shelve"}, name
        assert "pickle" not in imports(name, tree) or name in READ_FOREIGN_FILES, name
        assert not re.search(r"\bpickle\.loads?\b", text), name
        mentions = len(re.findall(r"\btorch\.load\b", text))
        safe = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and loads_weights_only(node)
        ]
        assert mentions == (len(safe) if name in READ_FOREIGN_FILES else 0), name
        assert "allow_pickle=True" not in text, name


@pytest.mark.parametrize("value", [os.system, OrderedDict(a=1), Path("x"), {1: print}])
def test_a_plain_pickle_runs_nothing(value: object, tmp_path: Path) -> None:
    """Not even a harmless name is looked up, however deep it lies."""
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"deep": [value]}))
    with pytest.raises(UserError, match="nothing in a file is run here"):
        read_plain_pickle(tmp_path / "file.pkl")


def test_a_plain_pickle_gives_plain_values(tmp_path: Path) -> None:
    values = {"stoi": {"a": 0}, "itos": {0: "a"}, "vocab_size": 1, "list": [1.5, None, True, "é", (2,)]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "file.pkl").write_bytes(pickle.dumps(values, protocol))
        assert read_plain_pickle(tmp_path / "file.pkl") == values
    for damaged in (b"", b"\x80\x04", b"no pickle"):
        (tmp_path / "file.pkl").write_bytes(damaged)
        with pytest.raises(UserError, match=r"file\.pkl is"):
            read_plain_pickle(tmp_path / "file.pkl")


def test_a_forward_pass_does_not_ask_the_config() -> None:
    """Variants are slots chosen in `__init__`: no branch of what a module computes depends on its config."""
    for name in ("model", "attention"):
        for node in ast.walk(modules()[name]):
            if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "build_norm", "build_kernel", "spans", "initialize"):
                for branch in ast.walk(node):
                    if isinstance(branch, (ast.If, ast.IfExp, ast.Match)):
                        test = branch.subject if isinstance(branch, ast.Match) else branch.test
                        assert "config" not in ast.unparse(test), f"{name}.{node.name}: {ast.unparse(test)}"


def test_importing_glassgpt_is_light() -> None:
    """`import glassgpt` must not pay for torch (1.6 s); its names load what they need when they are first asked for."""
    code = "import sys, glassgpt; assert not {'torch', 'numpy', 'plotly', 'tyro'} & set(sys.modules); print(glassgpt.GPT.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "GPT\n"


def test_all_public_names_are_there() -> None:
    import glassgpt

    for name in glassgpt.__all__:
        assert getattr(glassgpt, name).__doc__, f"{name} has no docstring"
