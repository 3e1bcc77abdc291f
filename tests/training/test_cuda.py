"""Tests that need a CUDA device: `pytest -m cuda`, which benchmarks/gpu.py also runs. They are skipped without one.

Tolerances: float32 sums in another order give 1e-5; bfloat16 has 8 bits, TF32 11. GPU kernels may sum in an order that
changes from run to run, so bits are compared only if values must not have changed at all.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.group import Ranks
from glassgpt.evaluation.perplexity import evaluate
from glassgpt.generation.generate import generate
from glassgpt.model.attention import ExplicitKernel, FlexKernel, SDPAKernel, Span, WindowKernel
from glassgpt.model.gpt import GPT
from glassgpt.model.loss import GPU_CHUNK_ROWS, IGNORED, cross_entropy, token_losses
from glassgpt.training.run import resume, train
from glassgpt.training.setup import TrainState, setup_training
from glassgpt.training.step import start_update
from glassgpt.utils.device import autocast
from glassgpt.utils.errors import UserError
from kill_harness import Quiet, fast_training, records_of, tiny_config

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    """Train without flushing to disk, with one thread and without measuring peak memory."""
    with fast_training():
        yield


def cuda_config(text: Path, **changes: Any) -> TrainConfig:
    """Return the config of ten uncompiled float32 updates on the GPU, with heads of width 32."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "context_length": 64}
    base = tiny_config(
        text, device=DEVICE, precision="float32", compile="off", model=shape, batch_tokens=512, micro_batch_size=4
    )
    # Low enough that rounding errors do not grow over the steps.
    return base.override(optim={"lr": 1e-3}).override(**changes)


def losses_of(config: TrainConfig, out: Path) -> list[float]:
    """Train a run and return its losses."""
    run = train(config, out, progress=Quiet())
    return [record["loss"] for record in records_of(run) if "loss" in record]


def state_of(config: TrainConfig) -> TrainState:
    """Return the state of a run before its first update."""
    return setup_training(config.override(steps=10), Ranks(), Quiet())


# --- attention --------------------------------------------------------------------------------------------------------

WINDOW = Span(40, 3)
KERNELS: dict[str, tuple[Callable[[], SDPAKernel], Span]] = {
    "sdpa": (lambda: SDPAKernel(Span(), 0.0), Span()),
    "window": (lambda: WindowKernel(WINDOW, 0.0), WINDOW),
    "flex": (lambda: FlexKernel(Span(), 0.0), Span()),
    "flex-window": (lambda: FlexKernel(WINDOW, 0.0), WINDOW),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_fused_attention_and_its_gradients_equal_the_formula(name: str, dtype: torch.dtype) -> None:
    """Two query heads share a key/value head; 300 tokens are not a multiple of a block; FlexAttention is compiled."""
    make, span = KERNELS[name]
    kernel: Callable[..., Tensor] = make()
    if name.startswith("flex"):
        kernel = torch.compile(kernel, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, n, 300, 64, generator=generator).to(DEVICE, dtype) for n in (4, 2, 2, 4))
    inputs, exact = [[x.detach().to(kind).requires_grad_() for x in (q, k, v)] for kind in (dtype, torch.float64)]
    actual = kernel(*inputs)
    expected = ExplicitKernel(span, 0.0)(*exact)
    gradients = torch.autograd.grad(actual, inputs, upstream)
    reference = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((actual, *gradients), (expected, *reference), strict=True):
        assert one.dtype == dtype
        error = (one.detach().double() - other.detach()).norm() / other.detach().norm()
        assert float(error) < (2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "qk_norm": True}], ids=["gpt2", "rope and norms"])
def test_attention_in_bfloat16_can_use_the_flash_kernel(changes: dict[str, Any]) -> None:
    """If only the flash kernel is allowed, PyTorch raises an error for an unsupported dtype, width or layout."""
    model = GPT.create(ModelConfig(vocab_size=100, n_layer=2, n_head=2, n_embd=128, **changes), 0, DEVICE)
    ids = torch.arange(100, device=DEVICE).expand(2, -1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), autocast(torch.device(DEVICE), "bfloat16"):
        loss = model(ids, ids)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss.backward()


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 2e-2), ("tf32", 2e-3)])
def test_losses_in_a_lower_precision_agree_within_its_digits(
    tmp_path: Path, text: Path, precision: str, bound: float
) -> None:
    expected = losses_of(cuda_config(text), tmp_path / "float32")
    assert losses_of(cuda_config(text, precision=precision), tmp_path / precision) == pytest.approx(expected, rel=bound)


