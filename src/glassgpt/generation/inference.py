"""A model made ready to write on a CPU: the same modules around other linear layers, in float32 or int8.

One token's pass reads every weight once and computes little, so its time is that of reading. PyTorch's own product of one or a
few rows with a matrix reads at half or less of what the memory gives, and in int8 there is a quarter to read. What the layers compute
is the same; in float32 only the last bits differ.

Shapes: `M` rows, `C` inputs, `N` outputs, `V` vocabulary.
"""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.model.gpt import GPT
from glassgpt.model.kv_cache import KVCache
from glassgpt.model.loss import IGNORED, soft_cap
from glassgpt.utils.errors import UserError

# A smaller model's weights stay in the CPU's cache.
WORTH_BYTES = 32 * 2**20
# Of all of several rows together: what packing costs is back after 8 tokens of each of 8 rows. For one row nothing is packed.
WORTH_TOKENS = 64
# A row's scale where all of it is 0, which stays so.
SMALLEST = 1e-30


class PackedLinear(nn.Module):
    """A linear layer by oneDNN, for several rows with the weights in its blocks: for one row 0.65 of `F.linear`'s time, for eight 0.4.

    The operators are those that PyTorch's own compiler puts in the place of `F.linear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """`rows` (M) is how many there mostly are: the blocks suit it best, and any other number too. For one, `weight` itself is kept."""
        super().__init__()
        weight = weight.contiguous()
        self.weight = weight if rows == 1 else torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., N)."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))


class Int8Linear(nn.Module):
    """A linear layer in int8: weights with a scale for each output, and each row of x, as it comes, with a scale and a zero point
    (dynamic quantization). Sums of integers are exact, so but for rounding (of one input in a million to the next integer) a row's
    result does not depend on the rows beside it.

    FBGEMM through PyTorch's quantized tensors, which are deprecated (pytorch#184982) and may go: `torch.ops.onednn.qlinear_pointwise`
    then does the same, but a token takes 1.4 times as long; torchao's int8 layers are slower than float32 unless compiled.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed, self.of_ones = _packed_int8(weight)
        self.bias = bias
        self.steps = activation_steps()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., N)."""
        # x = scale (integers - zero), of which each term is multiplied by the weights.
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        if x.numel() == x.shape[-1]:  # for a single row FBGEMM does all of it
            lowest, highest = (extreme.item() for extreme in torch.aminmax(x))
            lowest, highest = min(lowest, 0.0), max(highest, 0.0)
            step = max((highest - lowest) / self.steps, SMALLEST)
            if not math.isfinite(step):
                return x.new_full((*x.shape[:-1], len(self.of_ones)), math.nan)
            y = product(x, step, round(-lowest / step), self.packed)
            return cast(Tensor, y if self.bias is None else y.add_(self.bias))
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high - low).div_(self.steps).clamp_(min=SMALLEST)
        zero = (-low / scale).round_()
        y = product(x / scale + zero, 1.0, 0, self.packed).addcmul_(zero, self.of_ones, value=-1)
        return cast(Tensor, y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale))


def _packed_int8(weight: Tensor) -> tuple[torch.ScriptObject, Tensor]:
    """A matrix (N, C) as FBGEMM wants it, rounded to 127 steps of the largest number of its row; and its product with ones (N,)."""
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny).double() / 127
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        try:
            torch.backends.quantized.engine = "fbgemm"
            codes = torch.quantize_per_channel(
                weight, scale, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8
            )
            packed = cast(torch.ScriptObject, torch.ops.quantized.linear_prepack(codes, None))
        finally:
            torch.backends.quantized.engine = engine
    return packed, (codes.int_repr().sum(dim=1) * scale).float()


def activation_steps() -> int:
    """From a row's smallest number to its largest. Without AVX-512's int8 dot products (FBGEMM knows no others) two products are added
    in 16 bits, which must not overflow.
    """
    return 255 if torch.cpu.get_capabilities().get("avx512_vnni") else 127


class InferenceGPT(GPT):
    """A model whose linear layers are made anew by `linear(weight, bias)`. It shares all else with the original, hooks included.

    A linear layer with a hook of its own, or of a class of its own, stays as it is.
    """

    def __init__(self, model: GPT, linear: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
        nn.Module.__init__(self)
        self.config, self.vocab_size, self.limit = model.config, model.vocab_size, model.limit
        for name, module in model.named_children():
            if name != "head":
                self.add_module(name, _remade(module, linear))
        self.head = cast(nn.Linear, linear(model.head.weight.detach()[: model.vocab_size], None))
        self.eval()

    def train(self, mode: bool = True) -> "InferenceGPT":
        """Raises `UserError` for `True`."""
        if mode:
            raise UserError("a model made ready to write cannot be trained: train the one that it was made from")
        return super().train(mode)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """As `GPT.forward`, without gradients."""
        with torch.inference_mode():
            hidden = self.hidden(ids, cache)
            if targets is None:
                return self.logits(hidden)
            pairs = zip(hidden.flatten(0, -2).split(1024), targets.flatten().split(1024), strict=True)  # type: ignore[no-untyped-call]
            losses = torch.cat(
                [F.cross_entropy(self.logits(h), t, ignore_index=IGNORED, reduction="none") for h, t in pairs]
            )
            return losses.sum() / (targets != IGNORED).sum() if reduction == "mean" else losses.view(targets.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., vocab_size)."""
        return soft_cap(self.head(hidden), self.config.logit_softcap)


