"""What is published: sdist and wheel, and the wheel in an environment that has never seen the sources."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel, the latter built out of the former as an installer would."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_no_more(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[1]).namelist()
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src/glassgpt").rglob("*")
        if path.suffix in (".py", ".toml", ".typed", ".html", ".css", ".js")
    }
    assert sources <= set(names) | {"glassgpt/py.typed"}
    assert "glassgpt/py.typed" in names
    assert all(name.startswith(("glassgpt/", "glassgpt-")) for name in names)


def test_the_sdist_holds_the_tests_and_the_licence(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "constraints.txt", "Makefile", "tests/test_package.py"} <= names


def test_the_wheel_works_in_a_fresh_environment(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """With its dependencies alone, in the versions of constraints.txt: what the package forgot to name would be
    missing.
    """
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = Path(sysconfig.get_path("scripts", scheme="venv", vars={"base": str(tmp_path / "venv")}))
    install = [
        str(scripts / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run([*install, str(distributions[1])], check=True)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")

    def run(*command: str) -> str:
        program = str(scripts / command[0])
        done = subprocess.run(
            [program, *command[1:]], cwd=tmp_path, check=True, capture_output=True, text=True, encoding="utf-8"
        )
        return done.stdout

    where = run("python", "-c", "import glassgpt; print(glassgpt.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path)
    assert "shakespeare-cpu" in run("glassgpt", "recipes")
    options = ["--steps", "2", "--model.n-layer", "1", "--sample.max-new-tokens", "4"]
    run("glassgpt", "train", "demo", "--data", "text.txt", "--out", "run", *options)
    assert "29 ids" in run("glassgpt", "info", "run")
    assert run("glassgpt", "generate", "run", "--prompt", "The ", "--max-new-tokens", "3").startswith("The ")
    assert Path(run("glassgpt", "report", "run").strip()).name == "report.html"
