"""NVIDIA GPUs by their data sheets: peak arithmetic rates, memory and bandwidths."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheet."""

    name: str  # as it occurs in the name of a device
    memory: float  # bytes; a GB of the data sheet is taken as 10^9
    bandwidth: float  # bytes/s between memory and chip
    link: float  # bytes/s to another GPU of the host, in one direction: NVLink if there is one, otherwise PCIe x16
    peaks: dict[str, float]  # dense peak in FLOP/s (without sparsity) in each precision that the GPU supports


def _peaks(half: float, tf32: float | None, float32: float) -> dict[str, float]:
    """Peaks from TFLOP/s. GPUs without TF32 (before Ampere) lack bfloat16 as well."""
    if tf32 is None:
        return {"float16": half * 1e12, "float32": float32 * 1e12}
    return {"bfloat16": half * 1e12, "float16": half * 1e12, "tf32": tf32 * 1e12, "float32": float32 * 1e12}


# The names that `glassgpt plan --device` accepts. H100 and A100 are the SXM boards. Of names that contain each other,
# the longer one comes first.
GPUS: dict[str, Gpu] = {
    "b200": Gpu("B200", 180e9, 8000e9, 900e9, _peaks(2250, 1100, 75)),
    "h200": Gpu("H200", 141e9, 4800e9, 450e9, _peaks(989, 495, 67)),
    "h100-nvl": Gpu("H100 NVL", 94e9, 3938e9, 300e9, _peaks(835, 417, 60)),
    "h100-pcie": Gpu("H100 PCIe", 80e9, 2000e9, 64e9, _peaks(756, 378, 51)),
    "h100": Gpu("H100", 80e9, 3350e9, 450e9, _peaks(989, 495, 67)),
    "a100-80": Gpu("A100", 80e9, 2039e9, 300e9, _peaks(312, 156, 19.5)),
    "a100-40": Gpu("A100", 40e9, 1555e9, 300e9, _peaks(312, 156, 19.5)),
    "l40s": Gpu("L40S", 48e9, 864e9, 32e9, _peaks(362, 183, 91.6)),
    "a10": Gpu("A10", 24e9, 600e9, 32e9, _peaks(125, 62.5, 31.2)),
    "l4": Gpu("L4", 24e9, 300e9, 32e9, _peaks(121, 60, 30.3)),
    "v100-32": Gpu("V100", 32e9, 900e9, 150e9, _peaks(125, None, 15.7)),
    "v100-16": Gpu("V100", 16e9, 900e9, 150e9, _peaks(125, None, 15.7)),
    "t4": Gpu("T4", 16e9, 300e9, 16e9, _peaks(65, None, 8.1)),
    "rtx4090": Gpu("RTX 4090", 24e9, 1008e9, 32e9, _peaks(165, 82.6, 82.6)),
    "rtx3090": Gpu("RTX 3090", 24e9, 936e9, 32e9, _peaks(71, 35.6, 35.6)),
}


def find_gpu(device_name: str, memory: float | None = None) -> Gpu | None:
    """The GPU, of about `memory` bytes, that a device's name contains as whole words (an L40 is not an L4), or None."""
    named = [gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.name}\b", device_name) and "Laptop" not in device_name]
    boards = [gpu for gpu in named if gpu.name == named[0].name]
    return next((gpu for gpu in boards if memory is None or 0.85 < memory / gpu.memory < 1.2), None)
