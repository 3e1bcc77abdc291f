"""Effect of each part of a model or of its training on the loss: one run per variant, everything else as in the recipe.

    python benchmarks/ablation.py slots --data input.txt --out runs/slots            # 25 runs of shakespeare-cpu
    python benchmarks/ablation.py speedrun --data input.txt --out runs/parts --seeds 3   # 31 times 3 runs of speedrun

All variants train on equally many tokens. Finished runs are not repeated, so an interrupted call can be repeated.
Prints a Markdown table: parameters, validation loss on the whole split (mean and standard deviation over the seeds),
the difference to the recipe, and the processor time of a run, evaluations included, relative to the recipe's
(medians; comparable if one call did all runs on an otherwise idle machine).
"""

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import glassgpt as g
from glassgpt.interop.references import find_checkpoint
from glassgpt.model.summary import ModelSummary
from glassgpt.training.progress import SilentProgress
from glassgpt.utils.device import keep_freed_memory
from glassgpt.utils.files import user_path

# Name of a run -> its changes to the recipe.
SLOTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "positions: rope": {"model": {"position": "rope"}},
    "positions: sinusoidal": {"model": {"position": "sinusoidal"}},
    "positions: none": {"model": {"position": "none"}},
    "heads: 2 key-value": {"model": {"n_kv_head": 2}},
    "heads: 1 key-value": {"model": {"n_kv_head": 1}},
    "heads: twice as wide": {"model": {"head_dim": 64}},
    "span: window 16": {"model": {"window": 16}},
    "span: window 16, 4 global": {"model": {"window": 16, "window_globals": 4}},
    "span: window 16, fourth layer full": {"model": {"window": 16, "window_pattern": "SSSL"}},
    "norm: LayerNorm with bias": {"model": {"norm_bias": True}},
    "norm: RMSNorm": {"model": {"norm": "rmsnorm"}},
    "norm: RMSNorm without weight": {"model": {"norm": "rmsnorm", "norm_weight": False}},
    "norm: of the embedding too": {"model": {"embedding_norm": True}},
    "norm: QK-norm": {"model": {"qk_norm": True}},
    "norm: QK-norm, rope": {"model": {"qk_norm": True, "position": "rope"}},
    "feed-forward: GELU, exact": {"model": {"activation": "gelu"}},
    "feed-forward: ReLU": {"model": {"activation": "relu"}},
    "feed-forward: squared ReLU": {"model": {"activation": "relu_squared"}},
    "feed-forward: SiLU": {"model": {"activation": "silu"}},
    "feed-forward: SwiGLU": {"model": {"activation": "swiglu"}},
    "feed-forward: half as wide": {"model": {"n_inner": 256}},
    "biases: everywhere": {"model": {"bias": True}},
    "head: untied": {"model": {"tied_head": False}},
    "head: soft-cap 15": {"model": {"logit_softcap": 15.0}},
}
ADAMW: dict[str, Any] = {"name": "adamw", "beta2": 0.99, "warmup_steps": 20, "grad_clip": 1.0}
SPEEDRUN: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "AdamW, warmup, clipping, rate 2e-3": {"optim": ADAMW | {"lr": 2e-3}},
    "AdamW, warmup, clipping, rate 4e-3": {"optim": ADAMW | {"lr": 4e-3}},
    "AdamW, warmup, clipping, rate 8e-3": {"optim": ADAMW | {"lr": 8e-3}},
    "Muon, rate 1e-2": {"optim": {"lr": 1e-2}},
    "Muon, rate 2e-2": {"optim": {"lr": 2e-2}},
    "Muon, momentum 0.9": {"optim": {"momentum": 0.9}},
    "Muon, momentum 0.95": {"optim": {"momentum": 0.95}},
    "weight decay 0.1": {"optim": {"weight_decay": 0.1}},
    "clipping at 1": {"optim": {"grad_clip": 1.0}},
    "cosine decay": {"optim": {"schedule": "cosine"}},
    "constant rate": {"optim": {"schedule": "constant"}},
    "warmup, 10 steps": {"optim": {"warmup_steps": 10}},
    "without QK-norm": {"model": {"qk_norm": False}},
    "LayerNorm": {"model": {"norm": "layernorm"}},
    "norm of the embedding too": {"model": {"embedding_norm": True}},
    "squared ReLU": {"model": {"activation": "relu_squared"}},
    "GELU": {"model": {"activation": "gelu_tanh"}},
    "projections not begun at zero": {"model": {"residual_init": "scaled"}},
    "tied head": {"model": {"tied_head": True}},
    "logit soft-cap 15": {"model": {"logit_softcap": 15.0}},
    "sequences of 64 from the start": {"context_start": None},
    "sequences of 64 from the start, learned positions": {"model": {"position": "learned"}, "context_start": None},
    "updates that begin at 256 tokens": {"batch_start": 256, "steps": 262},
    "updates half as large, twice as many": {"batch_tokens": 512, "steps": 360},
    "updates twice as large, half as many": {"batch_tokens": 2048, "steps": 90},
    "4 layers of 64": {"model": {"n_layer": 4, "n_embd": 64, "n_head": 2}},
    "1 layer of 128": {"model": {"n_layer": 1, "n_embd": 128, "n_head": 4}},
    "float32": {"precision": "float32"},
    "float32, fused attention": {"precision": "float32", "model": {"attention": "sdpa"}},
    "bfloat16, fused attention": {"model": {"attention": "sdpa"}},
}
TABLES = {"slots": ("shakespeare-cpu", SLOTS), "speedrun": ("speedrun", SPEEDRUN)}


