"""Speed

What limits the speed of a computation: arithmetic, or moving numbers?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="12. Speed")

with app.setup(hide_code=True):
    import marimo as mo
    import numpy as np
    import torch
    import torch.nn.functional as F

    from glassgpt.figures import bars, heatmap, lines
    from glassgpt.interpretability.capture import capture
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model
    from glassgpt.utils.device import fastest_call
    from glassgpt.utils.gpu_specs import GPUS

    times_by_name: dict[str, float] = {}  # so that each run of a cell shows the same

    def seconds_of(name, function, *inputs):
        """Time of the fastest of some calls on one thread, measured once."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        if name not in times_by_name:
            device = torch.device("cpu")
            times_by_name[name] = fastest_call(lambda: function(*inputs), device, 0.1)
        torch.set_num_threads(threads)
        return times_by_name[name]

    def measured():
        """Peak and bandwidth of this machine, and the times of its products."""
        big, square = torch.ones(1 << 24), torch.ones(1024, 1024)  # 64 MiB, 4 MiB
        W, copy = torch.ones(2048, 4096), torch.empty_like(big)
        products = {
            M: seconds_of(f"product {M}", torch.mm, torch.ones(M, 2048), W)
            for M in (1, 4, 16, 64, 256)
        }
        peak = 2 * 1024**3 / seconds_of("square", torch.mm, square, square)
        bandwidth = 2 * 4 * big.numel() / seconds_of("copy", copy.copy_, big)
        return peak, bandwidth, products


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 12. Speed

    **What limits the speed of a computation: arithmetic, or moving numbers?**

    ## Two times, and the larger one counts

    A processor computes only with numbers that it has fetched from memory. So a
    computation needs two times: that of its arithmetic, and that of its *memory
    traffic*. A processor can do both at once. Therefore the time is at least

    $$\max\left(\frac{\text{FLOPs}}{\text{peak}},
    \frac{\text{bytes}}{\text{bandwidth}}\right)$$

    FLOPs are additions and multiplications. The *peak* is how many the processor does
    per second, the *bandwidth* how many bytes it moves per second. If the second time
    is the larger one, the computation is *memory-bound*, otherwise *compute-bound*.

    Take the most common computation of a model: $M$ tokens $(M, K)$ times a weight
    matrix $(K, N)$. Each of the $M N$ results is a sum of $K$ products: $2 M K N$
    FLOPs. The traffic is at least both inputs, read once, and the result, written
    once.
    """)
    return


@app.function
def work_of_product(M: int, K: int, N: int, size: int) -> tuple[int, int]:
    """FLOPs and least bytes of (M, K) @ (K, N), with numbers of `size` bytes."""
    return 2 * M * K * N, size * (M * K + K * N + M * N)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The next figure uses the data sheet of an H200 GPU: a peak of $989 \cdot 10^{12}$
    FLOPs per second in bfloat16 (2 bytes a number), and $4.8 \cdot 10^{12}$ bytes per
    second. The matrix is the first of GPT-2 small's MLP, $K = 768$ and $N = 3072$.

    **Predict.** A model that generates one text computes one token at a time, $M = 1$.
    In training, $M$ is thousands. If $M$ rises from 1 to 64, by how much does the
    larger of both times grow? At which $M$ does arithmetic take over?
    """)
    return


@app.cell(hide_code=True)
def _():
    tokens_M = mo.ui.slider(
        steps=[1, 16, 64, 256, 512, 4096],
        value=1,
        label="tokens M",
        show_value=True,
    )
    tokens_M
    return (tokens_M,)


@app.function
def h200_microseconds(M: int) -> dict[str, float]:
    """Times of GPT-2 small's MLP product for M tokens, by the data sheet."""
    gpu = GPUS["h200"]
    flops, moved = work_of_product(M, 768, 3072, size=2)
    arithmetic, traffic = flops / gpu.peaks["bfloat16"], moved / gpu.bandwidth
    return {"arithmetic": arithmetic * 1e6, "memory traffic": traffic * 1e6}


