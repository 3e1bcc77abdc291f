"""Models prepared for inference: equal logits in float32, close ones in int8 and bfloat16, and errors."""

import os
import subprocess
import sys
from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.cli.main import main
from glassgpt.config.model import ModelConfig
from glassgpt.generation import inference
from glassgpt.generation.generate import generate
from glassgpt.generation.inference import InferenceGPT, Int8Linear, PackedLinear, prepare_for_inference, quantize
from glassgpt.interop import references
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import BytesTokenizer
from glassgpt.utils.errors import UserError

SHAPE: dict[str, Any] = {"vocab_size": 250, "context_length": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "position": "rope",
            "n_kv_head": 2,
            "norm": "rmsnorm",
            "qk_norm": True,
            "activation": "swiglu",
            "bias": False,
            "tied_head": False,
        },
        {"window": 3, "embedding_norm": True, "logit_softcap": 5.0, "activation": "relu_squared"},
    ],
    ids=["gpt2", "modern", "window"],
)


def model(**changes: Any) -> GPT:
    """Return a GPT-2 whose initial matrices are multiplied by 5, so that every layer affects the logits."""
    model = GPT.create(ModelConfig(**(SHAPE | changes)), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model.eval()


def ids(*shape: int) -> Tensor:
    """Return random token ids of this shape."""
    return torch.randint(250, shape, generator=torch.Generator().manual_seed(0))


@VARIANTS
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("packed_for", [1, 2])
def test_float32_inference_gives_the_same_logits(changes: dict[str, Any], rows: int, packed_for: int) -> None:
    """The tolerances are float32's rounding of sums in another order."""
    original = model(**changes)
    with torch.inference_mode():
        prepared = InferenceGPT(original, partial(PackedLinear, rows=packed_for))
        torch.testing.assert_close(prepared(ids(rows, 9)), original(ids(rows, 9)), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(
            prepared(ids(rows, 9), ids(rows, 9)), original(ids(rows, 9), ids(rows, 9)), atol=1e-4, rtol=1e-4
        )


def test_an_int8_layer_equals_a_product_of_rounded_numbers() -> None:
    """Weights are rounded to 127 steps on each side of 0.

    A row of x is rounded to 255 steps between its smallest and largest number, including 0. The rows include one of
    zeros, which must give the bias, and rows of only one sign.
    """
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((48, 64), (48,), (5, 64)))
    x[2] = 0
    x[3], x[4] = x[3].abs() + 1, -x[4].abs() - 1
    weight[3] = 0
    rounded_weight = round_to(weight, weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    expected = (
        F.linear(round_to(x, (high - low).clamp(min=1e-30) / inference.activation_steps()), rounded_weight) + bias
    )
    with torch.inference_mode():
        for rows in (slice(0, 5), *(slice(i, i + 1) for i in range(5))):  # all rows together, and each row alone
            torch.testing.assert_close(Int8Linear(weight, bias)(x[rows]), expected[rows], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(Int8Linear(weight, None)(x[rows]), expected[rows] - bias, atol=1e-4, rtol=1e-4)


def round_to(numbers: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Round to multiples of the step."""
    return (numbers / step).round() * step


def test_activations_have_fewer_steps_on_a_cpu_without_int8_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """FBGEMM's AVX2 kernel adds two products in 16 bits, which would overflow with 255 steps, but not with fewer."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx_vnni": True})
    assert (inference.activation_steps() + 1) * 127 * 2 < 2**15
    code = (
        "import torch\nfrom glassgpt.generation import inference\n"
        "weight, x = 1 + torch.rand(64, 256), 1 + torch.rand(3, 256)\n"
        "def error(steps):\n"
        "    inference.activation_steps = lambda: steps\n"
        "    with torch.inference_mode():\n"
        "        return float((inference.Int8Linear(weight, None)(x) / (x @ weight.T) - 1).abs().max())\n"
        "print(error(127), error(255))"
    )
    environment = {**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    coarse, overflowed = map(float, result.stdout.split())
    assert coarse < 0.01 < 0.1 < overflowed


@VARIANTS
def test_int8_logits_and_losses_are_close_to_the_originals(changes: dict[str, Any]) -> None:
    """Logits differ, but by less than a tenth of their standard deviation (0.01 to 0.06 of it were measured)."""
    original, quantized = model(**changes), quantize(model(**changes))
    with torch.inference_mode():
        expected, logits = original(ids(2, 20)), quantized(ids(2, 20))
        losses = quantized(ids(2, 20), ids(2, 20), reduction="none")
        assert losses.shape == (2, 20)
        torch.testing.assert_close(
            losses, F.cross_entropy(logits.transpose(1, 2), ids(2, 20), reduction="none"), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(quantized(ids(2, 20), ids(2, 20)), losses.mean())
    assert 0 < (logits - expected).std() < 0.1 * expected.std()


def test_int8_rows_are_independent() -> None:
    """Other rows are up to a million times as large. One number in a million may round to the next integer."""
    layer, x = (
        Int8Linear(torch.randn(48, 64), torch.randn(48)),
        torch.randn(1000, 3, 64) * torch.tensor([[1.0], [1000.0], [0.001]]),
    )
    x = x.flatten(0, 1)
    with torch.inference_mode():
        together, separate = layer(x), torch.cat([layer(row[None]) for row in x])
    difference = (together - separate).abs().amax(dim=1) / x.abs().amax(dim=1).clamp(min=1)
    assert (difference > 1e-5).sum() < 0.01 * len(x)


def test_quantization_does_not_change_the_original_model() -> None:
    original = model().train()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    quantized = quantize(original)
    assert original.training
    assert all(module.training for module in original.modules())
    assert not any(module.training for module in quantized.modules())
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert not any(parameter.is_meta for parameter in quantized.parameters())


def test_a_prepared_model_is_a_gpt_with_readable_weights() -> None:
    """Int8 weights differ from the original's by at most half of one of 127 steps; packed weights are equal."""
    original, name = model(), "blocks.0.feed_forward.up"
    weight = original.get_parameter(f"{name}.weight").detach()
    rounded_weight = quantize(original).get_submodule(name).weight
    packed = InferenceGPT(original, partial(PackedLinear, rows=2)).get_submodule(name)
    assert packed.weight is not None
    assert torch.equal(cast(Tensor, packed.weight), weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((cast(Tensor, rounded_weight) - weight).abs() <= 0.501 * step).all()
    assert quantize(original).head.weight.shape == (250, 64)


def test_the_quantization_engine_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.quantized.engine
    quantize(model())
    assert torch.backends.quantized.engine == before
    monkeypatch.setattr(torch, "quantize_per_channel", mock.Mock(side_effect=RuntimeError))
    with pytest.raises(RuntimeError):
        quantize(model())
    assert torch.backends.quantized.engine == before


def test_bfloat16_inference_leaves_the_original_in_float32() -> None:
    """Logits agree within bfloat16's 8 bits, the head stays tied, and hooks run. On a CPU, `auto` is float32."""
    original, dtypes = model().train(), []
    original.get_submodule("blocks.0").register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    prepared = prepare_for_inference(original, 1, 9, "bfloat16").eval()
    expected, logits = original.eval()(ids(2, 9)), prepared(ids(2, 9)).float()
    assert dtypes == [torch.float32, torch.bfloat16]
    assert prepared.head is prepared.embedding
    assert {p.dtype for p in prepared.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in original.parameters()} == {torch.float32}
    assert 0 < (logits - expected).std() < 0.03 * expected.std()
    assert prepare_for_inference(original, 1, 9) is original
    dtypes.clear()
    list(generate(original, None, [1], max_new_tokens=2, precision="bfloat16"))
    assert dtypes == [torch.bfloat16] * 2
    with pytest.raises(UserError, match="bfloat16"):
        prepare_for_inference(quantize(model()), 1, 9, "bfloat16")


def test_hooks_run_in_prepared_models() -> None:
    """Hooks run on a block and on a linear layer, which is then not replaced; a replaced module is kept too."""
    original, called = model(), []
    original.get_submodule("blocks.0").register_forward_hook(lambda *_: called.append("block"))
    original.get_submodule("blocks.1.feed_forward.up").register_forward_hook(lambda *_: called.append("linear"))
    original.set_submodule("blocks.0.attention_norm", torch.nn.Identity())
    with torch.inference_mode():
        quantized = quantize(original)
        quantized(ids(1, 3))
        assert called == ["block", "linear"]
        assert quantized.get_submodule("blocks.1.feed_forward.up").__class__ is torch.nn.Linear
        assert (
            (quantized(ids(1, 9)) - original(ids(1, 9))).abs().max()
            < 0.5
            < (quantized(ids(1, 9)) - model()(ids(1, 9))).abs().max()
        )


def test_a_model_with_activation_checkpointing_is_quantized() -> None:
    """Checkpointing replaces a block's `forward`; a copy that kept it would compute with the original's layers."""
    original, recomputing = model(), model()
    for block in recomputing.blocks:
        checkpoint_activations(block, "full")
    with torch.inference_mode():
        assert torch.equal(quantize(recomputing)(ids(1, 9)), quantize(original)(ids(1, 9)))


@pytest.mark.parametrize("n", [1, 2])
def test_generate_prepares_the_model_only_for_enough_work(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated tokens are the same, and a hook on the original's attention kernel still receives its queries."""
    original = model()
    query_lengths: list[int] = []
    original.get_submodule("blocks.0.attention.kernel").register_forward_pre_hook(
        lambda _, inputs: query_lengths.append(inputs[0].shape[2])
    )
    assert prepare_for_inference(original, n, 1000) is original
    expected = list(generate(original, None, [1, 2], max_new_tokens=26, temperature=0, n=n))
    query_lengths.clear()
    monkeypatch.setattr(inference, "MIN_BYTES", 0)
    monkeypatch.setattr(inference, "MIN_TOKENS", 26)
    assert (prepare_for_inference(original, n, inference.MIN_TOKENS // n - 1) is original) == (n > 1)
    assert isinstance(prepare_for_inference(original, n, inference.MIN_TOKENS // n), InferenceGPT)
    assert [p.token_id for p in generate(original, None, [1, 2], max_new_tokens=26, temperature=0, n=n)] == [
        p.token_id for p in expected
    ]
    assert query_lengths == [2] + [1] * 25
    assert prepare_for_inference(quantize(original), n, 1000).get_submodule("head").__class__ is Int8Linear
    assert prepare_for_inference(model().double(), n, 1000).__class__ is GPT


def test_layers_for_one_row_share_the_original_weights() -> None:
    original, name = model(), "blocks.0.feed_forward.up"
    packed = InferenceGPT(original, partial(PackedLinear, rows=1)).get_submodule(name)
    assert isinstance(packed.weight, torch.Tensor)
    assert packed.weight.data_ptr() == original.get_parameter(f"{name}.weight").data_ptr()


def test_models_that_cannot_be_quantized_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'int3'"):
        quantize(model(), "int3")
    with pytest.raises(UserError, match="bfloat16"):
        quantize(model().bfloat16())
    with pytest.raises(UserError, match="meta"):
        quantize(model().to("meta"))
    with pytest.raises(UserError, match="already prepared"):
        quantize(quantize(model()))
    monkeypatch.setattr(torch.backends.quantized.__class__, "supported_engines", ["qnnpack"])
    with pytest.raises(UserError, match="FBGEMM"):
        quantize(model())


@pytest.mark.parametrize(("options", "status"), [(["--quantize", "int8"], 0), (["--quantize", "int3"], 2)])
def test_the_command_line_generates_in_int8(
    options: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--quantize`, the automatic device is the CPU; an unknown kind is an error of one line."""
    devices: list[str] = []

    def load(_: str, device: str) -> tuple[GPT, BytesTokenizer]:
        devices.append(device)
        return model(vocab_size=256), BytesTokenizer()

    monkeypatch.setattr(references, "load", load)
    assert main(["generate", "runs/x", "--prompt", "The", "--max-new-tokens", "5", *options]) == status
    captured = capsys.readouterr()
    assert devices == ["cpu"]
    assert captured.out.startswith("The") if status == 0 else "'int3'" in captured.err


@pytest.mark.slow
def test_int8_takes_less_memory() -> None:
    """The process's memory falls by at least 70 MB for a model of 100 MB, of whose matrices int8 saves 75 MB.

    Memory that the C library has freed but keeps does not count, because its amount depends on the machine.
    """
    code = (
        "import ctypes, gc, platform, psutil, torch, glassgpt\n"
        "trim = ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == 'glibc' else lambda pad: None\n"
        "resident = lambda: (gc.collect(), trim(0), psutil.Process().memory_info().rss)[2]\n"
        "shape = glassgpt.ModelConfig(vocab_size=50, context_length=32, n_layer=2, n_head=4, n_embd=1024)\n"
        "tiny = glassgpt.ModelConfig(vocab_size=50, context_length=8, n_layer=1, n_head=1, n_embd=16)\n"
        "glassgpt.quantize(glassgpt.GPT.create(tiny, 0))\n"
        "model = glassgpt.GPT.create(shape, 0); full = resident()\n"
        "model = glassgpt.quantize(model); print(full - resident())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 70e6
    assert not result.stderr
