"""The published package: sdist and wheel, the wheel in a fresh environment, and the public names."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import glassgpt

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist as an installer would."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_wheel_contains_only_the_package(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[1]).namelist()
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src/glassgpt").rglob("*")
        if path.suffix in (".py", ".toml", ".typed", ".html", ".css", ".js")
    }
    assert sources <= set(names) | {"glassgpt/py.typed"}
    assert "glassgpt/py.typed" in names
    assert all(name.startswith(("glassgpt/", "glassgpt-")) for name in names)


def test_the_sdist_contains_the_tests_and_the_licence(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "constraints.txt", "Makefile", "tests/test_package.py"} <= names


@pytest.mark.slow
@pytest.mark.timeout(900)  # it downloads and installs torch
def test_the_wheel_works_in_a_fresh_environment(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """The environment has only the declared dependencies, in the versions of constraints.txt."""
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = Path(sysconfig.get_path("scripts", scheme="venv", vars={"base": str(tmp_path / "venv")}))
    # PYTHONPATH would put the sources, or other packages, before the installed ones.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [str(scripts / program), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    constraints = str(ROOT / "constraints.txt")
    run("python", "-m", "pip", "install", "--quiet", "--constraint", constraints, str(distributions[1]))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    installed = run("python", "-c", "import glassgpt; print(glassgpt.__file__)")
    assert Path(installed.strip()).is_relative_to(tmp_path)
    assert "shakespeare-cpu" in run("glassgpt", "recipes")
    options = ["--steps", "2", "--model.n-layer", "1", "--sample.max-new-tokens", "4"]
    run("glassgpt", "train", "demo", "--data", "text.txt", "--out", "run", *options)
    assert "29 ids" in run("glassgpt", "info", "run")
    assert run("glassgpt", "generate", "run", "--prompt", "The ", "--max-new-tokens", "3").startswith("The ")
    assert Path(run("glassgpt", "report", "run").strip()).name == "report.html"


def test_all_lists_exactly_the_public_names() -> None:
    """Each name in `__all__` is imported on first use from one module; there are no other public names."""
    names = [name for group in glassgpt._NAMES_BY_MODULE.values() for name in group]
    assert sorted(names) == sorted(glassgpt.__all__) == sorted(dir(glassgpt))
    for name in names:
        assert callable(getattr(glassgpt, name))
    with pytest.raises(AttributeError, match="evaluate_reference"):
        glassgpt.evaluate_reference  # noqa: B018
