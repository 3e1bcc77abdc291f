"""How a model is laid out over the ranks: in one process, replicated (DDP), or sharded (FSDP2)."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.group import Ranks
from glassgpt.model.attention import FlexKernel
from glassgpt.model.gpt import GPT
from glassgpt.utils.errors import UserError
from glassgpt.utils.launcher import under_torchrun
from glassgpt.utils.rng import device_rng

# Shapes of a run: contexts and batches that double, each in two sizes of micro-batch. Over PyTorch's limit of 8 the
# rest would run uncompiled, after one warning.
RECOMPILE_LIMIT = 64


class Strategy:
    """How the model is laid out over the ranks; this class keeps it in one process."""

    name = "single"
    frees_gradients = True  # after each update

    def __init__(self, model: GPT, ranks: Ranks | None = None) -> None:
        self.model = model
        self.ranks = ranks or Ranks()
        self.forward: nn.Module = model  # what an update calls for the loss
        self._compiled: list[nn.Module] = [model]

    def compile(self, backend: str) -> None:
        """Compile the model in place: without a wrapper, names stay the same."""
        for module in self.model.modules():
            if isinstance(module, FlexKernel):  # see `FlexKernel.block_mask`
                module.block_mask(self.model.config.context_length, self.model.embedding.weight.device)
        for module in self._compiled:
            # Each shape on its own: dynamic shapes that an evaluation brings in make the kernels of training slower.
            module.compile(backend=backend, dynamic=False, recompile_limit=RECOMPILE_LIMIT)

    def gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Wraps a micro-step's forward and backward pass. The last one sums gradients over the ranks."""
        return nullcontext()

    def finish_update(self) -> None:
        """Free or zero the gradients after an update."""
        self.model.zero_grad(set_to_none=self.frees_gradients)
        self.ranks.update_completed()

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """The whole of a parameter, gradient or moment. Every rank must call this."""
        return tensor

    def shard_like(self, full: Tensor, parameter: Tensor) -> Tensor:
        """A tensor of a parameter's shape, laid out over the ranks like the parameter."""
        return full

    def full_model(self) -> GPT:
        """The model with all weights on each rank, for evaluation and generation, where ranks work apart."""
        return self.model

    def distributed_map(self, function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
        """The function of N matrices (N, R, C); each rank computes its share."""
        ranks = self.ranks
        if ranks.size == 1:
            return function(matrices)
        rest = -len(matrices) % ranks.size
        padded = torch.cat([matrices, matrices[:1].expand(rest, -1, -1)])  # so that all ranks have equally many
        return ranks.all_gather(function(padded[ranks.slice_of(len(padded))]))[: len(matrices)]


class DataParallel(Strategy):
    """DDP (Li et al., 2020): all weights on each rank; gradients are averaged during the last backward pass."""

    name = "ddp"
    frees_gradients = False  # they are views of the buckets: freed, they would be allocated twice

    def __init__(self, model: GPT, ranks: Ranks, device: torch.device) -> None:
        super().__init__(model, ranks)
        devices = [device] if device.type == "cuda" else None
        self.forward = self._wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        # Let DDP arrange its buckets in the order of the gradients, which it does once, in the second forward pass. If
        # the first update did that, a resumed run would sum it in another order, which changes bits with 3 ranks and
        # more. (`find_unused_parameters=True` keeps the first order, but walks the graph and warns on each rank.)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        with device_rng(device):  # dropout
            for _ in range(2):
                self.forward(ids, ids).backward()
        self.model.zero_grad(set_to_none=False)

    def gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._wrapped.no_sync()


class FullySharded(Strategy):
    """FSDP2 (Zhao et al., 2023; PyTorch's `fully_shard`): each rank holds a shard of every weight, gradient and moment.

    The weights of a block are gathered before it computes, forward and backward, and dropped after it. In bfloat16,
    blocks are gathered in bfloat16; gradients are summed in float32, and the residual stream stays in float32.
    """

    name = "fsdp"

    def __init__(self, model: GPT, ranks: Ranks, device: torch.device, config: TrainConfig, precision: str) -> None:
        from torch.distributed import fsdp
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(model, ranks)
        self._compiled = list(model.blocks)  # between blocks weights are gathered, which cannot be compiled
        self._device, self._mesh = device, init_device_mesh(device.type, (ranks.size,))
        dtype = torch.bfloat16 if precision == "bfloat16" else None
        policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        pinned = device.type == "cuda"
        offload = fsdp.CPUOffloadPolicy(pin_memory=pinned) if config.cpu_offload else fsdp.OffloadPolicy()
        for block in model.blocks:
            fsdp.fully_shard(block, mesh=self._mesh, mp_policy=policy, offload_policy=offload)
        fsdp.fully_shard(model, mesh=self._mesh, offload_policy=offload)
        self._fsdp = cast(fsdp.FSDPModule, model)  # `fully_shard` changes the model's class
        self._syncs_once = config.fsdp_gradient_sync == "update"

    def gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        if self._syncs_once:
            self._fsdp.set_requires_gradient_sync(is_last)
        return nullcontext()

    def full_tensor(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def shard_like(self, full: Tensor, parameter: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        # Every rank has the full tensor, so each takes its shard and nothing is sent.
        return distribute_tensor(full, self._mesh, parameter.placements, src_data_rank=None)

    def full_model(self) -> GPT:
        """A copy, without hooks that wait for other ranks."""
        copy = GPT.empty(self.model.config, self._device)
        with torch.no_grad():
            for target, parameter in zip(copy.parameters(), self.model.parameters(), strict=True):
                target.copy_(self.full_tensor(parameter.detach()))
        return copy.train(self.model.training)


# `auto` shards weights, gradients and AdamW's moments if they would take more of a GPU's memory than this share.
_REPLICATED_SHARE, _BYTES_PER_PARAMETER = 0.4, 16


def parallelize(model: GPT, config: TrainConfig, ranks: Ranks, device: torch.device, precision: str) -> Strategy:
    """Lay out a model that is equal on all ranks. Raises `UserError` for what the strategy does not support."""
    strategy = config.strategy if under_torchrun() else "single"
    if strategy == "auto":
        need = _BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in model.parameters())
        own = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
        memory = ranks.all_gather_numbers([own]).min()  # so that all ranks choose the same strategy
        strategy = "ddp" if ranks.size == 1 or need <= _REPLICATED_SHARE * memory else "fsdp"
    if strategy == "fsdp" and precision == "float16":
        raise UserError("fsdp does not support the loss scaling of float16: use --precision bfloat16 or --strategy ddp")
    if config.cpu_offload and strategy != "fsdp":
        raise UserError("cpu_offload needs --strategy fsdp and torchrun, for one process too (--nproc-per-node 1)")
    if strategy == "fsdp":
        return FullySharded(model, ranks, device, config, precision)
    return DataParallel(model, ranks, device) if ranks.size > 1 else Strategy(model, ranks)