@app.cell
def _(tokens_M):
    longest = {M: max(h200_microseconds(M).values()) for M in (1, 64)}
    assert round(longest[64] / longest[1], 1) == 1.1
    for M in (256, 512):
        at = h200_microseconds(M)
        assert (at["arithmetic"] > at["memory traffic"]) == (M == 512)
    chosen = h200_microseconds(tokens_M.value)
    bars(chosen, title=f"Least time, M = {tokens_M.value}", y="microseconds")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    64 tokens need only 1.1 times the time of one: the weights dominate the traffic, and
    they are read once for all tokens. This is why servers generate many texts together.
    Arithmetic takes over between 256 and 512 tokens.

    ## The roofline

    The *arithmetic intensity* is the number of FLOPs per byte. With intensity $I$, the
    speed is at most

    $$\min(\text{peak}, I \cdot \text{bandwidth})$$

    Drawn over $I$, this is a slope and then a flat line: a *roofline* (Williams,
    Waterman and Patterson, 2009). The edge is at $I = \text{peak} / \text{bandwidth}$.
    For the H200 it is at 206 FLOPs per byte. The product above has an intensity of 1.0
    for one token.
    """)
    return


@app.cell
def _():
    flops_of_one, bytes_of_one = work_of_product(1, 768, 3072, size=2)
    assert round(flops_of_one / bytes_of_one, 1) == 1.0
    edge = GPUS["h200"].peaks["bfloat16"] / GPUS["h200"].bandwidth
    assert round(edge) == 206
    mo.md(f"Edge of the H200: {edge:.0f} FLOPs per byte.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Now your machine, or the one that built this page. We measure one processor core in
    float32: the bandwidth by a copy of 64 MiB, the peak by a product of two
    $(1024, 1024)$ matrices. Then we time $(M, 2048) \times (2048, 4096)$ for $M$ = 1,
    4, 16, 64 and 256.

    **Predict.** Where do the five points lie: on the roof, above it, or below it?
    """)
    return


