"""The package's layout: a small root, imports from lower layers only, no cycles, owners of third-party libraries."""

import ast
import functools
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from glassgpt.utils.errors import UserError
from glassgpt.utils.safe_pickle import read_plain_pickle

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "glassgpt"

# The folders, top to bottom. A module may import from its own folder and from the folders below it.
LAYERS = """
cli learn playground report planning training evaluation interpretability interop generation runs distributed data
tokenizers model config figures utils
""".split()

# The modules that import a third-party library. No others may.
OWNERS: dict[str, set[str]] = {
    "tyro": {"cli.options", "cli.data", "cli.learn", "cli.models", "cli.train"},
    "rich": {"cli.console"},
    "plotly": {"report.page"},
    "jinja2": {"report.page"},
    "starlette": {"playground.routes", "playground.security"},
    "uvicorn": {"playground.server"},
    "tensorboard": set(),  # training.loggers uses it through torch.utils.tensorboard
    "wandb": {"training.loggers"},
    "fastokens": {"tokenizers.huggingface"},
    "tokenizers": {"tokenizers.huggingface", "data.tokenizer_training"},
    "safetensors": {"runs.checkpoint"},
    "huggingface_hub": {"utils.hub"},
    "pyarrow": {"data.readers"},
    "backports": set(),  # data.text_files imports it by its name, as a string
    "filelock": {"runs.run_directory", "data.prepare", "data.work_units", "data.builtin_texts", "utils.download"},
    "platformdirs": {"utils.download"},
    "psutil": {"utils.device", "distributed.group", "runs.run_directory"},
    "tomli_w": {"config.schema"},
}

ROOT_FILES = {"__init__.py", "__main__.py", "py.typed"}


def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of each module by its dotted name; `__init__` has the name of its package."""
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


MODULES = modules()


@functools.cache
def imports(tree: ast.Module) -> set[str]:
    """Return a module's imports, also inside functions: `.x.y` for the package's own, top-level names for others."""
    imported = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            module = node.module or ""
            deeper = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("glassgpt.") in MODULES else module for name in deeper]
        for name in names:
            imported.add(
                "." + name.removeprefix("glassgpt").lstrip(".")
                if name.startswith("glassgpt")
                else name.partition(".")[0]
            )
    return imported


def loads_weights_only(call: ast.Call) -> bool:
    """Return whether a call has the literal argument `weights_only=True`."""
    return any(
        k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords
    )


def test_the_package_root_has_no_modules() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == ROOT_FILES
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(LAYERS)


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name not in ("", "__main__")))
def test_modules_import_only_from_their_own_or_lower_layers(name: str) -> None:
    own = LAYERS.index(name.partition(".")[0])
    for target in imports(MODULES[name]):
        if target.startswith("."):
            layer = target[1:].partition(".")[0]
            assert LAYERS.index(layer) >= own, f"{name} imports {target}, which is in a higher layer"


def test_imports_have_no_cycles() -> None:
    """The graph of modules is acyclic, with imports inside functions included."""
    below = {name: {t[1:] for t in imports(tree) if t.startswith(".")} for name, tree in MODULES.items()}
    TopologicalSorter(below).prepare()  # raises CycleError, which names the cycle


def test_only_the_folder_distributed_uses_torch_distributed() -> None:
    for name, tree in MODULES.items():
        assert "torch.distributed" not in ast.unparse(tree) or name.partition(".")[0] == "distributed", name


def test_exactly_its_owners_import_a_library() -> None:
    for library, owners in OWNERS.items():
        assert {name for name, tree in MODULES.items() if library in imports(tree)} == owners, library


# Modules that may read PyTorch's own format, which is a pickle. They use weights_only=True, which executes nothing.
READ_PICKLES = {"utils.safe_pickle"}


def test_only_safe_pickle_unpickles() -> None:
    for name, tree in MODULES.items():
        text = ast.unparse(tree)
        assert not imports(tree) & {"dill", "joblib", "shelve"}, name
        assert "pickle" not in imports(tree) or name in READ_PICKLES, name
        assert not re.search(r"\bpickle\.loads?\b", text), name
        mentions = len(re.findall(r"\btorch\.load\b", text))
        safe = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and loads_weights_only(node)
        ]
        assert mentions == (len(safe) if name in READ_PICKLES else 0), name
        assert "allow_pickle=True" not in text, name


@pytest.mark.parametrize("value", [os.system, OrderedDict(a=1), Path("x"), {1: print}])
def test_reading_a_plain_pickle_executes_nothing(value: object, tmp_path: Path) -> None:
    """Every global name is refused, also a harmless or deeply nested one."""
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"deep": [value]}))
    with pytest.raises(UserError, match="would execute"):
        read_plain_pickle(tmp_path / "file.pkl")


def test_reading_a_plain_pickle_returns_plain_values(tmp_path: Path) -> None:
    values = {"stoi": {"a": 0}, "itos": {0: "a"}, "vocab_size": 1, "list": [1.5, None, True, "é", [2]]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "file.pkl").write_bytes(pickle.dumps(values, protocol))
        assert read_plain_pickle(tmp_path / "file.pkl") == values
    nested = b"\x80\x02})" + 60 * b"2\x86" + b"K\x01s."  # a key that takes years to hash
    for damaged in (b"", b"\x80\x04", b"no pickle", nested):
        (tmp_path / "file.pkl").write_bytes(damaged)
        with pytest.raises(UserError, match=r"file\.pkl is"):
            read_plain_pickle(tmp_path / "file.pkl")


def test_a_forward_pass_has_no_branch_on_the_config() -> None:
    """`__init__` selects the variants as slots, so no branch of a computation depends on the config."""
    for name in ("model.gpt", "model.attention"):
        for node in ast.walk(MODULES[name]):
            if isinstance(node, ast.FunctionDef) and node.name not in (
                "__init__",
                "build_norm",
                "build_kernel",
                "initialize",
            ):
                for branch in ast.walk(node):
                    if isinstance(branch, (ast.If, ast.IfExp, ast.Match)):
                        test = branch.subject if isinstance(branch, ast.Match) else branch.test
                        assert "config" not in ast.unparse(test), f"{name}.{node.name}: {ast.unparse(test)}"


def test_importing_glassgpt_does_not_import_torch() -> None:
    """Importing torch would take 1.6 s; the public names import what they need on first use."""
    code = "import sys, glassgpt; assert not {'torch', 'numpy', 'plotly', 'tyro'} & set(sys.modules)"
    code += "; print(glassgpt.GPT.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "GPT\n"


def test_all_public_names_have_docstrings() -> None:
    import glassgpt

    for name in glassgpt.__all__:
        assert getattr(glassgpt, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_names_of_torch_are_used_in_one_module_only(name: str) -> None:
    private = r"torch\.ops\.|torch\._|torch\.\w+\._|\._modules\b|_compiled_call_impl"
    used = re.findall(private, ast.unparse(MODULES[name]).replace("torch.__version__", ""))
    assert not used or name == "utils.torch_internals", used
