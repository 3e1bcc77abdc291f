"""Many processes

How do several processes train one model, and what do they exchange?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="13. Many processes")

with app.setup(hide_code=True):
    import json
    import os
    import subprocess
    import sys
    import tempfile

    import marimo as mo
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from glassgpt.config.model import ModelConfig
    from glassgpt.distributed.group import Ranks
    from glassgpt.distributed.strategies import DataParallel
    from glassgpt.figures import bars, heatmap
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.model.gpt import GPT
    from glassgpt.model.summary import ModelSummary

    CPU = torch.device("cpu")
    # What each process runs: it loads this lesson and calls two of its functions.
    PROGRAM = """
import datetime, importlib.util, json, sys
import torch, torch.distributed as dist
path, store, rank, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
spec = importlib.util.spec_from_file_location("lesson", path)
lesson = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson)
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", f"file://{store}", rank=rank, world_size=size,
    timeout=datetime.timedelta(seconds=120),
)
result = lesson.compare_gradients(rank, size) | lesson.compare_rings(rank, size)
print(json.dumps(result))
dist.destroy_process_group()
"""
    finished: dict[int, list] = {}  # processes start once, for all cells and runs

    def run_processes(W):
        """The results of `compare_gradients` and `compare_rings` on each of W ranks."""
        interface = "lo0" if sys.platform == "darwin" else "lo"  # never the network
        environment = os.environ | {"GLOO_SOCKET_IFNAME": interface}
        if W in finished:
            return finished[W]
        with tempfile.TemporaryDirectory() as folder:
            head = [sys.executable, "-c", PROGRAM, str(find_lesson("13").path)]
            ranks = [
                subprocess.Popen(
                    [*head, f"{folder}/store", str(rank), str(W)],
                    env=environment,
                    stdout=subprocess.PIPE,
                )
                for rank in range(W)
            ]
            texts = [process.communicate(timeout=150)[0] for process in ranks]
        assert all(process.returncode == 0 for process in ranks)
        finished[W] = [json.loads(text) for text in texts]
        return finished[W]


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 13. Many processes

    **How do several processes train one model, and what do they exchange?**

    A large training run uses many GPUs. Usually one process drives each GPU. The
    processes are called *ranks* and numbered from $0$ to $W - 1$. They share no memory:
    whatever one needs from another must be sent. Here, four real processes run on the
    CPU of one machine, and send with the same calls.

    ## Data parallel

    The simplest way: every rank has the whole model, with the same weights. The batch
    of $B$ rows is divided, $B / W$ rows for each rank. The loss is a mean over rows, so
    its gradient is a mean as well:

    $$\nabla \frac{1}{B} \sum_{i=1}^{B} L_i =
    \frac{1}{W} \sum_{r=0}^{W-1} \left( \frac{W}{B} \sum_{i \in r} \nabla L_i \right)$$

    $L_i$ is the loss of row $i$. The bracket is the mean over the $B / W$ rows of rank
    $r$, $i \in r$: the gradient that it computes from its own rows. So
    the mean of the ranks' gradients is the gradient of the whole batch. The rows must
    be shared equally: otherwise, a mean of means gives rows different weights.

    An *all-reduce* computes this mean: each rank puts in a tensor, and each gets the
    sum of all. Then each rank makes the same update, and all weights stay equal.
    """)
    return


