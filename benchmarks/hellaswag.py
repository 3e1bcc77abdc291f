"""Compare HellaSwag with shared contexts to a plain loop that scores one ending at a time, on a model of GPT-2's shape.

    python benchmarks/hellaswag.py --items hellaswag_val.jsonl

Random weights, GPT-2's tokenizer. The items are whole batches at even distances in an evaluation of the whole file, so
lengths and batch sizes are those of the whole. The loop passes each ending with its context to `model(ids, targets,
reduction="none")`; with `--spare-head` it does not compute the head for the context. The two alternate. Bars: 2.5 times
as fast as the loop, and the same choice for every item except near ties (the two lowest losses within 1e-4), which are
counted. Keep the machine idle meanwhile.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.evaluation.hellaswag import NEAR_TIE, Question, Score, encode, make_batches, score_batch
from glassgpt.evaluation.hellaswag_items import STYLES, find_items, read_items
from glassgpt.model.gpt import GPT
from glassgpt.model.loss import token_losses
from glassgpt.tokenizers.builtin import gpt2_tokenizer
from glassgpt.utils.device import keep_freed_memory


def losses_one_by_one(model: GPT, question: Question, spare_head: bool) -> list[float]:
    """The loss of each of the four endings, in one forward pass each."""
    sums = []
    for ending in question.endings:
        ids = torch.from_numpy(np.concatenate([question.context, ending])[-model.config.context_length - 1 :])[None]
        sums.append(float(_losses(model, ids, len(ending), spare_head).double().sum()))
    return sums


def _losses(model: GPT, ids: Tensor, scored: int, spare_head: bool) -> Tensor:
    if spare_head:
        return token_losses(
            model.hidden(ids[:, :-1])[:, -scored:], model.head.weight, ids[:, -scored:], model.vocab_size
        )
    return model(ids[:, :-1], ids[:, 1:], reduction="none")[:, -scored:]  # type: ignore[no-any-return]


def sample(batches: list[list[Question]], items: int) -> list[list[Question]]:
    """Batches at even distances, with about `items` items in all."""
    count = max(1, round(items * len(batches) / sum(len(batch) for batch in batches)))
    return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]


def scores(questions: list[Question], losses: list[tuple[float, ...]]) -> list[Score]:
    return [Score(question, four) for question, four in zip(questions, losses, strict=True)]


def differences(ours: list[Score], theirs: list[Score]) -> list[int]:
    """Items on which the choices differ by either score, except near ties."""
    return [
        a.question.number
        for a, b in zip(ours, theirs, strict=True)
        for normalised in (False, True)
        if a.choice(normalised) != b.choice(normalised) and b.margin(normalised) > NEAR_TIE
    ]


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, help="a .jsonl file; the published one, downloaded, unless given")
    parser.add_argument("--style", choices=STYLES, default=STYLES[0])
    parser.add_argument("--count", type=int, default=60, help="approximate number of items")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="with 1, processor time is measured instead of wall time",
    )
    parser.add_argument(
        "--spare-head", action="store_true", help="compare to a loop that skips the head for the context"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    keep_freed_memory()  # as the command line does
    model = GPT.create(ModelConfig(vocab_size=50257), seed=1).eval()
    items = read_items(find_items(options.items))
    batches = sample(make_batches(encode(items, gpt2_tokenizer(), options.style, 1024)), options.count)
    questions = [question for batch in batches for question in batch]
    print(f"{len(questions)} of {len(items)} items in {len(batches)} batches, {options.style}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} before")
    seconds: dict[str, list[float]] = {"shared": [], "loop": []}
    for turn in range(options.rounds):
        began = clock()
        losses = [four for batch in batches for four in score_batch(model, batch)]
        halfway = clock()
        one_by_one = [tuple(losses_one_by_one(model, q, options.spare_head)) for q in questions]
        seconds["shared"].append(halfway - began)
        seconds["loop"].append(clock() - halfway)
        ours, theirs = scores(questions, losses), scores(questions, one_by_one)
        print(f"round {turn + 1}: shared {seconds['shared'][-1]:.2f} s, loop {seconds['loop'][-1]:.2f} s", flush=True)
    shared, loop = (statistics.median(seconds[name]) for name in ("shared", "loop"))
    ratio = statistics.median(b / a for a, b in zip(seconds["shared"], seconds["loop"], strict=True))
    wrong = differences(ours, theirs)
    ties = [sum(score.margin(normalised) <= NEAR_TIE for score in theirs) for normalised in (False, True)]
    apart = max(abs(x - y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a.losses, b.losses, strict=True))
    n = len(questions)
    print(
        f"medians: {1e3 * shared / n:.0f} ms per item, loop {1e3 * loop / n:.0f} ms; median ratio {ratio:.2f} (bar 2.5)"
    )
    print(f"different choices: {len(wrong)} {wrong or ''}; near ties: {ties[0]} plain, {ties[1]} normalised")
    print(f"losses differ by at most {apart:.1e} nats")
    return int(bool(wrong) or ratio < 2.5)


if __name__ == "__main__":
    sys.exit(main())
