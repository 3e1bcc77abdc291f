"""Random generators seeded by what they are for, so that one more sample never changes another draw."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `seed_for(1337, "batch", epoch)`, the same everywhere."""
    key = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, *purpose: str | int, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A torch generator for one purpose; see `seed_for`."""
    import torch  # here, so that the command line does not import torch for `seed_for`

    return torch.Generator(device=device).manual_seed(seed_for(seed, *purpose))


@contextmanager
def device_rng(device: "torch.device") -> "Iterator[Callable[[int], object]]":
    """Yield a function that seeds the device's global generator; restore that generator's state afterwards.

    For operations that take no generator of their own, such as dropout.
    """
    import torch

    if device.type == "mps":
        state = torch.mps.get_rng_state()
        try:
            yield torch.mps.manual_seed
        finally:
            torch.mps.set_rng_state(state)
        return
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    else:
        generator = torch.default_generator
    state = generator.get_state()
    try:
        yield generator.manual_seed
    finally:
        generator.set_state(state)
