"""Normalisations whose weights follow the dtype of their input.

On a CPU autocast leaves that to the module, and mixed the fused kernel is lost; sharded training in bfloat16 hands out
bfloat16 weights beside a float32 residual stream.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al., 2016) over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) of any dtype -> (..., C)."""
        return F.layer_norm(x, self.normalized_shape, _like(self.weight, x), _like(self.bias, x), self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich, 2019) over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) of any dtype -> (..., C)."""
        return F.rms_norm(x, self.normalized_shape, _like(self.weight, x), self.eps)


def _like(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)
