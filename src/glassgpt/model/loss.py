"""Head and cross-entropy in one: from hidden states to the loss, without ever holding all logits.

At a vocabulary of 50,304 the logits of 16 x 1024 tokens fill 3.3 GB in float32, and their gradient as much again. Here
rows go through the head a chunk at a time, and each chunk's gradient is taken while its logits are there.

Shapes: `N` rows (batch x time), `C` channels, `V` padded vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Targets with this value have no loss and no gradient (PyTorch's own convention).
IGNORED = -100
# Logits in one chunk: 64 MiB of float32. Small enough to stay clear of the peak, large enough for efficient products.
CHUNK_ELEMENTS = 2**24
# Rows in one chunk: their products are added up in the compute dtype, and more of them could overflow float16.
CHUNK_ROWS = 2048
# On a GPU: GPT-2's 50,304 logits of so many rows are 1.6 GB, and a larger vocabulary has no more of them in a chunk. With fewer the
# head's gradient is read and written more often, and what is compiled is as many times longer as there are chunks: at
# `CHUNK_ELEMENTS` 197 times for 64 x 1024 tokens.
GPU_CHUNK_ROWS = 8192
GPU_CHUNK_ELEMENTS = 2**29

# Rows of the head that a CPU multiplies at once for evaluation, where products are half as fast again, since they stay in its cache;
# and whose gradient it adds up at once, since a product in bfloat16 is copied to float32 for it.
CPU_VOCAB_BLOCK = 4096


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Squash logits into (-cap, cap) by cap * tanh(logits / cap) (Gemma 2, 2024); unchanged where cap is None."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _rows_of_a_chunk(dtype: torch.dtype, device: str, columns: int) -> int:
    if device == "cuda":
        return CHUNK_ROWS if dtype == torch.float16 else max(1, min(GPU_CHUNK_ROWS, GPU_CHUNK_ELEMENTS // columns))
    return max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // columns))


def _in_compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast would make of the two factors; done once, since an autograd function is opaque to autocast."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _losses_and_gradient(logits: Tensor, targets: Tensor, vocab_size: int, cap: float | None) -> tuple[Tensor, Tensor]:
    """Loss of each row (n,), and its gradient by the logits (n, V), which takes their place: softmax - onehot.

    targets (n,). The logits are gone after that: at GPT-2's vocabulary each further copy would be a tenth of a small run's memory.
    """
    slope = None
    if cap is not None:
        logits = logits.div_(cap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(cap)
    logits[:, vocab_size:] = -torch.inf
    kept = targets != IGNORED
    target = targets.masked_fill(~kept, 0)[:, None]  # not clamp: another negative id is a mistake, and gather says so
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    own = logits.gather(1, target)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    losses = (total.log() - own)[:, 0] * kept
    gradient = _minus_one_at(target, logits.div_(total)).mul_(kept[:, None])
    return losses, gradient if slope is None else gradient.mul_(slope)


def _minus_one_at(target: Tensor, p: Tensor) -> Tensor:
    """p (n, V), 1 less at the targets (n, 1); p itself is changed, or lost."""
    if torch.compiler.is_compiling():
        # A scatter would part the pass that turns logits into their gradient in two, with p in memory in between.
        return torch.where(torch.arange(p.shape[1], device=p.device) == target, p - 1, p)
    return p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over the rows that are not ignored; the gradient is formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None, device: str
    ) -> Tensor:
        h, w = _in_compute_dtype(hidden, weight)
        total = torch.zeros((), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        rows = _rows_of_a_chunk(w.dtype, device, w.shape[0])
        block = CPU_VOCAB_BLOCK if device == "cpu" else len(w)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, h.shape[0], rows):
                chunk = h[start : start + rows]
                losses, grad = _losses_and_gradient(
                    (chunk @ w.T).to(total.dtype), targets[start : start + rows], vocab_size, cap
                )
                total += losses.sum()
                # It stays unnormalised here: divided by the number of rows it would fall below float16's smallest number, so the
                # division waits for the backward pass.
                grad = grad.to(h.dtype)
                grad_hidden[start : start + rows] = grad @ w
                for first in range(0, len(w), block):
                    grad_weight[first : first + block] += grad[:, first : first + block].T @ chunk
                del grad  # else it lies beside the next chunk's logits
        count = (targets != IGNORED).sum()
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad_output / count
        return grad_hidden * scale, grad_weight * scale, None, None, None, None


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    cap: float | None = None,
    chunked_for: str | None = None,
) -> Tensor:
    """Mean next-token loss in nats, with gradients for the hidden states and the head.

    hidden (..., C); weight (V, C), rows from `vocab_size` on being padding, which gets no probability and no gradient;
    targets (...), `IGNORED` to leave a position out. Chunks are those of the tensors' device, or of the type `chunked_for`.
    Returns a scalar, at least float32.
    """
    device = chunked_for or hidden.device.type
    loss: Tensor = _MeanCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), vocab_size, cap, device)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None = None) -> Tensor:
    """Loss of each token in nats, without gradients, for evaluation; shapes as in `cross_entropy`.

    Returns the shape of targets, at least float32, 0 where a target is `IGNORED`.
    """
    h, w = _in_compute_dtype(hidden.flatten(0, -2), weight)
    flat = targets.flatten()
    block = min(vocab_size, CPU_VOCAB_BLOCK) if h.device.type == "cpu" else vocab_size
    rows = _rows_of_a_chunk(w.dtype, w.device.type, block)
    with torch.autocast(h.device.type, enabled=False):
        losses = [
            _losses_of_rows(h[i : i + rows], w, flat[i : i + rows], vocab_size, cap, block)
            for i in range(0, len(h), rows)
        ]
    return torch.cat(losses).view(targets.shape)


def _losses_of_rows(h: Tensor, w: Tensor, targets: Tensor, vocab_size: int, cap: float | None, block: int) -> Tensor:
    """log(sum(exp(logits))) - logits[target], the sum a block of the vocabulary at a time, each scaled by the largest logit so far."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    largest = torch.full((len(h),), -torch.inf, dtype=dtype, device=h.device)
    total = torch.zeros_like(largest)
    ignored = targets == IGNORED
    target = targets.masked_fill(
        ignored, 0
    )  # not clamp: another negative id is a mistake, and this gather (of nothing) says so
    own = total[:, None].expand(-1, vocab_size).gather(1, target[:, None])[:, 0]
    for start in range(0, vocab_size, block):
        logits = soft_cap((h @ w[start : min(start + block, vocab_size)].T).to(dtype), cap)
        here = (target >= start) & (target < start + logits.shape[1])
        own = torch.where(here, logits.gather(1, torch.where(here, target - start, 0)[:, None])[:, 0], own)
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
        total = total * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(dim=1)
    return (total.log() + largest - own).masked_fill(ignored, 0.0)
