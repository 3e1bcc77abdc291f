"""What only a CUDA device can show: `pytest -m cuda`, which `benchmarks/gpu.py` runs too. Skipped where there is none.

Bounds: float32 sums in another order give 1e-5, bfloat16 has 8 bits; TF32 11. Kernels on a GPU may add up in an order
that changes from run to run, so nothing here is compared bit by bit, but for what must not have been touched at all.
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
def light() -> Iterator[None]:
    with fast_training():
        yield


def cuda_config(text: Path, **changes: Any) -> TrainConfig:
    """A run of ten updates on the GPU in float32, not compiled, by a model whose heads are 32 wide."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "context_length": 64}
    base = tiny_config(
        text, device=DEVICE, precision="float32", compile="off", model=shape, batch_tokens=512, micro_batch_size=4
    )
    return base.override(optim={"lr": 1e-3}).override(**changes)  # so low that rounding does not grow from step to step


def losses_of(config: TrainConfig, out: Path) -> list[float]:
    run = train(config, out, progress=Quiet())
    return [record["loss"] for record in records_of(run) if "loss" in record]


def state_of(config: TrainConfig) -> TrainState:
    return setup_training(config.override(steps=10), Ranks(), Quiet())


# ------------------------------------------------------------------------------------------------------------ attention

WINDOW = Span(40, 3)
KERNELS: dict[str, tuple[Callable[[], SDPAKernel], Span]] = {
    "sdpa": (lambda: SDPAKernel(Span(), 0.0), Span()),
    "window": (lambda: WindowKernel(WINDOW, 0.0), WINDOW),
    "flex": (lambda: FlexKernel(Span(), 0.0), Span()),
    "flex-window": (lambda: FlexKernel(WINDOW, 0.0), WINDOW),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_fused_attention_and_its_gradients_are_the_formulas(name: str, dtype: torch.dtype) -> None:
    """Two query heads share a key/value head; 300 tokens are not a multiple of a block. FlexAttention as it is used:
    compiled."""
    make, span = KERNELS[name]
    kernel: Callable[..., Tensor] = make()
    if name.startswith("flex"):
        kernel = torch.compile(kernel, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, n, 300, 64, generator=generator).to(DEVICE, dtype) for n in (4, 2, 2, 4))
    given, exact = [[x.detach().to(kind).requires_grad_() for x in (q, k, v)] for kind in (dtype, torch.float64)]
    found = kernel(*given)
    expected = ExplicitKernel(span, 0.0)(*exact)
    gradients = torch.autograd.grad(found, given, upstream)
    reference = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((found, *gradients), (expected, *reference), strict=True):
        assert one.dtype == dtype
        error = (one.detach().double() - other.detach()).norm() / other.detach().norm()
        assert float(error) < (2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "qk_norm": True}], ids=["gpt2", "rope and norms"])
def test_in_bfloat16_the_flash_kernel_takes_our_attention(changes: dict[str, Any]) -> None:
    """Alone allowed, it raises where dtype, width or layout do not suit it."""
    model = GPT.create(ModelConfig(vocab_size=100, n_layer=2, n_head=2, n_embd=128, **changes), 0, DEVICE)
    ids = torch.arange(100, device=DEVICE).expand(2, -1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), autocast(torch.device(DEVICE), "bfloat16"):
        loss = model(ids, ids)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss.backward()


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 2e-2), ("tf32", 2e-3)])
def test_a_lower_precision_changes_the_losses_as_little_as_its_digits_say(
    tmp_path: Path, text: Path, precision: str, bound: float
) -> None:
    expected = losses_of(cuda_config(text), tmp_path / "float32")
    assert losses_of(cuda_config(text, precision=precision), tmp_path / precision) == pytest.approx(expected, rel=bound)


def test_the_cpu_computes_the_same_losses(tmp_path: Path, text: Path) -> None:
    expected = losses_of(cuda_config(text, device="cpu"), tmp_path / "cpu")
    assert losses_of(cuda_config(text), tmp_path / "cuda") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cap", [None, 15.0])