@app.cell
def _():
    peak, bandwidth, products = measured()
    work = {M: work_of_product(M, 2048, 4096, size=4) for M in products}
    intensity = [flops / moved for flops, moved in work.values()]
    speed = [work[M][0] / products[M] / 1e9 for M in products]
    grid = np.geomspace(0.1, 1000, 100)
    roof = np.minimum(peak, grid * bandwidth) / 1e9
    lines(
        {"roof": (grid, roof), "measured": (intensity, speed)},
        title="Roofline of one core of this machine",
        x="FLOPs per byte",
        y="GFLOP/s",
        log_x=True,
        log_y=True,
        points=["measured"],
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The figure differs from machine to machine. A point *below* the roof leaves speed
    unused: its program is not the best for this shape, or another program took part of
    the machine. A point *above* the roof does not contradict it. A cache may hold the
    matrix, so that its bytes do not come from memory. A copy also writes, and reading
    alone can be faster. And our peak is only the best that we measured.

    ## Attention without its matrix

    Attention (lesson 4) computes a score for every pair of tokens. Written step by
    step, the $(T, T)$ scores go to memory, come back for the softmax, and its weights
    make the same trip. *Flash attention* (Dao et al., 2022) never stores either. It
    visits the keys in blocks, and finishes a block while it is in fast memory.

    The difficulty is the softmax: its denominator needs all scores. The answer is the
    *online softmax* (Milakov and Gimelshein, 2018). For one query, keep three things
    about the keys seen so far: the largest score $m$, the denominator
    $d = \sum_s e^{\text{score}_s - m}$, and the sum $a = \sum_s e^{\text{score}_s - m}
    v_s$. If a new block raises the maximum from $m$ to $m'$, multiply the old $d$ and
    $a$ by $e^{m - m'}$, since

    $$e^{\text{score} - m} \cdot e^{m - m'} = e^{\text{score} - m'}$$

    Then add the block's own terms. At the end, $a / d$ is the output. In NumPy:
    """)
    return


@app.function
def add_block(m, d, a, scores, v):
    """m and d (R, 1) and a (R, D) after one more block: scores (R, S), v (S, D)."""
    new_m = np.maximum(m, scores.max(axis=1, keepdims=True))
    p, factor = np.exp(scores - new_m), np.exp(m - new_m)
    return new_m, d * factor + p.sum(axis=1, keepdims=True), a * factor + p @ v


@app.function
def flash_attention(q, k, v, block: int):
    """Causal attention: q, k and v (T, D), in blocks of queries and of keys."""
    T, D = q.shape
    out = np.empty_like(v)
    for i in range(0, T, block):
        rows = np.arange(i, min(i + block, T))
        m, d, a = np.full((len(rows), 1), -np.inf), 0.0, 0.0
        for j in range(0, i + 1, block):  # later blocks are masked as a whole
            keys = np.arange(j, min(j + block, T))
            scores = q[rows] @ k[keys].T / D**0.5
            scores[keys[None] > rows[:, None]] = -np.inf  # the future
            m, d, a = add_block(m, d, a, scores, v[keys])
        out[rows] = a / d
    return out


@app.cell
def _():
    model, tokenizer = trained_model()  # trained for some seconds, as in lesson 4
    text = "the list and the list of"  # T = 24 characters
    with torch.no_grad(), capture(model) as cache:
        model(torch.tensor(tokenizer.encode(text))[None])
    layer = cache.layers[1]
    q, k, v = (each[0, 0].numpy() for each in (layer.rot_q, layer.rot_k, layer.v))
    assert q.shape == (24, 16)  # (T, D)
    library = layer.kernel_out[0, 0].numpy()
    outputs = [flash_attention(q, k, v, block) for block in (1, 5, 8, 24)]
    difference = max(np.abs(out - library).max() for out in outputs)
    assert difference < 1e-5
    mo.md(f"Largest difference from the library's attention: {difference:.2g}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The result is not an approximation: for each block size, including 5, which does not
    divide 24, only rounding differs.

    **Predict.** A query has the eight scores 1, 0, 2, 1, 0, 3, 1, 0. Each row below
    shows the weights $e^{\text{score} - m} / d$ after one more block. Do the weights of
    the first block stay, once they are computed?
    """)
    return


@app.cell(hide_code=True)
def _():
    block_size = mo.ui.slider(
        steps=[1, 2, 4, 8], value=2, label="keys per block", show_value=True
    )
    block_size
    return (block_size,)


@app.cell
def _(block_size):
    example = np.array([1.0, 0.0, 2.0, 1.0, 0.0, 3.0, 1.0, 0.0])
    m, d, a, seen = np.full((1, 1), -np.inf), 0.0, 0.0, []
    ends = range(block_size.value, 9, block_size.value)
    for end in ends:
        keys = slice(end - block_size.value, end)
        # Values that are unit vectors: then a / d are the weights themselves.
        m, d, a = add_block(m, d, a, example[None, keys], np.eye(8)[keys])
        seen.append((a / d)[0])
    assert np.allclose(seen[-1], np.exp(example) / np.exp(example).sum())
    heatmap(
        seen,
        rows=[f"{end} keys seen" for end in ends],
        columns=[f"{score:.0f}" for score in example],
        title="Weights so far, by score",
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Each row sums to 1, and each new block shrinks *all* earlier weights by one common
    factor. The last row is the same for each block size. So two numbers and one
    vector per query suffice, whatever the length of the text.

    What is saved? Stored, the scores and weights cost $4 T^2$ numbers of traffic (each
    written and read). In blocks of $B$ queries, keys and values are read $T / B$ times
    instead: $2 T D \cdot T / B$ numbers. The first is $2 B / D$ times the second: for
    $B = 128$ and $D = 64$, blocks need a quarter of the traffic. (This counts no mask,
    and neglects $q$ and the output.) And the memory *held* grows with $T$, no longer
    with $T^2$.

    ## Fusion

    The same idea helps simple functions. GELU by its formula is a chain of steps, and
    each step reads and writes the whole tensor:
    """)
    return


@app.function
def gelu_in_steps(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form in nine steps, each with a new tensor in memory."""
    inner = x + 0.044715 * (x * x * x)  # 4 steps
    bent = torch.tanh(0.7978845608 * inner)  # √(2/π), 2 steps
    return (0.5 * x) * (1 + bent)  # 3 steps


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A *fused* kernel reads each number once, does all steps, and writes once.
    `torch.compile` generates such kernels; PyTorch's own GELU is one. Both do the same
    arithmetic.

    **Predict.** The nine steps read twelve tensors and write nine. How many times
    faster is one kernel than the steps, on this machine?
    """)
    return


@app.cell
def _():
    sample = torch.linspace(-3, 3, 1000)
    one_kernel = F.gelu(sample, approximate="tanh")
    assert (gelu_in_steps(sample) - one_kernel).abs().max() < 1e-5
    x = torch.linspace(-3, 3, 1 << 22)  # 16 MiB
    seconds = {
        "in steps": seconds_of("steps", gelu_in_steps, x),
        "one kernel": seconds_of("fused", lambda x: F.gelu(x, approximate="tanh"), x),
    }
    times = {name: 1e3 * value for name, value in seconds.items()}
    bars(times, title="GELU of 4 million numbers, one core", y="milliseconds")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    If only traffic counted, the kernel would be $21 / 2 \approx 10$ times as fast.
    Arithmetic, which both do, brings this down. New memory for the result of each step
    brings it up again.

    ## Reading nvidia-smi

    On a machine with an NVIDIA GPU, `nvidia-smi` shows what it does. This sample was
    written for the lesson, not measured:

    ```text
    | Fan  Temp   Perf   Pwr:Usage/Cap |        Memory-Usage | GPU-Util |
    | N/A   41C    P0    210W /  700W  | 61034MiB / 143771MiB |   100%  |
    ```

    - `GPU-Util` is the share of time in which *some* kernel ran. A memory-bound kernel
      also gives 100 %, so it is not a share of the peak.
    - `Pwr:Usage` far below `Cap`, at 100 %, is a hint that the arithmetic units wait.
    - `Memory-Usage` contains memory that PyTorch keeps for later tensors.

    A better measure: FLOPs done per second over the peak. `glassgpt train` logs it as
    `peak_share`.

    ## What to remember

    - The time is at least the larger of arithmetic and memory traffic.
    - Work on many tokens at once reuses each weight.
    - Flash attention is exact, and stores no $(T, T)$ matrix.
    - Fusion saves traffic, not arithmetic.

    ## Exercises

    `glassgpt learn 12 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("12").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
