"""Memory formulas equal the bytes that PyTorch keeps and creates on the CPU; the memory check before training."""

import re
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.planning import memory as memory_module
from glassgpt.planning.memory import (
    Memory,
    block_activations,
    bytes_sent_per_update,
    check_memory,
    largest_micro_batch,
    loss_working,
    memory_per_rank,
    moments,
    with_vocabulary,
)
from glassgpt.tokenizers.builtin import build_tokenizer
from glassgpt.training.optim import build_adamw
from glassgpt.utils.device import autocast
from glassgpt.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

CPU = torch.device("cpu")
B, T, C, H = 2, 64, 64, 4
BASE: dict[str, Any] = {"vocab_size": 65, "context_length": T, "n_layer": 3, "n_head": H, "n_embd": C}
SHAPES: list[dict[str, Any]] = [
    {},
    {"attention": "explicit"},
    {"bias": False, "norm": "rmsnorm", "position": "rope", "qk_norm": True, "activation": "swiglu", "n_kv_head": 2},
    {"activation": "relu_squared", "n_inner": 40, "head_dim": 6},
    {"window": 16, "window_globals": 2},
    {"dropout": 0.1, "activation": "silu"},
]
EACH = pytest.mark.parametrize("changes", SHAPES, ids=str)
PRECISION = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
GPT2 = recipe("gpt2", model={"vocab_size": 50257}, batch_tokens=16 * 1024, device="cpu")


def config(model: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    shape = ModelConfig(**(BASE | (model or {})))
    return TrainConfig(model=shape, steps=1, batch_tokens=8 * T, micro_batch_size=B, device="cpu").override(**changes)


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the living storages that were created inside the context, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._storages((args, kwargs)):
            self._seen.add(storage)  # created outside the context
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage not in self._seen:
                self._seen.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, count: int) -> None:
        self.bytes -= count

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@EACH
@PRECISION
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_the_estimated_peak_of_an_update_is_near_that_of_real_tensors(
    changes: dict[str, Any], precision: str, kind: str
) -> None:
    """The estimate is within 15 % at this size, where small tensors that the formulas leave out have the largest share.

    For whole runs on a CPU it is within 10 % (see docs/measured/performance.md).
    """
    run = config(changes, activation_checkpointing=kind)
    model = GPT.create(run.model, 0).train()
    for block in model.blocks:
        checkpoint_activations(block, kind)
    ids = torch.zeros(B, T, dtype=torch.int64)
    with AllocationTracker() as tracker:
        for _ in range(2):  # the second micro-step adds to the gradients of the first
            tracker.peak = 0
            with autocast(CPU, precision):
                loss = model(ids, ids)
            loss.backward()
    state = memory_per_rank(run, 1, "single", precision)
    expected = state.total - state.weights - state.optimizer
    assert expected == pytest.approx(tracker.peak, rel=0.15)


@PRECISION
def test_activations_of_a_gpt2_block_equal_the_docs(precision: str) -> None:
    """Without checkpointing, a block keeps 8 C + 14 e C + 4 H + 16 bytes per token, e being the bytes of a value.

    Selective checkpointing keeps the outputs of matrix products and attention; full checkpointing keeps only the input.
    """
    e = 2 if precision == "bfloat16" else 4
    kept = {kind: block_activations(GPT2, 1, precision, kind) for kind in ("none", "selective", "full")}
    assert kept["none"] == 8 * 768 + 14 * e * 768 + 4 * 12 + 16
    assert kept["selective"] == 4 * 768 + 10 * e * 768 + 4 * 12
    assert kept["full"] == 4 * 768


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@PRECISION
def test_working_memory_of_the_loss_equals_the_docs(name: str, device: str, precision: str) -> None:
    run = recipe(name, model={"vocab_size": 50257}, device=device)
    N, C, V = 2 * 1024, run.model.n_embd, 50304
    logits = 2**24 // V * V if device == "cpu" else N * V
    products = 4 * logits + 4 * (4096 if device == "cpu" else V) * C
    if precision == "bfloat16":
        products = 2 * (N + V) * C + 6 * logits
    assert loss_working(run, N, precision) == N * (8 * C + 8) + 4 * V * C + products


@EACH
def test_weights_gradients_and_optimizer_equal_those_of_a_model(changes: dict[str, Any]) -> None:
    run = config(changes)
    model = GPT.create(run.model, 0)
    optimizer = build_adamw(list(model.parameters()), run.optim)
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    adamw = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    need = memory_per_rank(run, 1, "single", "float32")
    assert need.weights == sum(p.nbytes for p in model.parameters())
    assert need.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert need.optimizer == adamw


def test_muon_keeps_one_moment_per_matrix() -> None:
    summary = ModelSummary(config().model)
    matrices = config().model.n_layer * summary.block_matrices
    adamw, muon = (
        memory_per_rank(config(optim={"name": n}), 1, "single", "float32").optimizer for n in ("adamw", "muon")
    )
    assert adamw - muon == 4 * matrices


