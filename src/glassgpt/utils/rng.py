"""Random generators seeded by what they are for, so that one more sample never changes another draw."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `seed_for(1337, "batch", epoch)`, the same everywhere."""
    key = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, *purpose: str | int) -> "torch.Generator":
    """A torch generator on the CPU for one purpose; see `seed_for`."""
    import torch  # here, so that the command line does not import torch for `seed_for`

    return torch.Generator().manual_seed(seed_for(seed, *purpose))


@contextmanager
def device_rng(device: "torch.device") -> "Iterator[Callable[[int], object]]":
    """Yield a function that seeds the device's global generator, as dropout uses it; restore its state afterwards."""
    import torch

    seed: Callable[[int], object]
    restore: Callable[[], object]
    if device.type == "mps":
        seed, restore = torch.mps.manual_seed, partial(torch.mps.set_rng_state, torch.mps.get_rng_state())
    else:
        generator = torch.default_generator
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = torch.cuda.default_generators[index]
        seed, restore = generator.manual_seed, partial(generator.set_state, generator.get_state())
    try:
        yield seed
    finally:
        restore()