def test_the_loss_in_chunks_is_that_of_full_logits(cap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = GPU_CHUNK_ROWS + 100
    hidden, weight = (torch.randn(n, 64, generator=generator).to(DEVICE).requires_grad_() for n in (rows, 1024))
    targets = torch.randint(1000, (rows,), generator=generator).to(DEVICE)
    targets[::7] = IGNORED
    logits = hidden @ weight[:1000].T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets)
    found = cross_entropy(hidden, weight, targets, 1000, cap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight), retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    each = token_losses(hidden, weight, targets, 1000, cap)
    torch.testing.assert_close(each, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- compiled


def test_compiled_a_run_has_the_losses_that_it_has_else(tmp_path: Path, text: Path) -> None:
    config = cuda_config(text, steps=5, model={"n_layer": 1})
    assert losses_of(config.override(compile="on"), tmp_path / "on") == pytest.approx(
        losses_of(config, tmp_path / "off"), rel=1e-4
    )


def test_with_flex_attention_windows_train_as_with_the_formula(tmp_path: Path, text: Path) -> None:
    """In bfloat16, with norms that leave queries and keys in float32: FlexAttention wants all three alike."""
    shape = {"n_layer": 1, "window": 20, "position": "rope", "qk_norm": True}
    config = cuda_config(text, steps=5, precision="bfloat16", model=shape)
    expected = losses_of(config.override(model={"attention": "explicit"}), tmp_path / "explicit")
    found = losses_of(config.override(model={"attention": "flex"}, compile="on"), tmp_path / "flex")
    assert found == pytest.approx(expected, rel=2e-2)


# without synchronising


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_update_does_not_wait_for_the_gpu(text: Path, optimizer: str, precision: str) -> None:
    """PyTorch's own alarm: it raises where an operation waits."""
    state = state_of(cuda_config(text, precision=precision, optim={"name": optimizer}))
    assert state.found_inf is not None
    start_update(state, 1e-3).read()  # the moments are made, the kernels loaded
    state.step = 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        update = start_update(state, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(update.read()["loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_batch_leaves_the_weights(text: Path, optimizer: str) -> None:
    state = state_of(cuda_config(text, optim={"name": optimizer}))
    start_update(state, 1e-3).read()
    model = state.strategy.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    forward = model.forward
    model.forward = lambda *given: forward(*given) * math.nan  # type: ignore[method-assign]
    bad = start_update(state, 1e-3)
    model.forward = forward  # type: ignore[method-assign]
    start_update(state, 1e-3)
    with pytest.raises(UserError, match="the loss is nan"):
        bad.read()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(tmp_path: Path, text: Path) -> None:
    config = cuda_config(text, steps=10, model={"dropout": 0.1}, optim={"schedule": "constant"})
    expected = losses_of(config, tmp_path / "whole")
    run = train(config.override(steps=5), tmp_path / "part", progress=Quiet())
    resume(run, steps=10, progress=Quiet())
    assert [record["loss"] for record in records_of(run) if "loss" in record] == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_is_evaluated_alike_on_the_cpu(tmp_path: Path, text: Path) -> None:
    run = train(cuda_config(text), tmp_path / "run", progress=Quiet())
    reported = [record["val_loss"] for record in records_of(run) if "val_loss" in record][-1]
    assert evaluate(run, device="cpu")["loss"] == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"position": "rope", "window": 10}, {"position": "rope", "n_kv_head": 1}], ids=str
)
def test_writing_with_a_cache_is_writing_without(changes: dict[str, Any]) -> None:
    """Behind the context's end too; weights are large enough that the draws are decided."""
    model = GPT.create(
        ModelConfig(vocab_size=64, context_length=32, n_layer=2, n_head=2, n_embd=64, **changes), 0, DEVICE
    )
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    written = [
        [
            p.token_id
            for p in generate(model, None, [1, 2, 3], max_new_tokens=50, n=2, use_cache=cache, precision="float32")
        ]
        for cache in (True, False)
    ]
    assert written[0] == written[1]
    assert len(written[0]) == 100
