"""The one place that uses private names of PyTorch, each with the reason and the release that it was checked with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
