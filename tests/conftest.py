"""Fixtures that more than one test file uses."""

import os
from pathlib import Path

import hypothesis
import pytest

# As the command line does, and before a test file imports torch: otherwise some tests take a minute on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# A busy machine must not fail a test.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def english() -> str:
    """About a million characters of English prose: the documentation of the running Python."""
    from glassgpt.data.builtin_texts import python_docs

    return "\n\n".join(python_docs())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """4,000 characters in a file."""
    from kill_harness import write_text

    return write_text(tmp_path / "text.txt")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
