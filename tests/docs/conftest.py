"""Fixtures of the documentation's tests: its extensions can be imported, and the site is built once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site with the options of `make docs`; return its directory. All processes of a test run share it."""
    found = re.search(r"bin/sphinx-build (.*) -d build/doctrees docs build/site", makefile())
    assert found is not None
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "site.lock"):
        if not (folder / "site" / "objects.inv").is_file():  # the last file that Sphinx writes
            places = ["-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "site")]
            command = [sys.executable, "-m", "sphinx", *found[1].split(), *places]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def makefile() -> str:
    """Return the Makefile with the folder of its programs filled in."""
    return (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", "bin")
