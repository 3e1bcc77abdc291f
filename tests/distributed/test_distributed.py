"""Several ranks: the results of one process, no lost runs, and errors that name the rank.

The ranks are processes with gloo, forked by `rank_harness.py`; a few tests start torchrun itself. Tests that are not
marked as slow are the fast core.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from glassgpt.config.model import ModelConfig
from glassgpt.distributed.group import Ranks, process_group
from glassgpt.distributed.strategies import DataParallel
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import checkpoint_paths, open_checkpoint
from glassgpt.utils.errors import UserError
from kill_harness import differences, probes_of, records_of, tiny_config, write_text
from rank_harness import Harness, RankResult

pytestmark = pytest.mark.distributed

# On different numbers of processes, float32 sums have another order, over up to 50 steps.
TOLERANCE = 1e-5
# Twelve sequences per step, which 1, 2, 3 and 4 processes divide.
BATCH = {"batch_tokens": 192, "eval_every": 0, "checkpoint_every": 0, "sample": {"count": 0}}


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """Return the program that forks the ranks."""
    started = Harness()
    yield started
    started.close()


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    """Return the config of a tiny run as a dictionary, the form that the harness needs."""
    return tiny_config(text, **{**BATCH, **changes}).to_dict()


def losses_of(run: Path) -> list[float]:
    """Return the losses of all updates."""
    return [record["loss"] for record in records_of(run) if "loss" in record]


def norms_by_group(run: Path) -> dict[tuple[int, str, str], float]:
    """Return the norms of gradients and weights by step, kind and parameter group."""
    kinds, evaluations = ("grad_norms", "weight_norms"), [record for record in records_of(run) if "val_loss" in record]
    return {
        (r["step"], kind, group): norm for r in evaluations for kind in kinds for group, norm in r.get(kind, {}).items()
    }


def last_weights(run: Path) -> dict[str, Any]:
    """Return the tensors of the newest checkpoint."""
    return safetensors.torch.load_file(checkpoint_paths(run / "checkpoints")[-1] / "model.safetensors")


def status_of(run: Path) -> dict[str, Any]:
    """Return the content of status.json."""
    return json.loads((run / "status.json").read_text())  # type: ignore[no-any-return]


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference between two models' weights.

    The keys' biases are excluded, because their gradients are zero except for rounding.
    """
    assert one.keys() == other.keys()
    largest = 0.0
    for name, tensor in one.items():
        difference = (tensor.double() - other[name].double()).abs()
        if name.endswith("qkv.bias"):
            third = len(difference) // 3
            difference[third : 2 * third] = 0
        largest = max(largest, float(difference.max()))
    return largest


# Equal results


def test_initial_weights_have_the_same_bits_on_any_number_of_ranks(harness: Harness, text: Path) -> None:
    config = settings(text, model={"n_layer": 2, "n_embd": 24, "n_head": 3})
    (expected,) = harness.run(0, "first_weights", config=config)
    for size, strategy in ((1, "fsdp"), (2, "ddp"), (4, "fsdp")):
        hashes = harness.run(size, "first_weights", config={**config, "strategy": strategy})
        assert hashes == [expected] * size, (size, strategy)


def test_one_rank_of_each_host_runs_first_and_all_hosts_wait_for_them(harness: Harness) -> None:
    """Hosts are also recognised without torchrun's GROUP_RANK, for example under srun and mpirun."""
    slow, second, other_host = harness.run(3, "times_in_main_process_first", places=[("a", 0), ("a", 1), ("b", 0)])
    assert slow["left"] < second["entered"]
    assert slow["left"] < other_host["continued"]


