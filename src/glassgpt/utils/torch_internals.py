"""The one place that uses private names of PyTorch, each with the reason and the release that it was checked with."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What selective activation checkpointing keeps: the results of matrix products and of attention. torch.utils.checkpoint
# (2.13) asks its policy about operators, and operators have no public names.
_aten = torch.ops.aten
CHECKPOINTED_OPERATORS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model's modules without `torch.compile`: it would compile each new length, and does not fire hooks."""
    # `torch.compiler.set_stance` (2.13) does the same for the whole process: two threads could leave it changed.
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


class SkipInit(TorchFunctionMode):
    """Inside, modules are made with uninitialised weights: functions of `torch.nn.init` are skipped.

    They are recognised by their module's name (2.13). The public ways are slow: `torch.device("meta")` imports torch's
    compiler, 1.1 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", *args[:1])
        return func(*args, **kwargs)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks of its own. No public name counts them (2.13)."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def copy_modules(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Copy a tree of modules that shares parameters, hooks and attributes with the original.

    replace: returns the module to use instead of a given one, or None to copy it. `copy.copy` of a module shares its
    dictionaries of children and parameters (2.13), so each copy gets its own.
    """
    copies: dict[int, nn.Module] = {}  # by the original's id, so that a tied head stays tied

    def copied(original: nn.Module) -> nn.Module:
        if id(original) in copies:
            return copies[id(original)]
        own = replace(original)
        if own is None:
            own = copy.copy(original)
            vars(own).pop("forward", None)  # of activation checkpointing: it would call the original's layers
            own._modules = {name: child and copied(child) for name, child in original._modules.items()}
            own._parameters = dict(original._parameters)
        copies[id(original)] = own
        return own

    return copied(module)


# torch.compile replaces F.linear on a CPU by these operators of oneDNN (2.13), which have no public names.


def pack_weight(weight: Tensor, rows: int) -> Tensor:
    """Store a matrix (N, C) in oneDNN's blocks for inputs of about `rows` rows."""
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, rows))


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for x (..., C), with a contiguous weight or one from `pack_weight`."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


# FBGEMM's int8 products, of PyTorch's quantized tensors. These are deprecated (pytorch#184982, 2.13) but still the
# fastest: `torch.ops.onednn.qlinear_pointwise` takes 1.4 times as long per token, and torchao is slower than float32
# unless compiled.


def pack_int8(weight: Tensor) -> tuple[torch.ScriptObject, Tensor]:
    """Round each row of a matrix (N, C) to 127 steps of its largest number: packed for FBGEMM, and row sums (N,)."""
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny).double() / 127
    zero = torch.zeros(len(weight), dtype=torch.int64)
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        try:
            torch.backends.quantized.engine = "fbgemm"
            codes = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
            packed = cast(torch.ScriptObject, torch.ops.quantized.linear_prepack(codes, None))
        finally:
            torch.backends.quantized.engine = engine
    return packed, (codes.int_repr().sum(dim=1) * scale).float()


def unpack_int8(packed: torch.ScriptObject) -> Tensor:
    """The rounded matrix (N, C) that was packed, in float32."""
    return cast(Tensor, torch.ops.quantized.linear_unpack(packed)[0].dequantize())


def int8_linear(x: Tensor, scale: float, zero_point: int, packed: torch.ScriptObject) -> Tensor:
    """x (..., C) rounded to 8 bits, times a packed matrix -> (..., N) in float32."""
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return cast(Tensor, product(x, scale, zero_point, packed))
