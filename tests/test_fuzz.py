"""A slice of `benchmarks/fuzz.py`: 300 damaged or odd inputs of all kinds, as `fuzz_harness` explains."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.linux
def test_damaged_and_odd_inputs_are_refused_or_give_the_right_result() -> None:
    command = [sys.executable, str(BENCHMARK), "--cases", "300", "--seed", "1", "--processes", "2"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    assert re.search(r"\| all \| 300 \|", ended.stdout)
