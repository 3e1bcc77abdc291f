"""Randomness has a name: every draw comes from a generator seeded by what it is for.

So one more sample, or one more layer, never moves another draw of the run.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `seed_for(1337, "batch", epoch)`: the same on every machine and version."""
    key = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, *purpose: str | int, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A torch generator for one purpose; see `seed_for`."""
    import torch  # here, so that the command line can read this module's users without paying for torch

    return torch.Generator(device=device).manual_seed(seed_for(seed, *purpose))