def main() -> int:
    """Train the missing runs, print the table, and write the losses next to the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    recipe, variants = TABLES[options.table]
    base = g.recipe(recipe, data={"source": options.data}, eval_every=0, checkpoint_every=0, sample={"count": 0})
    if options.steps:
        base = base.override(steps=options.steps)
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for seed in range(1337, 1337 + options.seeds):
        for name, changes in variants.items():
            run = user_path(str(options.out)) / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{seed}"
            loss, spent, sizes[name] = figures(base.override(seed=seed, **changes), run)
            losses.setdefault(name, []).append(loss)
            seconds.setdefault(name, []).append(spent)
            print(f"{name}, seed {seed}: {loss:.4f}, {spent:.1f} s", file=sys.stderr, flush=True)
    print("| variant | parameters | validation loss | against the recipe | time |\n| --- | --- | --- | --- | --- |")
    for name, values in losses.items():
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        difference = statistics.mean(values) - statistics.mean(losses["the recipe"])
        ratio = statistics.median(seconds[name]) / statistics.median(seconds["the recipe"])
        print(f"| {name} | {sizes[name]:,} | {statistics.mean(values):.4f}{spread} | {difference:+.4f} | {ratio:.2f} |")
    (options.out / "ablation.json").write_text(json.dumps({"losses": losses, "seconds": seconds}, indent=1))
    return 0


def figures(config: g.TrainConfig, run: Path) -> tuple[float, float, int]:
    """Validation loss, processor seconds and parameters of a run; trains it if it is missing."""
    if not finished(run, config):
        begin = time.process_time()
        g.train(config, run, overwrite=True, progress=SilentProgress())
        (run / "seconds").write_text(str(time.process_time() - begin))
    checkpoint = find_checkpoint(run)
    loss = checkpoint.state.val_loss
    return (
        float("nan") if loss is None else loss,
        float((run / "seconds").read_text()),
        ModelSummary(checkpoint.model_config).parameters,
    )


def finished(run: Path, config: g.TrainConfig) -> bool:
    """Whether a complete run with this config exists (the run itself fills in vocabulary size and absolute path of the
    text).
    """
    if not (run / "checkpoints" / f"{config.steps:06d}" / "manifest.json").is_file():
        return False
    found = find_checkpoint(run).config
    return found.override(model={"vocab_size": None}, data={"source": config.data.source}) == config


if __name__ == "__main__":
    sys.exit(main())
