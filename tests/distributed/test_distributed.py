"""Several ranks: the same numbers as one process, no lost runs, and failures that name the rank.

Real processes with gloo, forked by `rank_harness.py`; a few tests start torchrun itself. The unmarked tests are the
fast core.
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

# Equal on other numbers of processes: float32 sums in another order, over up to 50 steps.
TOLERANCE = 1e-5
# Twelve sequences a step: 1, 2, 3 and 4 processes divide them.
BATCH = {"batch_tokens": 192, "eval_every": 0, "checkpoint_every": 0, "sample": {"count": 0}}


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """The program that forks ranks."""
    started = Harness()
    yield started
    started.close()


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run's config as the harness takes it."""
    return tiny_config(text, **{**BATCH, **changes}).to_dict()


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in records_of(run) if "loss" in record]


def norms_by_part(run: Path) -> dict[tuple[int, str, str], float]:
    """Norms of gradients and weights at each evaluation."""
    kinds, evaluations = ("grad_norms", "weight_norms"), [record for record in records_of(run) if "val_loss" in record]
    return {
        (r["step"], kind, part): norm for r in evaluations for kind in kinds for part, norm in r.get(kind, {}).items()
    }


def last_weights(run: Path) -> dict[str, Any]:
    return safetensors.torch.load_file(checkpoint_paths(run / "checkpoints")[-1] / "model.safetensors")


def status_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())  # type: ignore[no-any-return]


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two models' weights, the keys' biases aside: their gradient is zero but for
    rounding."""
    assert one.keys() == other.keys()
    largest = 0.0
    for name, tensor in one.items():
        difference = (tensor.double() - other[name].double()).abs()
        if name.endswith("qkv.bias"):
            third = len(difference) // 3
            difference[third : 2 * third] = 0
        largest = max(largest, float(difference.max()))
    return largest


# Equal


def test_weights_before_the_first_update_are_the_same_bits_everywhere(harness: Harness, text: Path) -> None:
    config = settings(text, model={"n_layer": 2, "n_embd": 24, "n_head": 3})
    (one,) = harness.run(0, "first_weights", config=config)
    for size, strategy in ((1, "fsdp"), (2, "ddp"), (4, "fsdp")):
        found = harness.run(size, "first_weights", config={**config, "strategy": strategy})
        assert found == [one] * size, (size, strategy)


def test_one_rank_of_each_host_goes_first_and_all_hosts_wait_for_them(harness: Harness) -> None:
    """Without torchrun's GROUP_RANK, as under srun and mpirun."""
    slow, second, other_host = harness.run(3, "times_in_main_process_first", places=[("a", 0), ("a", 1), ("b", 0)])
    assert slow["left"] < second["entered"]
    assert slow["left"] < other_host["continued"]


def test_ddp_draws_no_numbers_from_the_global_generator(tmp_path: Path) -> None:
    """Its two passes before training have dropout."""
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
        pytest.param("muon", True, [(3, "ddp"), (2, "fsdp")], id="muon accumulated"),
    ],
)
def test_fifty_steps_are_the_same_on_any_number_of_processes(
    harness: Harness, tmp_path: Path, text: Path, optimizer: str, accumulated: bool, processes: list[tuple[int, str]]
) -> None:
    """Losses and gradient norms to 1e-5 relative, weights to 1e-5: DDP and FSDP, Muon on sharded fused matrices
    included."""
    config = settings(
        text,
        model=MODERN if optimizer == "muon" else {},
        optim={"name": optimizer, "lr": 1e-2 if optimizer == "adamw" else 8e-3, "grad_clip": 0.83},
        steps=50,
        micro_batch_size=2 if accumulated else 12,
    )
    harness.run(0, "train", config=config, out=tmp_path / "one")
    one = tmp_path / "one"
    norms = [record["grad_norm"] for record in records_of(one) if "grad_norm" in record]
    by_part = norms_by_part(one)
    assert losses_of(one)[-1] < 0.8 * losses_of(one)[0]  # it learns, so equality says something
    assert max(norms) > 0.83 > min(norms)  # and so does clipping
    for size, strategy in processes:
        run = tmp_path / f"{strategy}{size}"
        harness.run(size, "train", config={**config, "strategy": strategy}, out=run)
        assert losses_of(run) == pytest.approx(losses_of(one), rel=TOLERANCE), run.name
        assert [r["grad_norm"] for r in records_of(run) if "grad_norm" in r] == pytest.approx(
            norms, rel=20 * TOLERANCE
        ), run.name
        assert norms_by_part(run) == pytest.approx(by_part, rel=20 * TOLERANCE), run.name
        assert farthest(last_weights(run), last_weights(one)) < TOLERANCE, run.name


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_fsdp_gradients_summed_once_per_update_are_those_of_each_micro_step(
    harness: Harness, tmp_path: Path, text: Path, precision: str
) -> None:
    """Three micro-steps per rank; another order of sums."""
    config = settings(text, steps=4, micro_batch_size=2, strategy="fsdp", precision=precision)
    for sync in ("micro_step", "update"):
        harness.run(2, "train", config={**config, "fsdp_gradient_sync": sync}, out=tmp_path / sync)
    assert losses_of(tmp_path / "update") == pytest.approx(losses_of(tmp_path / "micro_step"), rel=1e-6)
    assert farthest(last_weights(tmp_path / "update"), last_weights(tmp_path / "micro_step")) < 1e-6