def test_ddp_replicates_and_fsdp_shards() -> None:
    one, ddp, fsdp = (memory_per_rank(config(), *c, "float32") for c in ((1, "single"), (4, "ddp"), (2, "fsdp")))
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (one.weights, one.gradients, one.optimizer)
    assert ddp.gathered == 0 < fsdp.gathered
    for component in ("weights", "gradients", "optimizer"):
        assert 2 * getattr(fsdp, component) == pytest.approx(getattr(one, component), abs=16)


def test_gradients_do_not_count_at_the_peak_with_one_micro_step() -> None:
    """The first backward pass creates them after the peak at the loss, except in DDP, whose buckets always exist."""
    for strategy, expected in (("ddp", 1), ("fsdp", 0)):
        peak = moments(config(), 4, strategy, "float32")
        assert peak["loss"].gradients == expected * peak["loss"].weights
        assert peak["embedding"].gradients == peak["update"].gradients == peak["loss"].weights


def test_the_total_is_the_sum_at_the_peak() -> None:
    assert Memory(1, 2, 4, 8, 16, 32, 64).total == 127
    for strategy in ("ddp", "fsdp"):
        for run in (config(), config(optim={"name": "muon"}), config(activation_checkpointing="full")):
            totals = [memory.total for memory in moments(run, 2, strategy, "bfloat16").values()]
            assert memory_per_rank(run, 2, strategy, "bfloat16").total == max(totals)


@PRECISION
def test_dropout_stores_attention_weights_only_on_a_cpu(precision: str) -> None:
    """Fused GPU kernels generate the dropout mask again in the backward pass.

    The CPU has no fused kernel with dropout, and the formula that replaces it stores the attention weights.
    """
    kept = {
        (device, dropout): memory_per_rank(
            GPT2.override(device=device, model={"dropout": dropout}, micro_batch_size=2), 1, "single", precision
        ).activations
        for device in ("cpu", "cuda")
        for dropout in (0.0, 0.1)
    }
    weights, residual = 12 * 2 * 12 * 1024**2, 3 * 12 * 2 * 1024 * 768 * 4  # layers, sequences, heads, T x T; masks
    assert kept["cpu", 0.1] > kept["cpu", 0.0] + 2 * weights
    assert kept["cuda", 0.0] < kept["cuda", 0.1] < kept["cuda", 0.0] + residual


def test_bytes_sent_per_update_equal_sums_by_hand() -> None:
    """GPT-2 has 124,475,904 parameters, 7,087,872 of them per block; 8 ranks take 4 micro-steps of 16 sequences."""
    run = recipe("gpt2", model={"vocab_size": 50257})
    P, blocks = 124_475_904, 12 * 7_087_872
    assert run.micro_steps(8) == 4
    assert bytes_sent_per_update(run, 8, "ddp", "bfloat16") == 2 * 4 * P * 7 // 8
    assert bytes_sent_per_update(run, 8, "fsdp", "bfloat16") == 4 * (2 * 2 * blocks + 4 * (P - blocks) + 4 * P) * 7 // 8
    assert bytes_sent_per_update(run, 8, "fsdp", "float32") == 4 * (2 * 4 * blocks + 4 * (P - blocks) + 4 * P) * 7 // 8
    once = run.override(fsdp_gradient_sync="update")
    assert (
        bytes_sent_per_update(once, 8, "fsdp", "bfloat16") == (4 * (2 * 2 * blocks + 4 * (P - blocks)) + 4 * P) * 7 // 8
    )
    assert memory_per_rank(once, 8, "fsdp", "bfloat16").gradients == 4 * P
    assert bytes_sent_per_update(run, 1, "ddp", "float32") == 0


@pytest.mark.parametrize(
    ("processes", "micro_batch_size", "expected"), [(1, 16, (8, 1, 8)), (2, 3, (4, 2, 2)), (1, 3, (8, 3, 3))]
)
def test_batches_are_divided_into_micro_steps_like_in_training(
    processes: int, micro_batch_size: int, expected: tuple[int, int, int]
) -> None:
    run = config(micro_batch_size=micro_batch_size)
    sequences, micro_steps = run.sequences_per_process(processes), run.micro_steps(processes)
    assert (sequences, micro_steps, run.micro_batch(processes)) == expected
    assert len(torch.zeros(sequences).tensor_split(micro_steps)[0]) == run.micro_batch(processes)
    with pytest.raises(UserError, match="3 processes"):
        memory_per_rank(config(), 3, "ddp", "float32")


def cells(line: str) -> list[Any]:
    """Return the cells of a table's row; numbers with two decimals may differ by 0.011, one unit of rounding."""
    texts = [cell.strip("* ").replace(",", "") for cell in line.strip("|").split("|")]
    return [pytest.approx(float(t), abs=0.011) if re.fullmatch(r"[\d.]+", t) else t for t in texts]


