"""Fixtures that more than one test file uses."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The command line sets this too. Without it, some tests take a minute on a busy machine. Set it before importing torch.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Tests must not fail because the machine is busy.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# These tests fork, read /proc, or send signals that other systems do not have.
LINUX_ONLY = ("tests/distributed/", "tests/training/test_ranks.py", "tests/data/test_prepare_failures.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need Linux, and skip them elsewhere."""
    for item in items:
        if item.nodeid.startswith(LINUX_ONLY):
            item.add_marker(pytest.mark.linux)
        if item.get_closest_marker("linux") and sys.platform != "linux":
            item.add_marker(pytest.mark.skip(reason="needs Linux: forks, /proc or its signals"))


@pytest.fixture(scope="session")
def python_docs() -> list[str]:
    """Return the documentation bundled with Python, which takes seconds to read."""
    from glassgpt.data import builtin_texts

    return builtin_texts.python_docs()


@pytest.fixture(scope="session")
def english(python_docs: list[str]) -> str:
    """Return about a million characters of English prose."""
    return "\n\n".join(python_docs)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Write a text of 4,000 characters; return its path."""
    from kill_harness import write_text

    return write_text(tmp_path / "text.txt")


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use one thread in tests of tiny models, which take twice the time with two."""
    import torch

    before = torch.get_num_threads()
    if request.path.parent.name in ("generation", "interpretability", "model"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary cache folder instead of the user's."""
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