@app.function
def small_model() -> tuple[GPT, Tensor]:
    """A model of 2 layers, the same on each rank, and a batch of 8 rows (B, T + 1)."""
    sizes = {"vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT.create(ModelConfig(context_length=16, **sizes), seed=0)
    generator = torch.Generator().manual_seed(13)
    return model, torch.randint(64, (8, 17), generator=generator)


@app.function
def gradient(forward, model: GPT, rows: Tensor) -> Tensor:
    """Gradient (N,) of the mean loss on rows (B, T + 1), over all N parameters."""
    model.zero_grad()
    forward(rows[:, :-1], rows[:, 1:]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@app.function
def compare_gradients(rank: int, W: int) -> dict[str, float]:
    """Run on each rank: our averaged gradient, beside two others."""
    model, batch = small_model()
    own = gradient(model, model, batch.chunk(W)[rank])  # (N,)
    ours = own.clone()
    dist.all_reduce(ours)
    ours /= W
    library = DataParallel(model, Ranks(rank, W), CPU)
    theirs = gradient(library.forward, model, batch.chunk(W)[rank])
    whole = gradient(model, model, batch)  # all rows, in one process
    others = {"own rows only": own, "library": theirs, "one process": whole}
    return {name: (ours - x).abs().max().item() for name, x in others.items()}


@app.cell
def _():
    differences = run_processes(4)
    for name in ("library", "one process"):
        assert max(of_rank[name] for of_rank in differences) < 1e-5
    assert min(of_rank["own rows only"] for of_rank in differences) > 1e-3
    from_library = max(of_rank["library"] for of_rank in differences)
    from_whole = max(of_rank["one process"] for of_rank in differences)
    mo.md(
        f"Largest difference from the library's gradient: {from_library:.2g}; "
        f"from one process with all rows: {from_whole:.2g}."
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The library's side is PyTorch's *distributed data parallel* (Li et al., 2020). It
    also sends early: it starts an all-reduce for the last layers while the backward
    pass still computes the first ones.

    ## A ring

    How can each rank get the sum? If all sent their $N$ numbers to rank 0, it would
    receive $(W - 1) N$ numbers and send as many. More ranks, more work for rank 0.

    A *ring* (Patarasuk and Yuan, 2009) shares the work. Each rank sends only to the
    next one, and the last to rank 0. The tensor is divided into $W$ chunks. In each
    step, each rank sends one chunk of $N / W$ numbers:

    1. *Reduce-scatter*, $W - 1$ steps: a rank adds the chunk that it receives to its
       own, and sends that sum in the next step. At the end, each rank has one chunk
       complete.
    2. *All-gather*, $W - 1$ steps: the complete chunks go round, and replace the
       incomplete ones.
    """)
    return


@app.function
def ring_plan(step: int, rank: int, W: int) -> tuple[int, int, bool]:
    """Chunk to send, chunk to receive, and whether to add it to one's own."""
    adds = step < W - 1
    sent = (rank - step) % W if adds else (rank + 1 - (step - (W - 1))) % W
    return sent, (sent - 1) % W, adds


@app.function
def ring_all_reduce(x: Tensor, rank: int, W: int) -> int:
    """Sum x (N,) over all ranks, in place. Return how many numbers this rank sent."""
    chunks, count = x.chunk(W), 0
    assert len({len(chunk) for chunk in chunks}) == 1  # W divides N
    for step in range(2 * (W - 1)):
        sent, received, adds = ring_plan(step, rank, W)
        sending = dist.isend(chunks[sent], (rank + 1) % W)
        buffer = torch.empty_like(chunks[received])
        dist.recv(buffer, (rank - 1) % W)
        sending.wait()
        chunks[received].copy_(chunks[received] + buffer if adds else buffer)
        count += len(chunks[sent])
    return count


@app.function
def compare_rings(rank: int, W: int) -> dict[str, float]:
    """Run on each rank: our all-reduce of a gradient, beside PyTorch's."""
    model, batch = small_model()
    ours = gradient(model, model, batch.chunk(W)[rank])
    theirs, N = ours.clone(), len(ours)
    dist.all_reduce(theirs)
    sent = ring_all_reduce(ours, rank, W)
    return {"difference": (ours - theirs).abs().max().item(), "sent": sent / N}


@app.cell
def _():
    rings = run_processes(4)
    assert {of_rank["sent"] for of_rank in rings} == {1.5}  # 2 (W - 1) / W
    ring_difference = max(of_rank["difference"] for of_rank in rings)
    assert ring_difference < 1e-5
    mo.md(
        f"Largest difference from PyTorch's all-reduce: {ring_difference:.2g}. "
        f"Each rank sent {rings[0]['sent']} N numbers."
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The next figure counts, in each chunk of each rank, how many ranks it already sums.
    At the start, that is 1 everywhere; at the end, it is 4.

    **Predict.** After 3 of the 6 steps, how many of the 16 chunks are complete?
    """)
    return


@app.cell(hide_code=True)
def _():
    steps_done = mo.ui.slider(
        steps=[0, 1, 2, 3, 4, 5, 6], value=0, label="steps done", show_value=True
    )
    steps_done
    return (steps_done,)


@app.function
def summed_ranks(steps: int, W: int) -> np.ndarray:
    """How many ranks each chunk sums (W ranks, W chunks) after some steps."""
    counts = np.ones((W, W))
    for step in range(steps):
        before = counts.copy()
        for rank in range(W):
            sent, _, adds = ring_plan(step, rank, W)
            to = (rank + 1) % W
            counts[to, sent] = before[rank, sent] + (before[to, sent] if adds else 0)
    return counts


@app.cell
def _(steps_done):
    assert [int((summed_ranks(step, 4) == 4).sum()) for step in (3, 6)] == [4, 16]
    heatmap(
        summed_ranks(steps_done.value, 4),
        rows=[f"rank {rank}" for rank in range(4)],
        columns=[f"chunk {chunk}" for chunk in range(4)],
        title=f"Ranks summed after {steps_done.value} steps",
        form=".0f",
        limits=(0, 4),
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    After 3 steps, only 4 chunks are complete, one on each rank: the end of the
    reduce-scatter. The other 12 are copied in the last 3 steps.

    Each rank sends $2 (W - 1)$ chunks of $N / W$ numbers:

    $$2 \cdot \frac{W - 1}{W} N$$

    For 4 ranks this is $1.5 N$, as measured. For a thousand ranks it is still less than
    $2 N$. But the number of steps grows with $W$. For small tensors, where the start of
    a message costs more than its bytes, other patterns such as trees are faster.

    ## Sharding

    In data parallel, each rank stores everything. With AdamW in float32, this is 16
    bytes per parameter: 4 for the weight, 4 for its gradient, 8 for two moments
    (lesson 10). ZeRO (Rajbhandari et al., 2020) divides them: each rank keeps a
    *shard*, $1 / W$ of the numbers, in three stages.

    1. The moments: each rank updates only its shard of the weights, and sends the new
       weights to the others.
    2. Also the gradients: a reduce-scatter is enough, since a rank needs the sum only
       for its shard.
    3. Also the weights: before a block computes, its weights are gathered; after it,
       they are dropped. PyTorch calls this *fully sharded data parallel* (FSDP; Zhao et
       al., 2023).

    **Predict.** GPT-2 XL has 1.56 billion parameters. Does one GPU with 24 GB hold the
    16 bytes per parameter? With 8 such GPUs and stage 1, how many GB has each to hold?
    """)
    return


@app.cell(hide_code=True)
def _():
    ranks_W = mo.ui.slider(
        steps=[1, 2, 4, 8, 16, 64], value=1, label="ranks W", show_value=True
    )
    ranks_W
    return (ranks_W,)


@app.function
def gigabytes(W: int) -> dict[str, float]:
    """GB that each of W ranks holds of GPT-2 XL's weights, gradients and moments."""
    sizes = {"n_layer": 48, "n_head": 25, "n_embd": 1600}
    N = ModelSummary(ModelConfig(vocab_size=50_257, **sizes)).parameters
    return {
        "data parallel": 16 * N / 1e9,
        "1: moments": (8 + 8 / W) * N / 1e9,
        "2: and gradients": (4 + 12 / W) * N / 1e9,
        "3: and weights": 16 / W * N / 1e9,
    }


@app.cell
def _(ranks_W):
    assert [f"{gb:.1f}" for gb in gigabytes(1).values()] == ["24.9"] * 4
    assert [f"{gb:.1f}" for gb in gigabytes(8).values()] == "24.9 14.0 8.6 3.1".split()
    bars(
        gigabytes(ranks_W.value),
        title=f"Memory per rank, W = {ranks_W.value}",
        y="GB, without activations",
        form=".1f",
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    One GPU would need 24.9 GB: too much, even without activations. With 8 ranks, each
    holds 14.0 GB in stage 1, 8.6 GB in stage 2 and 3.1 GB in stage 3. Stage 1 cannot
    fall below 8 bytes per parameter, however many ranks there are.

    What does it cost? A reduce-scatter or an all-gather sends $\frac{W-1}{W} N$ numbers
    per rank, half of an all-reduce. Stages 1 and 2 need one of each, for gradients and
    for new weights: as much as data parallel. Stage 3 gathers the weights twice, for
    the forward and the backward pass, and reduces gradients once: 1.5 times as much.

    `glassgpt train` uses the same strategies: `--strategy ddp` or `--strategy fsdp`,
    started by `torchrun`.

    ## What to remember

    - Equal shares of the batch: the mean of gradients is the gradient of the mean.
    - A ring all-reduce sends less than $2 N$ numbers per rank, for any $W$.
    - An all-reduce is a reduce-scatter and an all-gather. Sharding uses them apart.

    ## Exercises

    `glassgpt learn 13 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("13").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
