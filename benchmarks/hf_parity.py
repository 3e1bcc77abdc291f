"""Compare glassgpt with transformers at the sizes of real models: the same logits in both directions, and known
parameter counts.

    python benchmarks/hf_parity.py gpt2 gpt2-xl

Weights are random (nothing is downloaded) and larger than at the start of training, so that norms and biases matter.
One size at a time is written to a temporary directory by one side and read by the other. gpt2-xl needs 19 GB of memory,
mapped files included, and 7 GB of disk.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from glassgpt.config.model import ModelConfig
from glassgpt.interop.hf_models import export_hf, open_hf
from glassgpt.model.gpt import GPT

library: Any = transformers  # much of it is untyped
# Float32 sums over widths of up to 6,400 in another order, through up to 48 blocks; logits are of the order of 1 to 10.
BAR = 2e-4
TINY_LLAMA = ModelConfig(
    vocab_size=32000,
    context_length=2048,
    n_layer=22,
    n_head=32,
    n_kv_head=4,
    n_embd=2048,
    n_inner=5632,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tied_head=False,
)
SIZES = {
    "gpt2": (ModelConfig(vocab_size=50257), 124_439_808),
    "gpt2-medium": (ModelConfig(vocab_size=50257, n_layer=24, n_head=16, n_embd=1024), 354_823_168),
    "gpt2-large": (ModelConfig(vocab_size=50257, n_layer=36, n_head=20, n_embd=1280), 774_030_080),
    "gpt2-xl": (ModelConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600), 1_557_611_200),
    "tinyllama": (TINY_LLAMA, 1_100_048_384),
}


@torch.no_grad()
def enliven(model: nn.Module, seed: int) -> None:
    """Draw matrices with twice GPT-2's initial deviation, norm weights around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.normal_(float(is_scale), 0.04 if parameter.ndim > 1 else 0.2, generator=generator)


@torch.no_grad()
def difference(ours: GPT, theirs: Any, tokens: int) -> tuple[float, float]:
    """The largest difference between two texts' logits, and the largest logit."""
    ids = torch.randint(ours.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(1))
    a, b = ours(ids), theirs(ids).logits
    return (a - b).abs().max().item(), b.abs().max().item()


def from_us(config: ModelConfig, folder: Path, tokens: int) -> tuple[float, float]:
    """Ours, exported and read by transformers."""
    ours = GPT.empty(config).eval()
    enliven(ours, seed=0)
    export_hf(ours, None, folder)
    return difference(ours, library.AutoModelForCausalLM.from_pretrained(folder).eval(), tokens)


def from_them(their_config: Any, folder: Path, tokens: int) -> tuple[float, float, int]:
    """Theirs, saved and read by us; and our number of parameters."""
    theirs = library.AutoModelForCausalLM.from_config(their_config).eval()
    enliven(theirs, seed=1)
    theirs.save_pretrained(folder)
    found = open_hf(folder)
    ours = GPT.empty(found.model_config).eval()
    found.load_model(ours)
    return *difference(ours, theirs, tokens), sum(parameter.numel() for parameter in ours.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=f"from {', '.join(SIZES)}; default: all")
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    if unknown := set(arguments.sizes) - SIZES.keys():
        parser.error(f"unknown size {min(unknown)!r}")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    good = True
    for size in arguments.sizes:
        (config, expected), began = SIZES[size], time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "ours"
            exported, logit = from_us(config, folder, arguments.tokens)
            their_config = library.AutoConfig.from_pretrained(folder)
        gc.collect()
        with tempfile.TemporaryDirectory() as temporary:
            imported, _, parameters = from_them(their_config, Path(temporary) / "theirs", arguments.tokens)
        gc.collect()
        fine = max(exported, imported) <= BAR and parameters == expected
        good &= fine
        verdict = "ok" if fine else f"NOT OK: bar {BAR}, {expected:,} parameters"
        differences = f"export {exported:.1e}  import {imported:.1e}  (largest logit {logit:.1f})"
        seconds = f"{time.perf_counter() - began:.0f} s"
        print(f"{size:<12} {parameters:>13,} parameters  {differences}  {seconds}  {verdict}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
