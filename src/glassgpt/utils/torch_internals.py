"""The one place that uses private names of PyTorch, each with the reason and the release that it was checked with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# What selective activation checkpointing keeps: the results of matrix products and of attention. torch.utils.checkpoint (2.13) asks
# its policy about operators, and operators have no public names.
_aten = torch.ops.aten
CHECKPOINTED_OPERATORS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model's modules without `torch.compile` inside the block: for lengths that change, and for hooks.

    Each new length would be compiled, and hooks do not fire in compiled modules. `torch.compiler.set_stance` (2.13) does the same, but
    for the whole process, so that two threads could leave it changed.
    """
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

    They are recognised by their module's name (2.13). The public ways are slow: `torch.device("meta")` imports torch's compiler, 1.1 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", *args[:1])
        return func(*args, **kwargs)
