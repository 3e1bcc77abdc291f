"""Child processes that are killed at a chosen moment, for the harnesses that kill training and preparing."""

import os
import sys
import time
import traceback
from collections.abc import Callable


def fork(action: Callable[[], None]) -> int:
    """Run `action` in a child process, which exits with 1 and a traceback if it fails; return the child's id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait_until(child: int, happens: Callable[[], bool]) -> None:
    """Return as soon as `happens()` is true, the child has ended, or a minute has passed."""
    give_up = time.monotonic() + 60
    while not happens():
        # WNOWAIT keeps the child's exit status for the caller, who checks whether it ended before the kill.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None or time.monotonic() > give_up:
            return
        time.sleep(0.0003)
