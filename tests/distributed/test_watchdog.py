"""The watchdog on a simulated clock: which rank counts as missing, and when."""

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from glassgpt.distributed.watchdog import FIRST_UPDATE_FACTOR, Status, Watchdog, hang_timeout
from glassgpt.utils.errors import UserError


def find_hang(monkeypatch: pytest.MonkeyPatch, seconds: int, *, completed: bool, behind: bool) -> str | None:
    """Return the error of rank 0 if neither of 2 ranks makes progress for this many seconds, with a limit of 10 s."""
    now = [0.0]
    monkeypatch.setenv("GLASSGPT_HANG_SECONDS", "10")
    monkeypatch.setattr("glassgpt.distributed.watchdog.time.monotonic", lambda: now[0])
    store = HashStore()
    forward = Status(phases=1, phase="the forward pass", has_updated=completed)
    first = Status(phases=2, phase="the backward pass", has_updated=completed) if behind else forward
    ranks = [Watchdog(store, 0, 2, lambda: first, print), Watchdog(store, 1, 2, lambda: forward, print)]
    for beat in range(1, seconds):
        now[0] = float(beat)
        ranks[1]._report(beat)
        ranks[0]._report(beat)
        reason = ranks[0]._find_missing()
        if reason is not None:
            return reason
    return None


@pytest.mark.parametrize("behind", [True, False])
def test_the_first_update_may_take_longer(behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update compiles the model. After it, the same pause counts as a hang."""
    assert find_hang(monkeypatch, 10 * FIRST_UPDATE_FACTOR, completed=False, behind=behind) is None
    reason = find_hang(monkeypatch, 15, completed=True, behind=behind)
    assert reason is not None
    assert "the forward pass" in reason
    assert ("rank 1" in reason and "is missing" in reason) if behind else "GLASSGPT_HANG_SECONDS" in reason
    assert find_hang(monkeypatch, 10 * FIRST_UPDATE_FACTOR + 5, completed=False, behind=behind) is not None


@pytest.mark.parametrize("value", ["never", "0", "-1", "nan", "2"])
def test_an_invalid_hang_timeout_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSGPT_HANG_SECONDS", value)
    with pytest.raises(UserError, match="GLASSGPT_HANG_SECONDS"):
        hang_timeout()
