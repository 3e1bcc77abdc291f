"""The lessons, for tests of them."""

import importlib.util
from pathlib import Path
from types import ModuleType

from glassgpt.learn.catalog import lessons

LESSONS = lessons()


def load(path: Path) -> ModuleType:
    """Import a file whose name is not that of a module."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
