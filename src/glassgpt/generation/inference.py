"""Models prepared for inference: faster linear layers in float32 or int8 on a CPU, bfloat16 on a GPU.

A forward pass for one token reads every weight once and computes little, so its time is that of reading. PyTorch's
product of a few rows with a matrix reads at half of the memory's speed or less; oneDNN's and FBGEMM's kernels read
faster, and int8 is a quarter to read. Float32 results differ from the original model's in the last bits only.

Shapes: `M` rows, `C` inputs, `N` outputs, `V` vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.model.finite import require_finite
from glassgpt.model.gpt import GPT, Reduction
from glassgpt.model.kv_cache import KVCache
from glassgpt.model.loss import IGNORED, soft_cap
from glassgpt.utils import torch_internals
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.device import find_precision
from glassgpt.utils.errors import UserError

MIN_BYTES = 32 * 2**20  # smaller models stay in the CPU's cache, so reading is not what they wait for
MIN_TOKENS = 64  # of all rows, after which packing has paid off (8 tokens of 8 rows); one row needs no packing
SMALLEST_SCALE = 1e-30  # of a row whose numbers are all 0
InferencePrecision = Literal["auto", "float32", "bfloat16"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside; afterwards the model is in training mode again if it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class PackedLinear(nn.Module):
    """A linear layer computed by oneDNN: 0.65 of `F.linear`'s time for one row, 0.4 for eight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """weight (N, C), bias (N,). The weight is packed for inputs of M = `rows` rows, and used directly for one."""
        super().__init__()
        self.weight, self.bias = weight.contiguous(), bias
        self.packed = self.weight if rows == 1 else torch_internals.pack_weight(self.weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., N)."""
        return torch_internals.packed_linear(x, self.packed, self.bias)


class Int8Linear(nn.Module):
    """A linear layer in int8 with dynamic quantization: a scale per output, and a scale and zero point per row of x."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed, self.row_sums = torch_internals.pack_int8(weight)
        self.bias, self.steps = bias, activation_steps()

    @property
    def weight(self) -> Tensor:
        """The rounded matrix (N, C) in float32, unpacked at each access."""
        return torch_internals.unpack_int8(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., N)."""
        if x.numel() == x.shape[-1]:
            return self._one_row(x)
        # Integer sums are exact, so rows do not affect each other, but for one input in a million rounded otherwise.
        # FBGEMM takes one scale for all rows, so each row is scaled to integers first, and its zero point undone.
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high - low).div_(self.steps).clamp_(min=SMALLEST_SCALE)
        zero = (-low / scale).round_()
        y = torch_internals.int8_linear(x / scale + zero, 1.0, 0, self.packed).addcmul_(zero, self.row_sums, value=-1)
        return y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale)

    def _one_row(self, x: Tensor) -> Tensor:
        """For a single row FBGEMM does it all: x = scale (integers - zero point)."""
        low, high = (extreme.item() for extreme in torch.aminmax(x))
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / self.steps, SMALLEST_SCALE)
        if not math.isfinite(scale):
            return x.new_full((*x.shape[:-1], len(self.row_sums)), math.nan)
        y = torch_internals.int8_linear(x, scale, round(-low / scale), self.packed)
        return y if self.bias is None else y.add_(self.bias)


def activation_steps() -> int:
    """Integer steps from a row's smallest number to its largest."""
    # Without AVX-512's int8 dot products FBGEMM adds two products in 16 bits, which must not overflow.
    return 255 if torch.cpu.get_capabilities().get("avx512_vnni") else 127


