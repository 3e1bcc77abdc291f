"""One run a slot at equal steps: what each value of a slot does to the loss on your text, all else as in the recipe.

    python benchmarks/ablation.py --data input.txt --out runs/ablation            # 25 runs of shakespeare-cpu
    python benchmarks/ablation.py --data input.txt --out runs/ablation --steps 500 --seeds 3

Runs that are finished are not repeated, so it goes on where it was stopped. Prints a Markdown table: parameters, whole-split
validation loss (mean over the seeds), and the difference to the recipe.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import glassgpt as g
from glassgpt.files import user_path
from glassgpt.reference import find_checkpoint
from glassgpt.summary import ModelSummary

# Name of a run -> what it changes in [model].
VARIANTS: dict[str, dict[str, object]] = {
    "the recipe": {},
    "positions: rope": {"position": "rope"},
    "positions: sinusoidal": {"position": "sinusoidal"},
    "positions: none": {"position": "none"},
    "heads: 2 key-value": {"n_kv_head": 2},
    "heads: 1 key-value": {"n_kv_head": 1},
    "heads: twice as wide": {"head_dim": 64},
    "span: window 16": {"window": 16},
    "span: window 16, 4 global": {"window": 16, "window_globals": 4},
    "span: window 16, fourth layer full": {"window": 16, "window_pattern": "SSSL"},
    "norm: LayerNorm with bias": {"norm_bias": True},
    "norm: RMSNorm": {"norm": "rmsnorm"},
    "norm: RMSNorm without weight": {"norm": "rmsnorm", "norm_weight": False},
    "norm: of the embedding too": {"embedding_norm": True},
    "norm: QK-norm": {"qk_norm": True},
    "norm: QK-norm, rope": {"qk_norm": True, "position": "rope"},
    "feed-forward: GELU, exact": {"activation": "gelu"},
    "feed-forward: ReLU": {"activation": "relu"},
    "feed-forward: squared ReLU": {"activation": "relu_squared"},
    "feed-forward: SiLU": {"activation": "silu"},
    "feed-forward: SwiGLU": {"activation": "swiglu"},
    "feed-forward: half as wide": {"n_inner": 256},
    "biases: everywhere": {"bias": True},
    "head: untied": {"tied_head": False},
    "head: soft-cap 15": {"logit_softcap": 15.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="shakespeare-cpu")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    changes = {"data": {"source": options.data}, "eval_every": 0, "checkpoint_every": 0, "sample": {"count": 0}}
    if options.steps:
        changes["steps"] = options.steps
    losses: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for name, slots in VARIANTS.items():
        for seed in range(1337, 1337 + options.seeds):
            config = g.recipe(options.recipe, **changes, model=slots, seed=seed)
            run = user_path(str(options.out)) / f"{name.replace(': ', '-').replace(', ', '-').replace(' ', '-')}-{seed}"
            if not finished(run, config):
                g.train(config, run, overwrite=True)
            checkpoint = find_checkpoint(run)
            losses.setdefault(name, []).append(checkpoint.state.val_loss or float("nan"))
            sizes[name] = ModelSummary(checkpoint.model_config).parameters
            print(f"{name}, seed {seed}: {losses[name][-1]:.4f}", file=sys.stderr, flush=True)
    base = statistics.mean(losses["the recipe"])
    print("| slot | parameters | validation loss | against the recipe |\n| --- | --- | --- | --- |")
    for name, values in losses.items():
        loss = statistics.mean(values)
        print(f"| {name} | {sizes[name]:,} | {loss:.4f} | {loss - base:+.4f} |")
    (options.out / "ablation.json").write_text(json.dumps(losses, indent=1))
    return 0


def finished(run: Path, config: g.TrainConfig) -> bool:
    """Whether a complete run with this very config is there (its vocabulary and the text's whole path are filled in by the run)."""
    if not (run / "checkpoints" / f"{config.steps:06d}" / "manifest.json").is_file():
        return False
    found = find_checkpoint(run).config
    return found.override(model={"vocab_size": None}, data={"source": config.data.source}) == config


if __name__ == "__main__":
    sys.exit(main())
