"""Output head and cross-entropy in one: from hidden states to the loss, without holding all logits at once.

At a vocabulary of 50,304 the logits of 16 x 1024 tokens take 3.3 GB in float32, and their gradient as much again. Here
rows go through the head in chunks, and the gradient of a chunk is formed while its logits exist.

Shapes: `N` rows (batch x time), `C` channels, `V` padded vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # targets with this value have no loss and no gradient (PyTorch's own convention)
CHUNK_ELEMENTS = 2**24  # logits per chunk: 64 MiB of float32, little in a step, enough for efficient products
CHUNK_ROWS = 2048  # their products are summed in the compute dtype, and more of them could overflow float16
# On a GPU: GPT-2's 50,304 logits of this many rows are 1.6 GB; a larger vocabulary gets fewer rows. Smaller chunks read
# and write the head's gradient more often, and compiled code repeats per chunk.
GPU_CHUNK_ROWS, GPU_CHUNK_ELEMENTS = 8192, 2**29
# Rows of the head that a CPU handles at once: in evaluation they stay in its cache (1.5 times as fast), and their
# gradient in bfloat16 is converted to float32 before it is added.
CPU_VOCAB_BLOCK = 4096


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Squash logits into (-cap, cap) by cap * tanh(logits / cap) (Gemma 2, 2024); unchanged if cap is None."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def rows_per_chunk(dtype: torch.dtype, device: str, columns: int) -> int:
    if device == "cuda":
        return CHUNK_ROWS if dtype == torch.float16 else max(1, min(GPU_CHUNK_ROWS, GPU_CHUNK_ELEMENTS // columns))
    return max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // columns))


def _in_compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The factors as autocast would cast them; autocast does not see inside an autograd function."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _losses_and_gradient(logits: Tensor, targets: Tensor, vocab_size: int, cap: float | None) -> tuple[Tensor, Tensor]:
    """Loss of each row (n,), and its gradient by the logits (n, V), softmax - onehot, which overwrites the logits.

    In place, because at GPT-2's vocabulary each further copy would be a tenth of a small run's memory.
    """
    slope = None
    if cap is not None:
        logits = logits.div_(cap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(cap)
    logits[:, vocab_size:] = -torch.inf
    kept = targets != IGNORED
    target = targets.masked_fill(~kept, 0)[:, None]  # not clamp: gather then reports any other negative id
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    own = logits.gather(1, target)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    losses = (total.log() - own)[:, 0] * kept
    p = logits.div_(total)
    if torch.compiler.is_compiling():
        # A scatter would split the kernel that turns logits into their gradient, with p in memory in between.
        p = torch.where(torch.arange(p.shape[1], device=p.device) == target, p - 1, p)
    else:
        p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
    gradient = p.mul_(kept[:, None])
    return losses, gradient if slope is None else gradient.mul_(slope)


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over rows that are not ignored. The forward pass forms the gradients that are needed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None
    ) -> Tensor:
        device = hidden.device.type
        h, w = _in_compute_dtype(hidden, weight)
        total = torch.zeros((), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        rows = rows_per_chunk(w.dtype, device, w.shape[0])
        block = CPU_VOCAB_BLOCK if device == "cpu" else len(w)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, h.shape[0], rows):
                chunk = h[start : start + rows]
                losses, grad = _losses_and_gradient(
                    (chunk @ w.T).to(total.dtype), targets[start : start + rows], vocab_size, cap
                )
                total += losses.sum()
                # The backward pass divides by the number of rows: here the result would underflow in float16.
                grad = grad.to(h.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = grad @ w
                if grad_weight is not None:
                    for first in range(0, len(w), block):
                        grad_weight[first : first + block] += grad[:, first : first + block].T @ chunk
                del grad  # frees it before the next chunk's logits
        count = (targets != IGNORED).sum()
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        *gradients, count = ctx.saved_tensors
        scale = grad_output / count
        grad_hidden, grad_weight = (None if gradient is None else gradient * scale for gradient in gradients)
        return grad_hidden, grad_weight, None, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None = None) -> Tensor:
    """Mean next-token loss in nats: a scalar, at least float32. Gradients are computed only for inputs that need them.

    hidden (..., C); weight (V, C), whose rows from `vocab_size` on are padding, without probability or gradient;
    targets (...), with `IGNORED` for positions to leave out.
    """
    if not torch.is_grad_enabled():
        return token_losses(hidden, weight, targets, vocab_size, cap).sum() / (targets != IGNORED).sum()
    apply: Callable[..., Tensor] = _MeanCrossEntropy.apply
    return apply(hidden.flatten(0, -2), weight, targets.flatten(), vocab_size, cap)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None = None) -> Tensor:
    """Loss of each token in nats, without gradients, for evaluation; shapes as in `cross_entropy`.

    Returns the shape of targets, at least float32, 0 where a target is `IGNORED`.
    """
    h, w = _in_compute_dtype(hidden.flatten(0, -2), weight)
    flat = targets.flatten()
    block = min(vocab_size, CPU_VOCAB_BLOCK) if h.device.type == "cpu" else vocab_size
    rows = rows_per_chunk(w.dtype, w.device.type, block)
    with torch.autocast(h.device.type, enabled=False):
        losses = [
            _losses_of_rows(h[i : i + rows], w, flat[i : i + rows], vocab_size, cap, block)
            for i in range(0, len(h), rows)
        ]
    return torch.cat(losses).view(targets.shape)


def _losses_of_rows(h: Tensor, w: Tensor, targets: Tensor, vocab_size: int, cap: float | None, block: int) -> Tensor:
    """log(sum(exp(logits))) - logits[target], block by block of the vocabulary."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    largest = torch.full((len(h),), -torch.inf, dtype=dtype, device=h.device)
    total = torch.zeros_like(largest)
    ignored = targets == IGNORED
    target = targets.masked_fill(ignored, 0)  # not clamp: the gather below then reports any other negative id
    own = total[:, None].expand(-1, vocab_size).gather(1, target[:, None])[:, 0]
    for start in range(0, vocab_size, block):
        logits = soft_cap((h @ w[start : min(start + block, vocab_size)].T).to(dtype), cap)
        here = (target >= start) & (target < start + logits.shape[1])
        own = torch.where(here, logits.gather(1, torch.where(here, target - start, 0)[:, None])[:, 0], own)
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
        total = total * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(dim=1)
    return (total.log() + largest - own).masked_fill(ignored, 0.0)