def test_losses_on_the_gpu_equal_those_on_the_cpu(tmp_path: Path, text: Path) -> None:
    expected = losses_of(cuda_config(text, device="cpu"), tmp_path / "cpu")
    assert losses_of(cuda_config(text), tmp_path / "cuda") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cap", [None, 15.0])
def test_the_loss_in_chunks_equals_that_of_full_logits(cap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = GPU_CHUNK_ROWS + 100
    hidden, weight = (torch.randn(n, 64, generator=generator).to(DEVICE).requires_grad_() for n in (rows, 1024))
    targets = torch.randint(1000, (rows,), generator=generator).to(DEVICE)
    targets[::7] = IGNORED
    logits = hidden @ weight[:1000].T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets)
    actual = cross_entropy(hidden, weight, targets, 1000, cap)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    for one, other in zip(
        torch.autograd.grad(actual, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight), retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    each = token_losses(hidden, weight, targets, 1000, cap)
    torch.testing.assert_close(each, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-4, atol=1e-4)


# --- compilation ------------------------------------------------------------------------------------------------------


def test_a_compiled_run_has_the_losses_of_an_uncompiled_one(tmp_path: Path, text: Path) -> None:
    config = cuda_config(text, steps=5, model={"n_layer": 1})
    assert losses_of(config.override(compile="on"), tmp_path / "on") == pytest.approx(
        losses_of(config, tmp_path / "off"), rel=1e-4
    )


def test_windows_train_with_flex_attention_as_with_the_explicit_kernel(tmp_path: Path, text: Path) -> None:
    """QK-norm gives float32 queries and keys under bfloat16, which must be converted to the dtype of the values."""
    shape = {"n_layer": 1, "window": 20, "position": "rope", "qk_norm": True}
    config = cuda_config(text, steps=5, precision="bfloat16", model=shape)
    expected = losses_of(config.override(model={"attention": "explicit"}), tmp_path / "explicit")
    actual = losses_of(config.override(model={"attention": "flex"}, compile="on"), tmp_path / "flex")
    assert actual == pytest.approx(expected, rel=2e-2)


# --- no synchronisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_update_does_not_wait_for_the_gpu(text: Path, optimizer: str, precision: str) -> None:
    """PyTorch's debug mode raises an error if an operation waits for the GPU."""
    state = state_of(cuda_config(text, precision=precision, optim={"name": optimizer}))
    assert state.found_inf is not None
    start_update(state, 1e-3).read()  # this creates the optimizer's moments and loads the kernels
    state.step = 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        update = start_update(state, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(update.read()["loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_non_finite_batch_does_not_change_the_weights(text: Path, optimizer: str) -> None:
    state = state_of(cuda_config(text, optim={"name": optimizer}))
    start_update(state, 1e-3).read()
    model = state.strategy.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    forward = model.forward
    model.forward = lambda *arguments: forward(*arguments) * math.nan  # type: ignore[method-assign]
    bad = start_update(state, 1e-3)
    model.forward = forward  # type: ignore[method-assign]
    start_update(state, 1e-3)
    with pytest.raises(UserError, match="the loss is nan"):
        bad.read()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path, text: Path) -> None:
    config = cuda_config(text, steps=10, model={"dropout": 0.1}, optim={"schedule": "constant"})
    expected = losses_of(config, tmp_path / "uninterrupted")
    run = train(config.override(steps=5), tmp_path / "part", progress=Quiet())
    resume(run, steps=10, progress=Quiet())
    assert [record["loss"] for record in records_of(run) if "loss" in record] == pytest.approx(expected, rel=1e-4)


def test_evaluation_on_the_cpu_gives_the_recorded_validation_loss(tmp_path: Path, text: Path) -> None:
    run = train(cuda_config(text), tmp_path / "run", progress=Quiet())
    reported = [record["val_loss"] for record in records_of(run) if "val_loss" in record][-1]
    assert evaluate(run, device="cpu")["loss"] == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"position": "rope", "window": 10}, {"position": "rope", "n_kv_head": 1}], ids=str
)
def test_generation_with_and_without_a_cache_gives_the_same_tokens(changes: dict[str, Any]) -> None:
    """The text exceeds the context. The weights are large enough that rounding changes no draw."""
    model = GPT.create(
        ModelConfig(vocab_size=64, context_length=32, n_layer=2, n_head=2, n_embd=64, **changes), 0, DEVICE
    )
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    generated = [
        [
            p.token_id
            for p in generate(model, None, [1, 2, 3], max_new_tokens=50, n=2, use_cache=cache, precision="float32")
        ]
        for cache in (True, False)
    ]
    assert generated[0] == generated[1]
    assert len(generated[0]) == 100
