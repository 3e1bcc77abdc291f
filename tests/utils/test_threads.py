"""Work in the background, also if the system refuses threads."""

import threading

import pytest

from glassgpt.utils.threads import in_background


def refuse(thread: threading.Thread) -> None:
    """Fail as `threading.Thread.start` does if the system refuses a thread."""
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("is_refused", [False, True])
def test_work_is_done_and_its_error_kept_even_without_threads(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], is_refused: bool
) -> None:
    if is_refused:
        monkeypatch.setattr(threading.Thread, "start", refuse)
    thread = in_background(threading.get_ident, "glassgpt-test").result(timeout=10)
    assert (thread == threading.get_ident()) == is_refused
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0, "glassgpt-test").result(timeout=10)
    assert ("glassgpt-test" in capfd.readouterr().err) == is_refused
