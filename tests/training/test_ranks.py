"""Updates of several ranks that run ahead of the host, as on GPUs; here, the CPU checks its updates like a GPU."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glassgpt.runs.checkpoint import checkpoint_paths
from kill_harness import differences, records_of, tiny_config
from rank_harness import Harness

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BATCH = {"batch_tokens": 192, "micro_batch_size": 3, "eval_every": 4, "checkpoint_every": 5, "sample": {"count": 0}}


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    started = Harness()
    yield started
    started.close()


@pytest.mark.parametrize(
    "change",
    [{}, {"strategy": "fsdp"}, {"optim": {"name": "muon"}}, {"strategy": "fsdp", "optim": {"name": "muon"}}],
    ids=str,
)
def test_ranks_that_run_ahead_give_the_same_run(
    harness: Harness, tmp_path: Path, text: Path, change: dict[str, Any]
) -> None:
    config = tiny_config(text, **BATCH, **change).to_dict()
    harness.run(2, "train", config=config, out=str(tmp_path / "waiting"))
    arguments = {"faults": {"judging_on_device": {}}, "config": config}
    harness.run(2, "train_with_faults", **arguments, out=str(tmp_path / "ahead"))
    assert differences(tmp_path / "ahead", tmp_path / "waiting") == []


def test_a_non_finite_batch_of_one_rank_stops_all_and_the_error_names_the_rank(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    config = tiny_config(text, **{**BATCH, "eval_every": 0, "checkpoint_every": 3}).to_dict()
    faults = {"judging_on_device": {}, "non_finite_loss_or_gradient": {"rank": 1, "step": 5, "what": "loss"}}
    harness.start(2, "train_with_faults", faults=faults, config=config, out=str(tmp_path / "run"))
    results = harness.results()
    assert all(result.status != 0 for result in results)
    assert any("step 5" in result.errors and "rank 1" in result.errors for result in results)
    assert json.loads((tmp_path / "run" / "nonfinite-000005.json").read_text())["step"] == 5
    assert [path.name for path in checkpoint_paths(tmp_path / "run" / "checkpoints")] == ["000003"]
    assert math.isfinite(records_of(tmp_path / "run")[-2]["loss"])