def test_the_tables_in_the_docs_equal_those_of_the_benchmark() -> None:
    from scale import tables  # benchmarks/scale.py

    page = (ROOT / "docs" / "measured" / "scale.md").read_text(encoding="utf-8")
    in_docs = [cells(row) for row in page.splitlines() if row.startswith("| gpt2")]
    in_code = [cells(row) for table in tables().values() for row in table.splitlines() if row.startswith("| gpt2")]
    rows = [[cell.expected if hasattr(cell, "expected") else cell for cell in row] for row in in_code]
    assert [row for row in rows if row not in in_docs] == [], "run python benchmarks/scale.py --table"


# --- the check before training ----------------------------------------------------------------------------------------


def set_free_memory(count: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the memory check see this many free bytes; None means unknown."""
    monkeypatch.setattr(memory_module, "available_memory", lambda device, swap=False: count and int(count))


@given(st.integers(1, 60), st.floats(0, 90), st.floats(0, 30))
def test_the_largest_micro_batch_equals_an_exhaustive_search(share: int, free: float, gradients: float) -> None:
    """The search tries all even divisions.

    The memory needed grows with the micro-batch, and by the gradients if there are several micro-steps.
    """
    run = GPT2.override(batch_tokens=share * 1024)

    def need(changed: TrainConfig) -> float:
        return changed.micro_batch_size + (gradients if changed.micro_batch_size < share else 0)

    sizes = {-(-share // steps) for steps in range(1, share + 1)}
    expected = max((size for size in sizes if need(run.override(micro_batch_size=size)) <= free), default=None)
    assert largest_micro_batch(run, 1, need, free) == expected


def test_a_run_that_does_not_fit_is_refused_and_the_message_names_a_micro_batch_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5 GB are free; GPT-2's weights and optimizer take 2.0 GB, and an update of one sequence needs 3.0 GB."""
    set_free_memory(5e9, monkeypatch)
    message = check_memory(GPT2, 1, CPU, "float32")
    assert message is not None
    match = re.search(r"needs 11\.\d\d GB .*5\.00 GB free; .*--micro-batch-size (\d+)", message)
    assert match is not None
    size = int(match[1])
    assert check_memory(GPT2.override(micro_batch_size=size), 1, CPU, "float32") is None
    resumed = GPT2.override(micro_batch_size=size, init_from="runs/since-removed")
    assert check_memory(resumed, 1, CPU, "float32") is None
    assert memory_per_rank(GPT2.override(micro_batch_size=size), 1, "single", "float32").total < 5e9
    assert memory_per_rank(GPT2.override(micro_batch_size=2 * size), 1, "single", "float32").total > 0.9 * 5e9


def test_a_run_that_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need = memory_per_rank(GPT2, 1, "single", "float32").total
    set_free_memory(need, monkeypatch)
    assert check_memory(GPT2, 1, CPU, "float32") is None
    set_free_memory(0.94 * need, monkeypatch)
    assert check_memory(GPT2, 1, CPU, "float32") is not None
    compiled = GPT2.override(compile="on")  # a compiler may save memory, so the check is less strict
    set_free_memory(0.9 * need, monkeypatch)
    assert check_memory(compiled, 1, CPU, "float32") is None
    set_free_memory(0.2 * need, monkeypatch)
    assert check_memory(compiled, 1, CPU, "float32") is not None
    set_free_memory(None, monkeypatch)  # the free memory is unknown on MPS
    assert check_memory(GPT2, 1, torch.device("mps"), "float32") is None


def test_the_processes_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    need = memory_per_rank(GPT2, 2, "ddp", "float32").total
    set_free_memory(1.5 * need, monkeypatch)
    assert check_memory(GPT2, 2, CPU, "float32") is None
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    message = check_memory(GPT2, 2, CPU, "float32")
    assert message is not None
    assert "each process" in message


@pytest.mark.parametrize("kind", ["none", "full"])
def test_if_no_micro_batch_fits_the_message_suggests_other_changes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_memory(1e9, monkeypatch)
    message = check_memory(GPT2.override(activation_checkpointing=kind), 1, CPU, "float32")
    assert message is not None
    assert "--micro-batch-size" not in message
    assert "smaller model" in message
    assert ("--activation-checkpointing full" in message) == (kind == "none")


def test_an_unknown_vocabulary_size_comes_from_the_tokenizers_file_or_is_a_typical_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_free_memory(1e9, monkeypatch)
    assert check_memory(recipe("gpt2"), 1, CPU, "float32") is not None
    (tmp_path / "bytes.json").write_text(build_tokenizer("bytes").to_json(), encoding="utf-8")
    config = recipe("gpt2", data={"tokenizer": str(tmp_path / "bytes.json")})
    assert with_vocabulary(config)[0].model.vocab_size == 256
    assert check_memory(config, 1, CPU, "float32") is not None
