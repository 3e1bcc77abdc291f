"""Random generators seeded by what they are for, so that one more sample or layer never changes another draw of the run."""

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
    import torch  # here, so that the command line does not import torch for `seed_for`

    return torch.Generator(device=device).manual_seed(seed_for(seed, *purpose))