def test_ddp_does_not_change_the_global_random_state(tmp_path: Path) -> None:
    """DDP runs two passes with dropout before training."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shape = ModelConfig(vocab_size=8, context_length=8, n_layer=1, n_head=1, n_embd=8, dropout=0.5)
        model, before = GPT(shape), torch.get_rng_state()
        DataParallel(model, Ranks(), torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        dist.destroy_process_group()


MODERN = {
    "position": "rope",
    "norm": "rmsnorm",
    "qk_norm": True,
    "n_head": 4,
    "n_kv_head": 2,
    "tied_head": False,
    "bias": False,
}


@pytest.mark.parametrize(
    ("optimizer", "accumulated", "processes"),
    [
        pytest.param("adamw", False, [(4, "ddp"), (1, "fsdp")], marks=pytest.mark.slow, id="adamw"),
        pytest.param("adamw", True, [(2, "ddp"), (4, "fsdp")], marks=pytest.mark.slow, id="adamw accumulated"),
        pytest.param("muon", True, [(3, "ddp")], marks=pytest.mark.slow, id="muon accumulated, three"),
        pytest.param("muon", True, [(2, "fsdp")], id="muon accumulated, two"),
    ],
)
def test_fifty_steps_are_equal_on_any_number_of_processes(
    harness: Harness, tmp_path: Path, text: Path, optimizer: str, accumulated: bool, processes: list[tuple[int, str]]
) -> None:
    """DDP and FSDP, with AdamW or with Muon on sharded fused matrices, equal a single process.

    Losses agree to 1e-5, norms to 2e-4 and weights to 1e-5.
    """
    config = settings(
        text,
        model=MODERN if optimizer == "muon" else {},
        optim={"name": optimizer, "lr": 1e-2 if optimizer == "adamw" else 8e-3, "grad_clip": 0.83},
        steps=50,
        micro_batch_size=2 if accumulated else 12,
    )
    harness.run(0, "train", config=config, out=tmp_path / "one")
    single = tmp_path / "one"
    norms = [record["grad_norm"] for record in records_of(single) if "grad_norm" in record]
    by_group = norms_by_group(single)
    # The run learns, otherwise equal losses would test little.
    assert losses_of(single)[-1] < 0.8 * losses_of(single)[0]
    assert max(norms) > 0.83 > min(norms)  # some gradients are clipped and some are not
    for size, strategy in processes:
        run = tmp_path / f"{strategy}{size}"
        harness.run(size, "train", config={**config, "strategy": strategy}, out=run)
        assert losses_of(run) == pytest.approx(losses_of(single), rel=TOLERANCE), run.name
        assert [r["grad_norm"] for r in records_of(run) if "grad_norm" in r] == pytest.approx(
            norms, rel=20 * TOLERANCE
        ), run.name
        assert norms_by_group(run) == pytest.approx(by_group, rel=20 * TOLERANCE), run.name
        assert largest_difference(last_weights(run), last_weights(single)) < TOLERANCE, run.name


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_fsdp_gradients_summed_once_per_update_equal_those_summed_per_micro_step(
    harness: Harness, tmp_path: Path, text: Path, precision: str
) -> None:
    """Each rank has three micro-steps. The tolerance of 1e-6 is for sums in another order."""
    config = settings(text, steps=4, micro_batch_size=2, strategy="fsdp", precision=precision)
    for sync in ("micro_step", "update"):
        harness.run(2, "train", config={**config, "fsdp_gradient_sync": sync}, out=tmp_path / sync)
    assert losses_of(tmp_path / "update") == pytest.approx(losses_of(tmp_path / "micro_step"), rel=1e-6)
    assert largest_difference(last_weights(tmp_path / "update"), last_weights(tmp_path / "micro_step")) < 1e-6


def test_dropout_masks_depend_on_the_micro_batch_not_on_the_rank(harness: Harness, tmp_path: Path, text: Path) -> None:
    config = settings(text, model={"dropout": 0.2}, steps=5, micro_batch_size=3)
    for size in (0, 2, 4):
        harness.run(size, "train", config=config, out=tmp_path / str(size))
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "0"), rel=TOLERANCE)
    assert losses_of(tmp_path / "4") == pytest.approx(losses_of(tmp_path / "0"), rel=TOLERANCE)


def test_the_error_for_an_indivisible_batch_names_the_nearest_divisible_ones(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    harness.start(2, "train", config=settings(text, batch_tokens=16 * 5), out=tmp_path / "run")
    results = harness.results()
    assert [result.status != 0 for result in results] == [True, True]
    (line,) = error_lines(results)  # only one rank prints the error
    assert "2 processes" in line
    assert "64 or 96" in line
    assert not (tmp_path / "run" / "config.toml").exists()


def test_the_batches_that_the_error_names_are_divisible() -> None:
    config = tiny_config(Path("text.txt"), batch_tokens=80)
    for processes in (2, 3, 4, 7):
        with pytest.raises(UserError) as error:
            config.sequences_per_process(processes)
        for number in re.findall(r"\d+", str(error.value).partition("nearest")[2]):
            assert config.override(batch_tokens=int(number)).sequences_per_process(processes) >= 1
    with pytest.raises(UserError, match="batch_start = 32"):
        config.override(batch_tokens=64, batch_start=32).sequences_per_process(4)


ITEM = {"ctx": "the quick brown", "endings": ["fox jumps", "dog", "over a lazy dog while", "my big sphinx"], "label": 0}


def test_ranks_evaluate_shares_and_all_get_the_figures_of_a_single_process(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    """The split has few windows and a remainder, some shares are empty, and HellaSwag batches are uneven."""
    items = tmp_path / "items.jsonl"
    rows = [
        {**ITEM, "ind": i, "ctx": " ".join(["the quick brown"] * (1 + i % 3)), "activity_label": "x"} for i in range(7)
    ]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(text, model={"context_length": 64}, batch_tokens=64 * 12)
    for limit in (None, 1):
        (expected,) = harness.run(0, "evaluate", config=config, limit=limit, items=items, count=7)
        for size, strategy in ((2, "ddp"), (3, "fsdp")):
            for figures in harness.run(
                size, "evaluate", config={**config, "strategy": strategy}, limit=limit, items=items, count=7
            ):
                assert figures["hellaswag"] == expected["hellaswag"]
                # The same losses, summed in float64 in another order.
                assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-13)
    assert expected["loss"]["tokens"] == 1


@pytest.mark.slow
def test_two_runs_in_one_process_are_equal(harness: Harness, tmp_path: Path, text: Path) -> None:
    harness.run(2, "train_twice", config=settings(text, steps=3), outs=[tmp_path / "a", tmp_path / "b"])
    assert differences(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.slow
def test_sharded_training_in_bfloat16_equals_autocast_within_rounding(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    """FSDP gathers blocks in bfloat16. Residual stream and gradient sums stay float32, like under DDP with autocast."""
    config = settings(text, steps=10, precision="bfloat16")
    for strategy in ("ddp", "fsdp"):
        harness.run(2, "train", config={**config, "strategy": strategy}, out=tmp_path / strategy)
    assert losses_of(tmp_path / "fsdp") == pytest.approx(losses_of(tmp_path / "ddp"), rel=2e-4)


@pytest.mark.slow
def test_cpu_offload_does_not_change_the_losses(harness: Harness, tmp_path: Path, text: Path) -> None:
    """On a CPU nothing is moved, so this checks only that the option works."""
    config = settings(text, steps=3, strategy="fsdp")
    for offload in (False, True):
        harness.run(2, "train", config={**config, "cpu_offload": offload}, out=tmp_path / str(offload))
    assert losses_of(tmp_path / "True") == losses_of(tmp_path / "False")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_checkpointed_and_compiled_blocks_give_the_same_losses(
    harness: Harness, tmp_path: Path, text: Path, strategy: str
) -> None:
    config = settings(text, steps=4, strategy=strategy, micro_batch_size=2, model={"n_layer": 2, "dropout": 0.1})
    variants = {
        "plain": {},
        "selective": {"activation_checkpointing": "selective"},
        "full": {"activation_checkpointing": "full"},
        "compiled": {"compile": "on", "compile_backend": "eager"},
    }
    for name, changes in variants.items():
        harness.run(2, "train", config={**config, **changes}, out=tmp_path / name)
    expected = losses_of(tmp_path / "plain")
    assert losses_of(tmp_path / "selective") == expected
    assert losses_of(tmp_path / "full") == expected
    assert losses_of(tmp_path / "compiled") == pytest.approx(expected, rel=1e-6)
    # All snapshots before the first update are of the same full model.
    assert len({probes_of(tmp_path / name)["000000.safetensors"] for name in variants}) == 1
    harness.run(0, "train", config={**config, "strategy": "auto", "steps": 1}, out=tmp_path / "one")
    assert probes_of(tmp_path / "one")["000000.safetensors"] == probes_of(tmp_path / "plain")["000000.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "full"), ("fsdp", "none"), ("fsdp", "full")])
def test_blocks_are_compiled_under_every_strategy(
    harness: Harness, tmp_path: Path, text: Path, strategy: str, kind: str
) -> None:
    """Hooks on a block and activation checkpointing could silently disable compilation."""
    config = settings(text, steps=2, model={"n_layer": 2}, activation_checkpointing=kind, strategy=strategy)
    operators = harness.run(2, "compiled_operators", config=config, out=tmp_path / "run")
    assert min(operators) >= 15  # a block has about twenty


# Failures and restarts


@pytest.mark.slow
def test_a_run_resumed_on_1_2_4_2_and_1_processes_equals_an_uninterrupted_one(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    """The strategy changes too. Losses and weights agree to 1e-5."""
    config = settings(
        text, steps=25, optim={"name": "muon", "lr": 8e-3, "schedule": "constant"}, eval_every=5, checkpoint_every=5
    )
    expected, chain = tmp_path / "expected", tmp_path / "chain"
    harness.run(0, "train", config=config, out=expected)
    harness.run(0, "train", config={**config, "steps": 5}, out=chain)
    for size, steps, strategy in ((2, 10, "ddp"), (4, 15, "fsdp"), (2, 20, "fsdp"), (0, 25, "auto")):
        harness.run(size, "resume", run=chain, steps=steps, strategy=strategy)
        assert status_of(chain)["processes"] == max(1, size)
    assert losses_of(chain) == pytest.approx(losses_of(expected), rel=TOLERANCE)
    validation = [[r["val_loss"] for r in records_of(run) if "val_loss" in r] for run in (chain, expected)]
    assert validation[0] == pytest.approx(validation[1], rel=TOLERANCE)
    assert largest_difference(last_weights(chain), last_weights(expected)) < TOLERANCE
    assert checkpoint_paths(chain / "checkpoints")[-1].name == "000025"


@pytest.mark.parametrize(
    ("size", "strategy", "micro_batch_size", "saved"),
    [
        (3, "ddp", 2, 5),
        pytest.param(3, "ddp", 12, 6, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", 12, 6, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", 2, 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_after_a_preemption_has_the_same_bits(
    harness: Harness, tmp_path: Path, text: Path, size: int, strategy: str, micro_batch_size: int, saved: int
) -> None:
    """The last rank gets SIGTERM twice, as by a scheduler and torchrun. All ranks save the same step and exit 0.

    With several micro-batches, all ranks drop the update in which it arrives.
    """
    changes: dict[str, Any] = {
        "model": {"dropout": 0.1},
        "optim": {"name": "muon"},
        "steps": 12,
        "eval_every": 4,
        "checkpoint_every": 4,
        "micro_batch_size": micro_batch_size,
    }
    config = {**settings(text, **changes), "strategy": strategy}
    expected, run = tmp_path / "expected", tmp_path / "run"
    harness.run(size, "train", config=config, out=expected)
    harness.run(size, "train_with_faults", faults={"preempted": {"rank": size - 1, "step": 6}}, config=config, out=run)
    status = status_of(run)
    assert (status["state"], status["step"], status["processes"]) == ("preempted", saved, size)
    assert open_checkpoint(run / "checkpoints" / f"{saved:06d}").state.step == saved
    harness.run(size, "resume", run=run)
    assert status_of(run)["state"] == "finished"
    assert differences(expected, run) == []


def error_lines(results: list[RankResult]) -> list[str]:
    """Return the lines that begin with `error: ` of all ranks."""
    return [line for result in results for line in result.errors.splitlines() if "error: " in line]


def run_with_fault(
    harness: Harness,
    size: int,
    patch: str,
    config: dict[str, Any],
    out: Path,
    also: dict[str, Any] | None = None,
    **options: Any,
) -> list[RankResult]:
    """Run ranks with a fault and return their results. A hang is detected after 2 seconds."""
    environment = {"GLASSGPT_HANG_SECONDS": "2"}
    faults = {patch: options} | (also or {})
    harness.start(size, "train_with_faults", environment=environment, faults=faults, config=config, out=out)
    return harness.results()


@pytest.mark.parametrize(
    ("rank", "kind", "words"),
    [
        (0, "KeyError", "a thing that nobody expected"),
        (2, "KeyError", "a thing that nobody expected"),
        # Under gloo, a lost connection is also a RuntimeError; this error is the rank's own.
        (1, "RuntimeError", "cannot read /data/gloo/connection closed by peer"),
    ],
)
def test_an_exception_on_any_rank_stops_all_and_the_error_names_the_rank(
    harness: Harness, tmp_path: Path, text: Path, rank: int, kind: str, words: str
) -> None:
    options: dict[str, Any] = {"rank": rank, "step": 4, "kind": kind, "message": words}
    results = run_with_fault(harness, 3, "raising", settings(text), tmp_path / "run", **options)
    assert all(result.status == 1 for result in results)
    assert [line.partition(" (")[0] for line in error_lines(results)] == [f"glassgpt: error: rank {rank} of 3"]
    assert kind in error_lines(results)[0]
    assert words in error_lines(results)[0]
    assert "Traceback" in results[rank].errors  # the rank with an unexpected exception prints its traceback
    assert all("Traceback" not in result.errors for number, result in enumerate(results) if number != rank)
    status = status_of(tmp_path / "run")
    assert status["state"] == "failed"
    assert f"rank {rank} of 3" in status["error"] or rank == 0


HANGS = [
    *(pytest.param(*hang, marks=pytest.mark.slow) for hang in [("stuck", 0), ("stopped", 1)]),
    ("stuck_in_forward", 1),
]


@pytest.mark.parametrize(("kind", "rank"), HANGS)
def test_the_error_names_a_rank_that_hangs(harness: Harness, tmp_path: Path, text: Path, kind: str, rank: int) -> None:
    results = run_with_fault(harness, 2, kind, settings(text), tmp_path / "run", rank=rank, step=3)
    (line,) = error_lines(results)
    assert re.search(rf"error: rank {rank} \(.*process \d+\) is missing: ", line), line
    # A stopped process sent its last report up to a second before it was stopped.
    assert {"stuck": "update 2", "stopped": "last seen at", "stuck_in_forward": "of update 3"}[kind] in line
    assert results[1 - rank].status == 1
    # A stopped process cannot exit, so it is killed, as by torchrun.
    assert results[rank].status in (1, -signal.SIGKILL)


def test_the_error_names_a_rank_that_hangs_in_an_evaluation(harness: Harness, tmp_path: Path, text: Path) -> None:
    results = run_with_fault(harness, 2, "stuck_in_evaluation", settings(text), tmp_path / "run", rank=1)
    (line,) = error_lines(results)
    assert re.search(r"error: rank 1 \(.*\) is missing: at the evaluation of step 0 for", line), line


@pytest.mark.slow
def test_if_no_rank_makes_progress_the_error_names_all_phases(harness: Harness, tmp_path: Path, text: Path) -> None:
    """A single rank hangs here, so no other rank waits for it."""
    faults = {"stuck_in_forward": {"rank": 0, "step": 3}}
    results = run_with_fault(
        harness, 1, "stuck_in_forward", settings(text), tmp_path / "run", also=faults, rank=0, step=3
    )
    (line,) = error_lines(results)
    assert re.search(r"no rank .* GLASSGPT_HANG_SECONDS.*: rank 0 \(.*\) at micro-batch 1 of update 3", line), line


def test_the_error_names_a_killed_rank(harness: Harness, tmp_path: Path, text: Path) -> None:
    results = run_with_fault(harness, 2, "killed", settings(text), tmp_path / "run", rank=1, step=3)
    assert results[1].status == -signal.SIGKILL
    assert results[0].status == 2
    (line,) = error_lines(results)
    assert "rank 0 of 2" in line
    assert re.search(r"lost the connection to rank 1 \(.*process \d+\)", line)
    assert "Traceback" not in results[0].errors
    assert status_of(tmp_path / "run")["state"] == "failed"


def test_a_finished_run_stays_finished_if_a_rank_is_killed_afterwards(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    results = run_with_fault(harness, 2, "killed_at_the_end", settings(text, steps=3), tmp_path / "run", rank=1)
    assert [result.status for result in results] == [2, -signal.SIGKILL]
    (line,) = error_lines(results)
    assert "lost the connection to rank 1" in line
    assert status_of(tmp_path / "run")["state"] == "finished"


@pytest.mark.parametrize(("what", "strategy"), [("loss", "ddp"), ("gradient", "fsdp")])
def test_a_non_finite_number_on_one_rank_stops_all_ranks(
    harness: Harness, tmp_path: Path, text: Path, what: str, strategy: str
) -> None:
    """The last good checkpoint remains, and the run resumed from it has the same bits."""
    config = {**settings(text, steps=8, checkpoint_every=3), "strategy": strategy}
    expected, run = tmp_path / "expected", tmp_path / "run"
    harness.run(2, "train", config=config, out=expected)
    results = run_with_fault(harness, 2, "non_finite_loss_or_gradient", config, run, rank=1, step=5, what=what)
    assert all(result.status in (1, 2) for result in results)
    (line,) = error_lines(results)
    assert "step 5: the loss is" in line
    assert ("on rank 1" in line) == (what == "loss")
    assert "nonfinite-000005.json" in line
    assert (run / "nonfinite-000005.json").is_file()
    assert [path.name for path in checkpoint_paths(run / "checkpoints")] == ["000003"]
    harness.run(2, "resume", run=run)
    assert differences(expected, run) == []


@pytest.mark.slow
def test_a_failing_run_finishes_the_save_in_progress(harness: Harness, tmp_path: Path, text: Path) -> None:
    """Rank 1 fails while rank 0 is writing the checkpoint."""
    run = tmp_path / "run"
    config = settings(text, checkpoint_every=4)
    results = run_with_fault(
        harness, 2, "raising", config, run, also={"slow_save": {"step": 4, "seconds": 2.0}}, rank=1, step=5
    )
    assert all(result.status for result in results)
    assert [path.name for path in checkpoint_paths(run / "checkpoints")] == ["000004"]
    open_checkpoint(run / "checkpoints" / "000004")


@pytest.mark.parametrize(("size", "number"), [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_during_the_last_save_does_not_interrupt_it(
    harness: Harness, tmp_path: Path, text: Path, size: int, number: int
) -> None:
    run = tmp_path / "run"
    results = run_with_fault(
        harness, size, "slow_save", settings(text, steps=3), run, step=3, seconds=1.0, number=number
    )
    assert [result.status for result in results] == [0] * max(1, size), results[0].errors
    assert status_of(run)["state"] == "finished"
    open_checkpoint(run / "checkpoints" / "000003")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_signal_does_not_interrupt_the_save(harness: Harness, tmp_path: Path, text: Path, rank: int) -> None:
    """It arrives after one second, when the rank has left the loop or waits for the rank that writes.

    The first one arrives in update 5, which is dropped.
    """
    run, slow = tmp_path / "run", {"slow_save": {"step": 4, "seconds": 2.0}}
    results = run_with_fault(
        harness, 2, "preempted", settings(text, steps=9), run, also=slow, rank=rank, step=5, again=1.0
    )
    assert [result.status for result in results] == [0, 0], results[0].errors + results[1].errors
    assert (status_of(run)["state"], status_of(run)["step"]) == ("preempted", 4)
    open_checkpoint(run / "checkpoints" / "000004")


@pytest.mark.slow
def test_a_full_disk_during_a_save_is_reported_and_the_previous_checkpoint_remains(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    config = settings(text, steps=40, checkpoint_every=3)
    expected, run = tmp_path / "expected", tmp_path / "run"
    harness.run(2, "train", config=config, out=expected)
    results = run_with_fault(harness, 2, "full_disk", config, run, save=2)
    (line,) = error_lines(results)
    assert "rank 0 of 2" in line
    assert "checkpoints/000006" in line
    assert "disk is full" in line
    assert all(result.status in (1, 2) for result in results)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000003"]
    assert status_of(run)["state"] == "failed"
    harness.run(2, "resume", run=run)
    assert differences(expected, run) == []


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("other_code", r"rank 1 \(.*\) and rank 0 \(.*\) differ in version of the code"),
        ("other_data", r"rank 1 \(.*\) and rank 0 \(.*\) differ in data"),
        ("missing_data", r"rank 1 of 2 \(.*\): the dataset /data is damaged: train_000001\.bin is missing"),
    ],
)
def test_the_error_names_a_rank_with_different_code_or_data(
    harness: Harness, tmp_path: Path, text: Path, patch: str, words: str
) -> None:
    source: dict[str, Any] = (
        {"source": str(write_text(tmp_path / "other.txt", seed=1))} if patch == "other_data" else {}
    )
    results = run_with_fault(harness, 2, patch, settings(text), tmp_path / "run", rank=1, **source)
    (line,) = error_lines(results)
    assert re.search(words, line)
    assert all(result.status in (1, 2) for result in results)
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(
    ("task", "changes", "fact"),
    [
        ("resume", {}, "command"),
        pytest.param("train", {"out": "another"}, "run directory", marks=pytest.mark.slow),
        pytest.param("train", {"config": {"optim": {"lr": 0.5}}}, r"optim\.lr: 0\.5 and 0\.01", marks=pytest.mark.slow),
    ],
)
def test_the_error_names_what_a_rank_was_given_differently(
    harness: Harness, tmp_path: Path, text: Path, task: str, changes: dict[str, Any], fact: str
) -> None:
    """Otherwise the ranks would train something else than what one of them was told, or misread each other."""
    given = {"config": settings(text), "out": str(tmp_path / "run")}
    other = {"run": given["out"]} if task == "resume" else {**given, "config": settings(text), **changes}
    if "config" in changes:
        other["config"] = settings(text, **changes["config"])
    harness.start(2, "each_rank_its_own", calls=[("train", given), (task, other)])
    results = harness.results()
    (line,) = error_lines(results)
    assert re.search(rf"rank 1 \(.*\) and rank 0 \(.*\) differ in {fact}", line)
    assert all(result.status in (1, 2) for result in results)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_second_job_in_the_same_directory_is_refused(harness: Harness, tmp_path: Path, text: Path) -> None:
    harness.run(2, "train", config=settings(text, steps=2), out=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    harness.start(2, "train", config=settings(text, steps=2), out=tmp_path / "run")
    (line,) = error_lines(harness.results())
    assert str(tmp_path / "run") in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_reused_rendezvous_id_resumes_only_the_same_request(harness: Harness, tmp_path: Path, text: Path) -> None:
    """The same request resumes, but is refused with --overwrite. A different request is refused without --overwrite
    and replaces the run with it.
    """
    environment, run = {"TORCHELASTIC_RUN_ID": "nightly"}, tmp_path / "run"
    requests = (
        (3, False, ""),
        (3, False, ""),
        (3, True, "--rdzv-id"),
        (4, False, "there is already a run"),
        (4, True, ""),
    )
    for steps, overwrite, error in requests:
        harness.start(
            2, "train", environment=environment, config=settings(text, steps=steps), out=run, overwrite=overwrite
        )
        results = harness.results()
        assert results[0].status == (2 if error else 0), results[0].errors
        assert error in results[0].errors
    assert len(losses_of(run)) == 4
    (run / "status.json").write_text("")
    variables = {**environment, "TORCHELASTIC_RESTART_COUNT": "1"}
    harness.start(2, "train", environment=variables, config=settings(text, steps=4), out=run, overwrite=True)
    (line,) = error_lines(harness.results())
    assert "status.json" in line
    assert "--resume" in line
    assert len(checkpoint_paths(run / "checkpoints")) == 1  # no checkpoint was removed
    harness.run(2, "resume", run=run)
    assert status_of(run)["state"] == "finished"  # status.json is written again, although it was empty


def test_the_error_for_an_indivisible_batch_on_resume_names_divisors(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    harness.run(0, "train", config=settings(text, steps=2, batch_tokens=64), out=tmp_path / "run")
    harness.start(3, "resume", run=tmp_path / "run", steps=4)
    (line,) = error_lines(harness.results())
    assert "3 processes" in line
    assert "1, 2, 4" in line


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_reported_and_the_run_resumes_from_the_previous_one(
    harness: Harness, tmp_path: Path, text: Path, damage: str
) -> None:
    config = settings(text, steps=9, checkpoint_every=3)
    expected, run = tmp_path / "expected", tmp_path / "run"
    for out in (expected, run):
        harness.run(2, "train", config={**config, "steps": 9}, out=out)
    weights = run / "checkpoints" / "000009" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content) if damage == "flip" else bytes(content[:-1]))
    harness.start(2, "resume", run=run)
    results = harness.results()
    assert [result.status for result in results] == [0, 0]
    assert "000009" in results[0].errors
    assert "model.safetensors" in results[0].errors
    assert differences(expected, run) == []


# Torchrun


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LOCAL_RANK", None),  # all ranks of a host would use its first GPU
        ("LOCAL_RANK", "2"),
        ("LOCAL_RANK", "x"),
        ("RANK", None),  # each process would train alone, in the same directory
        ("RANK", "-1"),
        ("RANK", "2"),
        ("WORLD_SIZE", "x"),
        ("WORLD_SIZE", "9" * 5000),
        ("WORLD_SIZE", "0"),
        ("MASTER_ADDR", None),
        ("MASTER_ADDR", "no-such-host.invalid"),
        ("MASTER_PORT", None),
        ("MASTER_PORT", "70000"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "abc"),
    ],
)
def test_a_launcher_variable_that_cannot_be_right_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None
) -> None:
    names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, text in {**names, variable: value}.items():
        monkeypatch.delenv(name, raising=False) if text is None else monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=variable), process_group():
        pass


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_under_torchrun_has_the_same_bits() -> None:
    """Of three ranks, one is killed between steps, one in a save and one in an evaluation; torchrun restarts them.

    benchmarks/rank_kills.py kills 20 times.
    """
    harness = Path(__file__).parents[1] / "torchrun_harness.py"
    result = subprocess.run(
        [sys.executable, str(harness), "--ranks", "3", "--kills", "3", "--seed", "5"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["kills"] == {"step": 1, "save": 1, "evaluation": 1}
    assert (outcome["differences"], outcome["steps_lost"], outcome["left_behind"]) == ([], [], [])


@pytest.mark.slow
def test_the_command_line_under_torchrun_prints_errors_once(tmp_path: Path, text: Path) -> None:
    """Only the first rank prints errors in the options. Commands other than train are refused."""
    variables = {**os.environ, "LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}
    silent = subprocess.run(
        [sys.executable, "-m", "glassgpt", "train", "no-such-recipe"], env=variables, capture_output=True, text=True
    )
    assert (silent.returncode, silent.stdout, silent.stderr) == (2, "", "")
    variables |= {"LOCAL_RANK": "0", "RANK": "0"}
    refused = subprocess.run(
        [sys.executable, "-m", "glassgpt", "generate", "runs/x"], env=variables, capture_output=True, text=True
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "generate" in refused.stderr
    del variables["LOCAL_RANK"]  # srun and mpirun set other variables instead
    no_local_rank = subprocess.run(
        [sys.executable, "-m", "glassgpt", "train", "demo"], env=variables, capture_output=True, text=True, cwd=tmp_path
    )
    assert no_local_rank.returncode == 2
    assert all(name in no_local_rank.stderr for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"))
    variables |= {"LOCAL_RANK": "0"}
    lost = subprocess.run(
        [sys.executable, "-m", "glassgpt", "train", "demo"], env=variables, capture_output=True, text=True, cwd=tmp_path
    )
    assert lost.returncode == 2
    assert "MASTER_ADDR" in lost.stderr
    assert "Traceback" not in lost.stderr
