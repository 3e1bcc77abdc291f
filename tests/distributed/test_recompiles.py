"""Compiled training never reaches dynamo's recompile limit, after which it would silently run uncompiled.

With the backend "eager", graphs are captured and counted, and run without optimization.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glassgpt.config.model import ModelConfig
from glassgpt.distributed.strategies import Strategy
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT
from kill_harness import tiny_config
from rank_harness import Harness

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WIDTHS: dict[str, Any] = {"n_embd": 8, "n_head": 2, "vocab_size": 20}


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """Return the program that forks the ranks."""
    started = Harness()
    yield started
    started.close()


@pytest.mark.parametrize(("layers", "kind"), [(2, "none"), (2, "full")])
def test_growing_contexts_compile_one_graph_per_shape(layers: int, kind: str) -> None:
    """Seven lengths from 16 to 1024 tokens, each in two micro-batch sizes, give 14 graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = GPT.create(ModelConfig(n_layer=layers, context_length=1024, **WIDTHS), 0).train()
    for block in model.blocks:
        checkpoint_activations(block, kind)
    strategy = Strategy(model)
    strategy.compile("eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in (16, 32, 64, 128, 256, 512, 1024):
            for rows in (2, 1, 2):
                ids = torch.zeros(rows, length, dtype=torch.int64)
                strategy.forward(ids, ids).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 14


@pytest.mark.parametrize(("layers", "kind"), [(12, "none"), (12, "full"), (48, "selective")])
def test_separately_compiled_blocks_under_fsdp_stay_below_the_recompile_limit(
    harness: Harness, tmp_path: Path, text: Path, layers: int, kind: str
) -> None:
    """All blocks share the graphs of one block, for five lengths, each in two micro-batch sizes."""
    config = tiny_config(
        text,
        model={"n_layer": layers, "n_embd": 8, "n_head": 2, "context_length": 128},
        batch_tokens=1024,
        context_start=8,
        steps=10,
        eval_every=0,
        checkpoint_every=0,
        sample={"count": 0},
        micro_batch_size=3,
        activation_checkpointing=kind,
        strategy="fsdp",
    )
    counts = harness.run(2, "compiled_frames", config=config.to_dict(), out=tmp_path / "run")
    assert all(count["graphs"] > 0 for count in counts), counts
    print(layers, kind, counts)
