"""A small model that lessons train on the spot, once per process."""

import functools
import tempfile
from pathlib import Path

import torch

from glassgpt.config.recipes import recipe
from glassgpt.interop.references import load
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.training.progress import SilentProgress
from glassgpt.training.run import train


@functools.cache
def trained_model(steps: int = 150) -> tuple[GPT, Tokenizer]:
    """A character model of 2 layers and 4 heads of 16, trained on the Python documentation in a few seconds."""
    model = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 64}
    config = recipe(
        "demo", steps=steps, batch_tokens=1024, micro_batch_size=16, context_start=32, model=model,
        eval_every=0, eval_tokens=4096, checkpoint_every=0, sample={"max_new_tokens": 1}, probe={"every": 0},
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small trains no faster on two, and on a busy machine far slower
    try:
        with tempfile.TemporaryDirectory() as folder:
            trained, tokenizer = load(train(config, out=Path(folder, "run"), progress=SilentProgress()))
    finally:
        torch.set_num_threads(threads)
    assert tokenizer is not None
    return trained, tokenizer
