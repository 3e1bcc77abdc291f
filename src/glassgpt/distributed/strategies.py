"""How a model lies over the ranks: whole in one process, whole on each (DDP), or in parts (FSDP2).

Shapes: `W` ranks, `N` matrices of one shape (R, C).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.group import Ranks, under_torchrun
from glassgpt.model.attention import FlexKernel
from glassgpt.model.gpt import GPT
from glassgpt.utils.errors import UserError


class Strategy:
    """How the model lies over the ranks. This one: whole, in one process."""

    name = "single"

    def __init__(self, model: GPT, ranks: Ranks | None = None) -> None:
        self.model = model
        self.ranks = ranks or Ranks()
        self.forward: nn.Module = model
        """What an update calls for the loss."""

    def compile(self, backend: str) -> None:
        """Compile what computes, in place: no wrapper, so names stay as they are."""
        build_block_masks(self.model)
        # For each shape by itself. Left to guess, the compiler would take every shape that varies in an evaluation for one that
        # varies in training too, whose kernels would be slower for it.
        self.model.compile(backend=backend, dynamic=False)

    def gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-step; the ranks' gradients meet in the last one of an update at the latest."""
        return nullcontext()

    def zero_grad(self) -> None:
        """Behind an update, before the next."""
        self.model.zero_grad(set_to_none=True)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """A parameter, or its gradient or moment, all of it."""
        return tensor

    def shard_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """A tensor of a parameter's shape, laid out over the ranks as that is."""
        return whole

    @contextmanager
    def full_model(self) -> Iterator[GPT]:
        """The model with all of its weights, on each rank: for evaluation and for writing, where ranks go their own ways."""
        yield self.model

    def distributed_map(self, function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
        """The function of each matrix (N, R, C), which every rank computes for a part of them."""
        ranks = self.ranks
        if ranks.size == 1:
            return function(matrices)
        rest = -len(matrices) % ranks.size  # filled up with the first ones, so that all have as many
        padded = torch.cat([matrices, matrices[:1].expand(rest, -1, -1)])
        return ranks.all_gather(function(padded[ranks.slice_of(len(padded))]))[: len(matrices)]


class DataParallel(Strategy):
    """DDP (Li et al., 2020): all weights on each rank, gradients averaged while the last backward pass goes on."""

    name = "ddp"

    def __init__(self, model: GPT, ranks: Ranks, device: torch.device) -> None:
        super().__init__(model, ranks)
        devices = [device] if device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        self.forward = self._wrapped
        self._settle(device)

    def _settle(self, device: torch.device) -> None:
        """Let DDP arrange its buckets by the order of the gradients, which it does once, behind its first backward pass.

        Left to the first update, a resumed run would sum that one in another order than a run that never stopped; with 3 ranks
        and more that gives other bits. (`find_unused_parameters=True` would keep the first order, at the cost of a walk through
        the graph and a warning on each rank.)
        """
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        for _ in range(2):  # the second forward pass is where they are arranged
            self.forward(ids, ids).backward()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=False)  # they are the buckets: dropped, new ones would lie beside these

    def gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._wrapped.no_sync()


class FullySharded(Strategy):
    """FSDP2 (Zhao et al., 2023; PyTorch's `fully_shard`): each rank holds a part of every weight, gradient and moment.

    A block's weights are gathered before it computes, forward and backward, and dropped behind it; a tied head stays with the
    embedding in the root's group. In bfloat16 blocks are gathered in that, gradients are summed in float32, and the residual
    stream stays in float32 as under autocast.
    """

    name = "fsdp"

    def __init__(self, model: GPT, ranks: Ranks, device: torch.device, config: TrainConfig, precision: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        super().__init__(model, ranks)
        self._mesh = init_device_mesh(device.type, (ranks.size,))
        dtype = torch.bfloat16 if precision == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else OffloadPolicy()
        for block in model.blocks:
            fully_shard(block, mesh=self._mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(model, mesh=self._mesh, offload_policy=offload)
        self._device = device

    def compile(self, backend: str) -> None:
        build_block_masks(self.model)
        for block in self.model.blocks:  # between them weights are gathered, which is not to be compiled
            block.compile(backend=backend, dynamic=False)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def shard_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        # Every rank has the whole, so each takes its part and nothing is sent.
        return distribute_tensor(whole, self._mesh, parameter.placements, src_data_rank=None)

    @contextmanager
    def full_model(self) -> Iterator[GPT]:
        """A copy for the time being: no hook in it waits for another rank."""
        copy = GPT.empty(self.model.config, self._device)
        with torch.no_grad():
            for target, parameter in zip(copy.parameters(), self.model.parameters(), strict=True):
                target.copy_(self.full_tensor(parameter.detach()))
        yield copy.train(self.model.training)


def build_block_masks(model: GPT) -> None:
    """Have a model that is about to be compiled keep the masks of its texts, where its kernels have some."""
    for block in model.blocks:
        kernel = block.attention.kernel  # type: ignore[union-attr]
        if isinstance(kernel, FlexKernel):
            kernel.block_mask(model.config.context_length, model.embedding.weight.device)


# Share of a GPU's memory that weights, gradients and AdamW's moments may take on each rank before `auto` shards them: activations
# and logits need the rest.
_REPLICATED_SHARE = 0.4
_BYTES_A_PARAMETER = 16


def parallelize(model: GPT, config: TrainConfig, ranks: Ranks, device: torch.device, precision: str) -> Strategy:
    """Lay a model, whole and the same on each rank, out over the ranks. Raises `UserError` for what the strategy cannot do."""
    strategy = config.strategy if under_torchrun() else "single"
    if strategy == "auto":
        need = _BYTES_A_PARAMETER * sum(parameter.numel() for parameter in model.parameters())
        own = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
        room = ranks.all_gather_numbers([own]).min()  # all come to the same strategy
        strategy = "ddp" if ranks.size == 1 or need <= _REPLICATED_SHARE * room else "fsdp"
    if strategy == "fsdp" and precision == "float16":
        raise UserError(
            "float16 has a loss scale, which fsdp does not know: use --precision bfloat16, or --strategy ddp"
        )
    if config.cpu_offload and strategy != "fsdp":
        raise UserError(
            "cpu_offload is a part of fsdp, which needs torchrun: torchrun --standalone --nproc-per-node 1 -m glassgpt train …"
        )
    if strategy == "fsdp":
        return FullySharded(model, ranks, device, config, precision)
    return DataParallel(model, ranks, device) if ranks.size > 1 else Strategy(model, ranks)