def test_dropout_is_drawn_by_micro_batch_whichever_rank_has_it(harness: Harness, tmp_path: Path, text: Path) -> None:
    config = settings(text, model={"dropout": 0.2}, steps=5, micro_batch_size=3)
    for size in (0, 2, 4):
        harness.run(size, "train", config=config, out=tmp_path / str(size))
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "0"), rel=TOLERANCE)
    assert losses_of(tmp_path / "4") == pytest.approx(losses_of(tmp_path / "0"), rel=TOLERANCE)


def test_a_batch_that_the_processes_do_not_divide_is_refused_with_the_nearest(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    harness.start(2, "train", config=settings(text, batch_tokens=16 * 5), out=tmp_path / "run")
    ended = harness.results()
    assert [each.status != 0 for each in ended] == [True, True]
    (line,) = error_lines(ended)  # of one of them
    assert "2 processes" in line
    assert "64 or 96" in line
    assert not (tmp_path / "run" / "config.toml").exists()


def test_the_nearest_batches_that_work_do_work() -> None:
    config = tiny_config(Path("text.txt"), batch_tokens=80)
    for processes in (2, 3, 4, 7):
        with pytest.raises(UserError) as caught:
            config.sequences_per_process(processes)
        for number in re.findall(r"\d+", str(caught.value).partition("nearest")[2]):
            assert config.override(batch_tokens=int(number)).sequences_per_process(processes) >= 1
    with pytest.raises(UserError, match="batch_start = 32"):
        config.override(batch_tokens=64, batch_start=32).sequences_per_process(4)


ITEM = {"ctx": "the quick brown", "endings": ["fox jumps", "dog", "over a lazy dog while", "my big sphinx"], "label": 0}


def test_every_rank_evaluates_its_share_and_all_get_the_figures_of_one(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    """A split of few windows with a remainder, shares that are empty, HellaSwag batches that come out unevenly."""
    items = tmp_path / "items.jsonl"
    rows = [
        {**ITEM, "ind": i, "ctx": " ".join(["the quick brown"] * (1 + i % 3)), "activity_label": "x"} for i in range(7)
    ]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(text, model={"context_length": 64}, batch_tokens=64 * 12)
    for limit in (None, 1):
        (one,) = harness.run(0, "evaluate", config=config, limit=limit, items=items, count=7)
        for size, strategy in ((2, "ddp"), (3, "fsdp")):
            for found in harness.run(
                size, "evaluate", config={**config, "strategy": strategy}, limit=limit, items=items, count=7
            ):
                assert found["hellaswag"] == one["hellaswag"]
                # The same losses, added up in float64 in another order.
                assert found["loss"] == pytest.approx(one["loss"], rel=1e-13)
    assert one["loss"]["tokens"] == 1


@pytest.mark.slow
def test_two_runs_in_one_process(harness: Harness, tmp_path: Path, text: Path) -> None:
    harness.run(2, "train_twice", config=settings(text, steps=3), outs=[tmp_path / "a", tmp_path / "b"])
    assert differences(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.slow
def test_sharded_training_in_bfloat16_is_that_of_autocast_up_to_rounding(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    """Blocks are gathered in bfloat16; the residual stream and the sums of the gradients stay in float32, as under
    DDP."""
    config = settings(text, steps=10, precision="bfloat16")
    for strategy in ("ddp", "fsdp"):
        harness.run(2, "train", config={**config, "strategy": strategy}, out=tmp_path / strategy)
    assert losses_of(tmp_path / "fsdp") == pytest.approx(losses_of(tmp_path / "ddp"), rel=2e-4)


@pytest.mark.slow
def test_offloading_to_the_host_computes_the_same(harness: Harness, tmp_path: Path, text: Path) -> None:
    """A smoke test: on a CPU there is nowhere to move anything to."""
    config = settings(text, steps=3, strategy="fsdp")
    for offload in (False, True):
        harness.run(2, "train", config={**config, "cpu_offload": offload}, out=tmp_path / str(offload))
    assert losses_of(tmp_path / "True") == losses_of(tmp_path / "False")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_recomputed_and_compiled_blocks_train_alike(
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
    plain = losses_of(tmp_path / "plain")
    assert losses_of(tmp_path / "selective") == plain
    assert losses_of(tmp_path / "full") == plain
    assert losses_of(tmp_path / "compiled") == pytest.approx(plain, rel=1e-6)
    # What the first rank looks into before the first update is the same model, whole.
    assert len({probes_of(tmp_path / name)["000000.safetensors"] for name in variants}) == 1
    harness.run(0, "train", config={**config, "strategy": "auto", "steps": 1}, out=tmp_path / "one")
    assert probes_of(tmp_path / "one")["000000.safetensors"] == probes_of(tmp_path / "plain")["000000.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "full"), ("fsdp", "none"), ("fsdp", "full")])
def test_blocks_are_compiled_under_each_strategy(
    harness: Harness, tmp_path: Path, text: Path, strategy: str, kind: str
) -> None:
    """Hooks around a block and recomputation in it both may keep the compiler away, without a word."""
    config = settings(text, steps=2, model={"n_layer": 2}, activation_checkpointing=kind, strategy=strategy)
    found = harness.run(2, "compiled_operators", config=config, out=tmp_path / "run")
    assert min(found) >= 15  # a block has some twenty


# Unbreakable


@pytest.mark.slow
def test_one_two_four_two_one_process_and_both_strategies_in_one_chain(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    """Saved on N processes, resumed on M: the chain's losses are those of the run that never stopped."""
    config = settings(
        text, steps=25, optim={"name": "muon", "lr": 8e-3, "schedule": "constant"}, eval_every=5, checkpoint_every=5
    )
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    harness.run(0, "train", config=config, out=whole)
    harness.run(0, "train", config={**config, "steps": 5}, out=chain)
    for size, steps, strategy in ((2, 10, "ddp"), (4, 15, "fsdp"), (2, 20, "fsdp"), (0, 25, "auto")):
        harness.run(size, "resume", run=chain, steps=steps, strategy=strategy)
        assert status_of(chain)["processes"] == max(1, size)
    assert losses_of(chain) == pytest.approx(losses_of(whole), rel=TOLERANCE)
    validation = [[r["val_loss"] for r in records_of(run) if "val_loss" in r] for run in (chain, whole)]
    assert validation[0] == pytest.approx(validation[1], rel=TOLERANCE)
    assert farthest(last_weights(chain), last_weights(whole)) < TOLERANCE
    assert checkpoint_paths(chain / "checkpoints")[-1].name == "000025"


@pytest.mark.parametrize(("size", "strategy"), [(3, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.slow)])
def test_after_a_preemption_on_one_rank_the_run_resumes_to_the_same_bits(
    harness: Harness, tmp_path: Path, text: Path, size: int, strategy: str
) -> None:
    """SIGTERM to the last rank, twice, as from a scheduler and torchrun. All ranks save the same step and exit 0."""
    changes: dict[str, Any] = {
        "model": {"dropout": 0.1},
        "optim": {"name": "muon"},
        "steps": 12,
        "eval_every": 4,
        "checkpoint_every": 4,
    }
    config = {**settings(text, **changes), "strategy": strategy}
    whole, run = tmp_path / "whole", tmp_path / "run"
    harness.run(size, "train", config=config, out=whole)
    harness.run(size, "train_with_faults", faults={"preempted": {"rank": size - 1, "step": 6}}, config=config, out=run)
    status = status_of(run)
    assert (status["state"], status["step"], status["processes"]) == ("preempted", 6, size)
    assert open_checkpoint(run / "checkpoints" / "000006").state.step == 6
    harness.run(size, "resume", run=run)
    assert status_of(run)["state"] == "finished"
    assert differences(whole, run) == []


def error_lines(ended: list[RankResult]) -> list[str]:
    return [line for each in ended for line in each.errors.splitlines() if "error: " in line]


def run_with_fault(
    harness: Harness,
    size: int,
    patch: str,
    config: dict[str, Any],
    out: Path,
    also: dict[str, Any] | None = None,
    **options: Any,
) -> list[RankResult]:
    """How the ranks of a run end in which something goes wrong; a hang is noticed after 2 seconds."""
    environment = {"GLASSGPT_HANG_SECONDS": "2"}
    faults = {patch: options} | (also or {})
    harness.start(size, "train_with_faults", environment=environment, faults=faults, config=config, out=out)
    return harness.results()


@pytest.mark.parametrize(
    ("rank", "kind", "words"),
    [
        (0, "KeyError", "a thing that nobody expected"),
        (2, "KeyError", "a thing that nobody expected"),
        # Under gloo a lost connection is a RuntimeError as well; this one is the rank's own failure.
        (1, "RuntimeError", "cannot read /data/gloo/connection closed by peer"),
    ],
)
def test_an_exception_on_any_rank_ends_all_and_names_the_rank(
    harness: Harness, tmp_path: Path, text: Path, rank: int, kind: str, words: str
) -> None:
    options: dict[str, Any] = {"rank": rank, "step": 4, "kind": kind, "words": words}
    ended = run_with_fault(harness, 3, "raising", settings(text), tmp_path / "run", **options)
    assert all(each.status == 1 for each in ended)
    assert [line.partition(" (")[0] for line in error_lines(ended)] == [f"glassgpt: error: rank {rank} of 3"]
    assert kind in error_lines(ended)[0]
    assert words in error_lines(ended)[0]
    assert "Traceback" in ended[rank].errors  # a defect keeps it, on its own rank
    assert all("Traceback" not in each.errors for number, each in enumerate(ended) if number != rank)
    status = status_of(tmp_path / "run")
    assert status["state"] == "failed"
    assert f"rank {rank} of 3" in status["error"] or rank == 0


@pytest.mark.parametrize(("kind", "rank"), [("stuck", 0), ("stopped", 1), ("stuck_in_forward", 1)])
def test_a_rank_that_hangs_is_named(harness: Harness, tmp_path: Path, text: Path, kind: str, rank: int) -> None:
    ended = run_with_fault(harness, 2, kind, settings(text), tmp_path / "run", rank=rank, step=3)
    (line,) = error_lines(ended)
    assert re.search(rf"error: rank {rank} \(.*process \d+\) is missing: ", line), line
    # A stopped process reported up to a second before it was stopped.
    assert {"stuck": "update 2", "stopped": "last seen at", "stuck_in_forward": "of update 3"}[kind] in line
    assert ended[1 - rank].status == 1
    assert ended[rank].status in (1, -signal.SIGKILL)  # a stopped process cannot end: torchrun kills it


def test_a_rank_that_hangs_in_an_evaluation_is_named(harness: Harness, tmp_path: Path, text: Path) -> None:
    ended = run_with_fault(harness, 2, "stuck_in_evaluation", settings(text), tmp_path / "run", rank=1)
    (line,) = error_lines(ended)
    assert re.search(r"error: rank 1 \(.*\) is missing: at the evaluation of step 0 for", line), line


@pytest.mark.slow
def test_if_no_rank_makes_progress_all_phases_are_named(harness: Harness, tmp_path: Path, text: Path) -> None:
    """A single rank: nobody waits for it."""
    faults = {"stuck_in_forward": {"rank": 0, "step": 3}}
    ended = run_with_fault(
        harness, 1, "stuck_in_forward", settings(text), tmp_path / "run", also=faults, rank=0, step=3
    )
    (line,) = error_lines(ended)
    assert re.search(r"no rank .* GLASSGPT_HANG_SECONDS.*: rank 0 \(.*\) at micro-batch 1 of update 3", line), line


def test_a_killed_rank_is_named(harness: Harness, tmp_path: Path, text: Path) -> None:
    ended = run_with_fault(harness, 2, "killed", settings(text), tmp_path / "run", rank=1, step=3)
    assert ended[1].status == -signal.SIGKILL
    assert ended[0].status == 2
    (line,) = error_lines(ended)
    assert "rank 0 of 2" in line
    assert re.search(r"lost the connection to rank 1 \(.*process \d+\)", line)
    assert "Traceback" not in ended[0].errors
    assert status_of(tmp_path / "run")["state"] == "failed"


def test_a_finished_run_stays_finished_if_a_rank_is_lost_afterwards(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    ended = run_with_fault(harness, 2, "killed_at_the_end", settings(text, steps=3), tmp_path / "run", rank=1)
    assert [each.status for each in ended] == [2, -signal.SIGKILL]
    (line,) = error_lines(ended)
    assert "lost the connection to rank 1" in line
    assert status_of(tmp_path / "run")["state"] == "finished"


@pytest.mark.parametrize(("what", "strategy"), [("loss", "ddp"), ("gradient", "fsdp")])
def test_a_number_that_is_not_finite_on_one_rank_stops_all(
    harness: Harness, tmp_path: Path, text: Path, what: str, strategy: str
) -> None:
    """The run ends with the last good checkpoint, and resumes from it to the same bits."""
    config = {**settings(text, steps=8, checkpoint_every=3), "strategy": strategy}
    whole, run = tmp_path / "whole", tmp_path / "run"
    harness.run(2, "train", config=config, out=whole)
    ended = run_with_fault(harness, 2, "non_finite_loss_or_gradient", config, run, rank=1, step=5, what=what)
    assert all(each.status in (1, 2) for each in ended)
    (line,) = error_lines(ended)
    assert "step 5: the loss is" in line
    assert ("on rank 1" in line) == (what == "loss")
    assert "nonfinite-000005.json" in line
    assert (run / "nonfinite-000005.json").is_file()
    assert [path.name for path in checkpoint_paths(run / "checkpoints")] == ["000003"]
    harness.run(2, "resume", run=run)
    assert differences(whole, run) == []


@pytest.mark.slow
def test_a_run_that_fails_finishes_the_save_in_progress(harness: Harness, tmp_path: Path, text: Path) -> None:
    """Rank 1 fails while rank 0 writes."""
    run = tmp_path / "run"
    config = settings(text, checkpoint_every=4)
    ended = run_with_fault(
        harness, 2, "raising", config, run, also={"slow_save": {"step": 4, "seconds": 2.0}}, rank=1, step=5
    )
    assert all(each.status for each in ended)
    assert [path.name for path in checkpoint_paths(run / "checkpoints")] == ["000004"]
    open_checkpoint(run / "checkpoints" / "000004")


@pytest.mark.parametrize(("size", "number"), [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_in_the_last_save_does_not_lose_it(
    harness: Harness, tmp_path: Path, text: Path, size: int, number: int
) -> None:
    run = tmp_path / "run"
    ended = run_with_fault(harness, size, "slow_save", settings(text, steps=3), run, step=3, seconds=1.0, number=number)
    assert [each.status for each in ended] == [0] * max(1, size), ended[0].errors
    assert status_of(run)["state"] == "finished"
    open_checkpoint(run / "checkpoints" / "000003")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_signal_does_not_cut_the_save_short(harness: Harness, tmp_path: Path, text: Path, rank: int) -> None:
    """One second after the first, when the rank has left the loop, or waits for the rank that writes."""
    run, slow = tmp_path / "run", {"slow_save": {"step": 5, "seconds": 2.0}}
    ended = run_with_fault(
        harness, 2, "preempted", settings(text, steps=9), run, also=slow, rank=rank, step=5, again=1.0
    )
    assert [each.status for each in ended] == [0, 0], ended[0].errors + ended[1].errors
    assert (status_of(run)["state"], status_of(run)["step"]) == ("preempted", 5)
    open_checkpoint(run / "checkpoints" / "000005")


@pytest.mark.slow
def test_a_full_disk_in_the_middle_of_a_save_is_named_and_the_save_before_stays(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    config = settings(text, steps=40, checkpoint_every=3)
    whole, run = tmp_path / "whole", tmp_path / "run"
    harness.run(2, "train", config=config, out=whole)
    ended = run_with_fault(harness, 2, "full_disk", config, run, save=2)
    (line,) = error_lines(ended)
    assert "rank 0 of 2" in line
    assert "checkpoints/000006" in line
    assert "disk is full" in line
    assert all(each.status in (1, 2) for each in ended)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000003"]
    assert status_of(run)["state"] == "failed"
    harness.run(2, "resume", run=run)
    assert differences(whole, run) == []


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("other_code", r"rank 1 \(.*\) and rank 0 \(.*\) differ in version of the code"),
        ("other_data", r"rank 1 \(.*\) and rank 0 \(.*\) differ in data"),
        ("missing_data", r"rank 1 of 2 \(.*\): the dataset /data is damaged: train_000001\.bin is missing"),
    ],
)
def test_a_rank_with_other_code_or_data_is_named(
    harness: Harness, tmp_path: Path, text: Path, patch: str, words: str
) -> None:
    source: dict[str, Any] = (
        {"source": str(write_text(tmp_path / "other.txt", seed=1))} if patch == "other_data" else {}
    )
    ended = run_with_fault(harness, 2, patch, settings(text), tmp_path / "run", rank=1, **source)
    (line,) = error_lines(ended)
    assert re.search(words, line)
    assert all(each.status in (1, 2) for each in ended)
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.slow
def test_a_second_job_on_the_same_directory_is_refused(harness: Harness, tmp_path: Path, text: Path) -> None:
    harness.run(2, "train", config=settings(text, steps=2), out=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    harness.start(2, "train", config=settings(text, steps=2), out=tmp_path / "run")
    (line,) = error_lines(harness.results())
    assert str(tmp_path / "run") in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_new_request_is_not_mistaken_for_a_restart(harness: Harness, tmp_path: Path, text: Path) -> None:
    """If a rendezvous id is used again, the same request resumes, but not with --overwrite; another request is refused,
    or replaces the run with --overwrite."""
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
        ended = harness.results()
        assert ended[0].status == (2 if error else 0), ended[0].errors
        assert error in ended[0].errors
    assert len(losses_of(run)) == 4
    (run / "status.json").write_text("")
    variables = {**environment, "TORCHELASTIC_RESTART_COUNT": "1"}
    harness.start(2, "train", environment=variables, config=settings(text, steps=4), out=run, overwrite=True)
    (line,) = error_lines(harness.results())
    assert "status.json" in line
    assert "--resume" in line
    assert len(checkpoint_paths(run / "checkpoints")) == 1  # nothing was removed
    harness.run(2, "resume", run=run)
    assert status_of(run)["state"] == "finished"  # which a kill had kept from being written, say


def test_resuming_on_processes_that_do_not_divide_the_batch_names_those_that_do(
    harness: Harness, tmp_path: Path, text: Path
) -> None:
    harness.run(0, "train", config=settings(text, steps=2, batch_tokens=64), out=tmp_path / "run")
    harness.start(3, "resume", run=tmp_path / "run", steps=4)
    (line,) = error_lines(harness.results())
    assert "3 processes" in line
    assert "1, 2, 4" in line


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_named_and_the_run_resumes_from_the_one_before(
    harness: Harness, tmp_path: Path, text: Path, harm: str
) -> None:
    config = settings(text, steps=9, checkpoint_every=3)
    whole, run = tmp_path / "whole", tmp_path / "run"
    for out in (whole, run):
        harness.run(2, "train", config={**config, "steps": 9}, out=out)
    weights = run / "checkpoints" / "000009" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content) if harm == "flip" else bytes(content[:-1]))
    harness.start(2, "resume", run=run)
    ended = harness.results()
    assert [each.status for each in ended] == [0, 0]
    assert "000009" in ended[0].errors
    assert "model.safetensors" in ended[0].errors
    assert differences(whole, run) == []


# Torchrun


def test_a_launcher_that_does_not_set_local_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise all ranks of a host would take its first GPU."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK"), process_group():
        pass


@pytest.mark.slow
def test_ranks_that_are_killed_under_torchrun_restart_and_end_with_the_same_bits() -> None:
    """Three ranks, a kill each between steps, in a save and in an evaluation. `benchmarks/rank_kills.py` has 20 of
    them."""
    harness = Path(__file__).parents[1] / "torchrun_harness.py"
    result = subprocess.run(
        [sys.executable, str(harness), "--ranks", "3", "--kills", "3", "--seed", "5"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["kills"] == {"step": 1, "save": 1, "evaluation": 1}
    assert (outcome["differences"], outcome["steps_lost"], outcome["left_behind"]) == ([], [], [])


@pytest.mark.slow
def test_the_command_line_under_torchrun_prints_once(tmp_path: Path, text: Path) -> None:
    """Errors in the options are printed by the first rank; other commands are refused."""
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
    del variables["LOCAL_RANK"]  # srun and mpirun set variables of their own
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
