"""Fixtures of the data tests."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_flush() -> Iterator[None]:
    """Replace `os.fsync` by a no-op, because these tests write thousands of tiny shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