class InferenceGPT(GPT):
    """A GPT with other linear layers, made by `linear(weight, bias)`. It shares all other parameters and all hooks.

    It has GPT's whole interface, but computes no gradients. A linear layer with a hook, or of a subclass, is kept.
    """

    def __init__(self, model: GPT, linear: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
        nn.Module.__init__(self)
        self.config, self.vocab_size, self.limit = model.config, model.vocab_size, model.limit
        self.end_ids = model.end_ids

        def replace(module: nn.Module) -> nn.Module | None:
            if type(module) is nn.Dropout and not torch_internals.has_forward_hooks(module):
                return nn.Identity()
            if type(module) is not nn.Linear or torch_internals.has_forward_hooks(module):
                return None
            return linear(module.weight.detach(), None if module.bias is None else module.bias.detach())

        for name, module in model.named_children():
            if name != "head":
                self.add_module(name, torch_internals.copy_modules(module, replace))
        self.head = cast(nn.Linear, linear(model.head.weight.detach()[: model.vocab_size], None))
        self.eval()

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """As `GPT.forward`, without gradients."""
        hidden = self.hidden(ids, cache)
        if targets is None:
            return self.logits(hidden)
        chunks = zip(torch.split(hidden.flatten(0, -2), 1024), torch.split(targets.flatten(), 1024), strict=True)
        losses = [F.cross_entropy(self.logits(h), t, ignore_index=IGNORED, reduction="none") for h, t in chunks]
        loss = torch.cat(losses).view(targets.shape)
        return loss.sum() / (targets != IGNORED).sum() if reduction == "mean" else loss

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., vocab_size)."""
        return soft_cap(self.head(hidden), self.config.logit_softcap)


@check_arguments
def quantize(model: GPT, kind: str = "int8") -> InferenceGPT:
    """A copy of the model with int8 linear layers and head, which generates faster on a CPU.

    The original is not changed; delete it to free the memory of its matrices. `glassgpt eval --quantize int8` measures
    the loss in quality. Raises `UserError` for another kind, device or dtype, for weights that are not finite, and for
    a CPU that is not x86.
    """
    weight = model.embedding.weight
    if kind != "int8":
        raise UserError(f"quantization {kind!r} is unknown; use int8")
    if isinstance(model, InferenceGPT):
        raise UserError("this model is already prepared for inference; quantize the original model")
    if weight.device.type != "cpu":
        raise UserError(f"int8 runs on the CPU only, and the model is on {weight.device}; load it with device='cpu'")
    if weight.dtype != torch.float32:
        raise UserError(f"int8 needs a float32 model, and this one is {weight.dtype}; call model.float() first")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UserError("int8 needs FBGEMM, which PyTorch has for x86 CPUs only; generate without int8")
    for parameter in model.parameters():  # integers have no NaN
        require_finite(parameter.detach().abs(), model)
    with torch.inference_mode():
        return InferenceGPT(model, Int8Linear)


def device_for(quantization: str | None, device: str | torch.device) -> str | torch.device:
    """The device to load a model on: for a model to `quantize`, `auto` is the CPU."""
    return "cpu" if quantization is not None and device == "auto" else device


def prepare_for_inference(model: GPT, rows: int, tokens: int, precision: InferencePrecision = "auto") -> GPT:
    """The model to generate `tokens` tokens in each of `rows` rows: a faster copy if that pays off, or itself.

    precision: `auto` is bfloat16 for a float32 model on a GPU that has it, otherwise the model's own dtype. A packed
    copy (several rows on a CPU) needs as much memory again as the matrices. To generate often with the same weights,
    prepare once and pass the result to `generate`. Raises `UserError` for a precision that the model cannot have.
    """
    weight = model.embedding.weight
    if precision == "bfloat16" and isinstance(model, InferenceGPT):
        raise UserError("precision bfloat16 needs the original model; this one has packed or int8 weights")
    if precision == "auto" and weight.device.type == "cuda" and weight.dtype == torch.float32:
        precision = cast(InferencePrecision, find_precision("auto", weight.device))
    if precision == "bfloat16" and weight.dtype != torch.bfloat16:
        return _in_bfloat16(model)
    unsuitable = isinstance(model, InferenceGPT) or weight.device.type != "cpu" or weight.dtype != torch.float32
    too_few = rows > 1 and rows * tokens < MIN_TOKENS
    if unsuitable or too_few or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return model
    linears = [model.head, *(module for module in model.blocks.modules() if isinstance(module, nn.Linear))]
    if sum(linear.weight.nbytes for linear in linears) < MIN_BYTES:
        return model
    with torch.inference_mode():
        return InferenceGPT(model, partial(PackedLinear, rows=rows))


def forward_bytes(model: GPT, tokens: int, width: int) -> int:
    """Bytes that a forward pass certainly needs at once: for each token two residual streams and the inner values."""
    return tokens * (2 * model.config.n_embd + model.config.resolved_n_inner) * width


@torch.no_grad()
def _in_bfloat16(model: GPT) -> GPT:
    """A copy with bfloat16 parameters that shares the original's hooks."""
    converted = torch_internals.copy_modules(model, lambda module: None)
    for module in converted.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.bfloat16(), requires_grad=False))
    return cast(GPT, converted)