def _remade(module: nn.Module, linear: Callable[[Tensor, Tensor | None], nn.Module]) -> nn.Module:
    """A module with other linear layers inside: a shallow copy, which has the same parameters and hooks, but its own mode."""
    if type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
        return linear(module.weight.detach(), None if module.bias is None else module.bias.detach())
    if type(module) is nn.Dropout and not module._forward_hooks and not module._forward_pre_hooks:
        return nn.Identity()
    own = copy.copy(module)
    own.__dict__.pop("forward", None)  # of `recompute`: it would go on with the original's layers
    own._modules = {name: child and _remade(child, linear) for name, child in module._modules.items()}
    return own


def quantized(model: GPT, kind: str = "int8") -> InferenceGPT:
    """The model with its linear layers and its head in int8, to write with on a CPU; embeddings and norms stay in float32.

    The original is left as it is; drop it, and the memory of its matrices is free. What it costs in bits per byte:
    `glassgpt eval --quantize int8`. Raises `UserError` for another kind, another device or dtype, and a CPU that is no x86.
    """
    weight = model.embedding.weight
    if kind != "int8":
        raise UserError(f"there is no quantization {kind!r}: int8 is the one there is")
    if isinstance(model, InferenceGPT):
        raise UserError("this model is made ready to write already: quantize the one that it was made from")
    if weight.device.type != "cpu":
        raise UserError(
            f"int8 is for the CPU, and the model is on {weight.device}: load it with device cpu, or write without int8"
        )
    if weight.dtype != torch.float32:
        raise UserError(
            f"int8 is made from float32, and the model has {str(weight.dtype).removeprefix('torch.')}: call float() on it first"
        )
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UserError("int8 needs FBGEMM, which PyTorch has for x86 CPUs only: write without it")
    with torch.inference_mode():
        return InferenceGPT(model, Int8Linear)


def device_for(quantize: str | None, device: str) -> str:
    """The device to load a model on that may be `quantized`: the CPU for `auto`."""
    return "cpu" if quantize is not None and device == "auto" else device


def prepare_for_inference(model: GPT, rows: int, tokens: int) -> GPT:
    """The model to write `tokens` tokens with in `rows` rows: itself, or in float32 on a CPU a faster one, where that is worth it.

    For several rows it takes as much memory again as the matrices, until it is dropped; who writes often with the same weights makes it
    once, and gives it to `generate` as the model.
    """
    weight = model.embedding.weight
    unsuitable = isinstance(model, InferenceGPT) or weight.device.type != "cpu" or weight.dtype != torch.float32
    too_few = rows > 1 and rows * tokens < WORTH_TOKENS
    if unsuitable or too_few or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return model
    linears = [model.head, *(module for module in model.blocks.modules() if isinstance(module, nn.Linear))]
    if sum(linear.weight.nbytes for linear in linears) < WORTH_BYTES:
        return model
    with torch.inference_mode():
        return InferenceGPT(model, partial(PackedLinear, rows=rows))
