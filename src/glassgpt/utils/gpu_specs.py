"""NVIDIA GPUs by their data sheets: peak arithmetic rates, memory and bandwidths."""

import re
from dataclasses import dataclass

# Dense peak in FLOP/s by precision (without sparsity). The first name that occurs as whole words in a device's name
# counts, so longer names come first; an L40 is not an L4, and an RTX A1000 is not an A100.
GPU_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bfloat16": 2250e12, "float16": 2250e12, "tf32": 1100e12, "float32": 75e12}),
    ("H200", {"bfloat16": 989e12, "float16": 989e12, "tf32": 495e12, "float32": 67e12}),
    ("H100 PCIe", {"bfloat16": 756e12, "float16": 756e12, "tf32": 378e12, "float32": 51e12}),
    ("H100 NVL", {"bfloat16": 835e12, "float16": 835e12, "tf32": 417e12, "float32": 60e12}),
    ("H100", {"bfloat16": 989e12, "float16": 989e12, "tf32": 495e12, "float32": 67e12}),
    ("L40S", {"bfloat16": 362e12, "float16": 362e12, "tf32": 183e12, "float32": 91.6e12}),
    ("A100", {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12}),
    ("A10", {"bfloat16": 125e12, "float16": 125e12, "tf32": 62.5e12, "float32": 31.2e12}),
    ("L4", {"bfloat16": 121e12, "float16": 121e12, "tf32": 60e12, "float32": 30.3e12}),
    ("V100", {"float16": 125e12, "float32": 15.7e12}),
    ("T4", {"float16": 65e12, "float32": 8.1e12}),
    ("RTX 4090", {"bfloat16": 165e12, "float16": 165e12, "tf32": 82.6e12, "float32": 82.6e12}),
    ("RTX 3090", {"bfloat16": 71e12, "float16": 71e12, "tf32": 35.6e12, "float32": 35.6e12}),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheet."""

    name: str  # as in `GPU_PEAKS`
    memory: float  # bytes; a GB of the data sheet is taken as 10^9
    bandwidth: float  # bytes/s between memory and chip
    link: float  # bytes/s to another GPU of the host, in one direction: NVLink if there is one, otherwise PCIe x16

    @property
    def peaks(self) -> dict[str, float]:
        """FLOP/s of matrix products in each precision that the GPU supports."""
        return dict(GPU_PEAKS)[self.name]

    def matches(self, device_name: str, memory: float) -> bool:
        """Whether a device of this name and memory (bytes) is one of these."""
        return data_sheet(device_name)[0] == self.name and 0.85 < memory / self.memory < 1.2


# The names that `glassgpt plan --device` accepts. H100 and A100 are the SXM boards.
GPUS: dict[str, Gpu] = {
    "b200": Gpu("B200", 180e9, 8000e9, 900e9),
    "h200": Gpu("H200", 141e9, 4800e9, 450e9),
    "h100": Gpu("H100", 80e9, 3350e9, 450e9),
    "h100-nvl": Gpu("H100 NVL", 94e9, 3938e9, 300e9),
    "h100-pcie": Gpu("H100 PCIe", 80e9, 2000e9, 64e9),
    "a100-80": Gpu("A100", 80e9, 2039e9, 300e9),
    "a100-40": Gpu("A100", 40e9, 1555e9, 300e9),
    "l40s": Gpu("L40S", 48e9, 864e9, 32e9),
    "a10": Gpu("A10", 24e9, 600e9, 32e9),
    "l4": Gpu("L4", 24e9, 300e9, 32e9),
    "v100-32": Gpu("V100", 32e9, 900e9, 150e9),
    "v100-16": Gpu("V100", 16e9, 900e9, 150e9),
    "t4": Gpu("T4", 16e9, 300e9, 16e9),
    "rtx4090": Gpu("RTX 4090", 24e9, 1008e9, 32e9),
    "rtx3090": Gpu("RTX 3090", 24e9, 936e9, 32e9),
}


def data_sheet(device_name: str) -> tuple[str, dict[str, float]]:
    """The name in `GPU_PEAKS` that a device's name contains, and its peaks; empty for others and laptops."""
    if "Laptop" in device_name:
        return "", {}
    return next(((name, peaks) for name, peaks in GPU_PEAKS if re.search(rf"\b{name}\b", device_name)), ("", {}))
