"""Batches

In which order does a model read its text, and how do several processes share it?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="3. Batches")

with app.setup(hide_code=True):
    import functools

    import marimo as mo
    import numpy as np
    import torch

    from glassgpt.config.model import ModelConfig
    from glassgpt.data.batches import Batches, drawn, shuffled
    from glassgpt.data.builtin_texts import python_docs
    from glassgpt.data.dataset import TokenStream
    from glassgpt.distributed.group import Ranks
    from glassgpt.figures import bars, lines, tokens
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.model.gpt import GPT
    from glassgpt.tokenizers.builtin import CharacterTokenizer
    from glassgpt.utils.rng import seed_for

    @functools.cache
    def documentation() -> tuple[np.ndarray, int]:
        """The ids (N,) of the Python documentation, and the size of the vocabulary."""
        text = "\n\n".join(python_docs())
        tokenizer = CharacterTokenizer.from_texts([text])
        return tokenizer.encode(text), tokenizer.vocab_size


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 3. Batches

    **In which order does a model read its text, and how do several processes share
    it?**

    A training text has millions of tokens, and a model reads some hundreds at once. In
    each step, it reads a *batch* of $B$ pieces, predicts their tokens, and changes its
    weights a little. This lesson cuts a text into such pieces, mixes them, and shares
    them among processes.

    ## Windows

    A language model predicts the next token at every position. So the *targets* are
    the inputs, shifted by one. For $T$ inputs we need a *window* of $T + 1$ tokens:
    the first $T$ are the inputs, the last $T$ the targets.
    """)
    return


@app.cell
def _():
    window = "batch"  # T + 1 = 5 tokens, here characters
    inputs, targets = window[:-1], window[1:]
    assert len(inputs) == len(targets) == 4
    steps = [f"`{inputs[: t + 1]}` → `{targets[t]}`" for t in range(4)]
    mo.md("One window, four predictions: " + ", ".join(steps) + ".")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    All four predictions come from one pass through the model, because each position
    sees only the tokens before it and itself (lesson 4).

    **Predict.** Each token of a text should be a target once. Windows have $T + 1 = 5$
    tokens. How far apart must they begin: 3, 4, 5 or 6 tokens? Below each character
    stands how often it is a target.
    """)
    return


@app.cell(hide_code=True)
def _():
    stride = mo.ui.slider(
        steps=[3, 4, 5, 6], value=5, label="tokens between starts", show_value=True
    )
    stride
    return (stride,)


@app.cell
def _(stride):
    text = "the cat sat on the mat"
    counts = np.zeros(len(text))
    for start in range(0, len(text) - 4, stride.value):
        counts[start + 1 : start + 5] += 1  # the targets of the window at `start`
    if stride.value == 4:
        assert counts[0] == 0
        assert (counts[1:21] == 1).all()
    title = f"Times as a target, windows every {stride.value} tokens"
    tokens(list(text), counts, title=title, form=".0f")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The answer is $T = 4$: neighbouring windows share a token. It is the last target of
    one window and the first input of the next. With a distance of $T + 1 = 5$,
    windows do not overlap, and every fifth token is never a target. The first token of
    the text has nothing before it, and a rest shorter than $T$ is left out.

    ## In which order?

    Neighbouring windows are often about the same subject. A batch of neighbours would
    show the model one subject at a time, so windows are mixed. The simple way is to
    draw each window at random. The other way is a *permutation*: each window once, in
    mixed order. A pass through all windows is an *epoch*.

    **Predict.** We draw as many times as there are windows, at random. How many
    windows does the model not see in this time: about 1 %, 10 % or 40 %?
    """)
    return


@app.cell(hide_code=True)
def _():
    epochs = mo.ui.slider(
        steps=[1, 2, 3, 4], value=1, label="draws / windows", show_value=True
    )
    epochs
    return (epochs,)


@app.cell
def _(epochs):
    n = 1000
    draws = drawn(np.arange(epochs.value * n), n, key=3)  # with the library's numbers
    times = np.bincount(draws, minlength=n)  # (n,): how often each window is seen
    share = {str(k): (times == k).mean() for k in range(12)}
    unseen = (1 - 1 / n) ** (epochs.value * n)  # the formula below
    assert abs(share["0"] - unseen) < 0.01
    name = f"{epochs.value * n:,} draws of {n:,} windows: share by times seen"
    bars(share, title=name, form=".1%")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    About 37 %, and others are seen three times. A draw misses a given window with
    probability $1 - \frac{1}{n}$, and $n$ draws all miss it with

    $$\left(1 - \frac{1}{n}\right)^n \approx \frac{1}{e} \approx 0.37$$

    Even after four times as many draws, about 2 % of the text is unread
    ($e^{-4} \approx 0.018$). In an epoch with a permutation, nothing is.

    ## A permutation without memory

    A run must be able to stop and continue with the *next* batch. This is simple if a
    function of the step computes the batch: then nothing has to be saved. So we need
    a function that permutes $0, \ldots, n - 1$ number by number.

    A *Feistel network* (Feistel, 1973) splits the bits of a number into a left half
    $L$ and a right half $R$. A round turns $(L, R)$ into $(R, L \oplus f(R))$, where
    $\oplus$ flips the bits of $L$ at which $f(R)$ has a 1. Whatever $f$ is, the round
    can be undone: $R$ is still there, so compute $f(R)$ and flip again. Hence
    different numbers stay different. Here $f$ is the mixing function of SplitMix64
    (Steele et al., 2014).
    """)
    return


@app.function
def mix(x: int) -> int:
    """A number below 2^64 whose every bit depends on all bits of x."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@app.function
def permute(place: int, n: int, key: int) -> int:
    """The number at this place in the permutation of 0 to n - 1 that the key names."""
    half = max(3, ((n - 1).bit_length() + 1) // 2)  # bits of a half
    mask = 2**half - 1
    keys = np.random.SeedSequence(key).generate_state(8, np.uint64).tolist()
    while True:
        left, right = place >> half, place & mask
        for each in keys:
            left, right = right, left ^ (mix(right ^ each) & mask)
        place = left << half | right
        if place < n:
            return place


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The network permutes all numbers of `2 * half` bits, at least $n$ of them. If the
    result is $n$ or larger, it is applied again until it is not (*cycle walking*; Black
    and Rogaway, 2002). This is still a permutation, since no two numbers below $n$ can
    arrive at the same one.

    Now the batch. Each epoch draws its own *offset* from $0$ to $T - 1$, at which its
    first window starts. Otherwise a token at the beginning of a window, with almost no
    text before it, would be there in every epoch. The largest offset, $T - 1$, and the
    last target take $T$ tokens, so a text of $N$ tokens has $n = \lfloor (N - T) / T
    \rfloor$ windows, $T$ tokens apart. (`seed_for` makes one seed from a seed, a name
    and the epoch.)
    """)
    return


@app.function
def batch_at(step: int, text: np.ndarray, T: int, B: int, seed: int) -> np.ndarray:
    """The windows (B, T + 1) of a step, as a function of the seed and the step."""
    n = (len(text) - T) // T  # windows per epoch, for texts of at least 2 T tokens
    batch = []
    for number in range(step * B, (step + 1) * B):  # windows since the start
        epoch, place = divmod(number, n)
        offsets = np.random.default_rng(seed_for(seed, "offset", epoch))
        number_in_text = permute(place, n, seed_for(seed, "batch", epoch))
        start = int(offsets.integers(T)) + T * number_in_text
        batch.append(text[start : start + T + 1])
    return np.stack(batch)


@app.cell
def _():
    ids, _ = documentation()  # N characters
    short = ids[:10_000]
    library = Batches([TokenStream([short])], context_length=64, batch_size=8, seed=1)
    n_short = (10_000 - 64) // 64
    ours = np.stack([batch_at(step, short, 64, 8, seed=1) for step in range(40)])
    theirs = np.stack([library.batch_at(step) for step in range(40)])  # two epochs
    assert ours.shape == (40, 8, 65)
    difference = int(abs(ours - theirs).max())
    assert difference == 0
    assert sorted(permute(i, n_short, 7) for i in range(n_short)) == [*range(n_short)]
    mo.md(f"Largest difference from the library in 40 batches: {difference}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Several processes

    With $W$ processes (*ranks*), each computes the gradient of a part of the batch,
    and they average their gradients. glassgpt first defines the batch of the step, of
    all ranks together. Then each rank takes its rows.

    **Predict.** A run has 4 ranks, stops, and continues with 2. Which windows does
    its next batch have? Move the slider: the boxes are the numbers of 8 windows, a
    batch, and below each stands the rank that reads it.
    """)
    return


@app.cell(hide_code=True)
def _():
    world = mo.ui.slider(steps=[1, 2, 4, 8], value=4, label="ranks", show_value=True)
    world
    return (world,)


@app.cell
def _(world):
    numbers = shuffled(np.arange(8), 155, key=seed_for(1, "batch", 0))  # of step 0
    reader = np.full(8, -1)
    for rank in range(world.value):
        rows = Ranks(rank, world.value).slice_of(8)
        assert (reader[rows] == -1).all()  # nobody else reads them
        reader[rows] = rank
    assert (reader >= 0).all()
    names = [str(number) for number in numbers]
    heading = f"Rank that reads each window, of {world.value}"
    tokens(names, reader, title=heading, form=".0f")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The same windows: the number of ranks decides only who reads them. So 2 ranks can
    continue what 4 began. Without dropout, results differ only by rounding.

    What if ranks read the *same* rows, for example since all draw with the same seed?
    The run works, and its loss falls. But the average of $W$ equal gradients is one of
    them. Gradients of different rows point in somewhat different directions, and their
    average comes closer to the gradient of the whole text. For a mean of $k$
    independent rows, the typical error is proportional to $1/\sqrt{k}$.

    **Predict.** Each rank reads 4 rows. How much smaller is the error with 4 ranks
    than with 1, if their rows differ, and if they are the same?
    """)
    return


@app.function
@functools.cache
def gradients(count: int, T: int = 16) -> torch.Tensor:
    """The gradient (count, weights) of each of this many windows, for a new model."""
    ids, V = documentation()
    shape = {"vocab_size": V, "context_length": T, "n_embd": 16, "n_head": 2}
    model = GPT.create(ModelConfig(**shape, n_layer=1), seed=0)
    batches = Batches([TokenStream([ids])], T, count, seed=0)
    rows = []
    for row in torch.from_numpy(batches.batch_at(0)):  # (T + 1,)
        loss = model(row[None, :-1], row[None, 1:])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@app.cell
def _():
    every = gradients(512)
    exact = every.mean(dim=0)  # of all 512 windows
    groups = {W: every.unflatten(0, (-1, 4 * W)).mean(dim=1) for W in (1, 2, 4, 8)}
    errors = [(of - exact).norm(dim=1).square().mean().sqrt() for of in groups.values()]
    relative = [(error / exact.norm()).item() for error in errors]
    assert 1.8 < relative[0] / relative[2] < 2.2
    curves = {"different rows": ([*groups], relative)}
    curves["same rows"] = [*groups], [relative[0]] * 4  # equal gradients: as for W = 1
    error_title = "Relative error of the gradient"
    lines(curves, title=error_title, x="ranks of 4 rows each", points=True)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    With different rows, 4 ranks halve the error, since $\sqrt{4} = 2$. With the same
    rows, 4 ranks do the work of one at four times the cost, and nothing warns.
    (The error is the length of the difference, relative to the length of the mean
    gradient of all 512 windows.)

    ## What to remember

    - A window has $T + 1$ tokens; targets are the inputs shifted by one.
    - Windows begin $T$ tokens apart, so that each token is a target once.
    - A permutation shows each window once per epoch; random draws miss 37 %.
    - If the batch is a function of seed and step, stopping loses nothing.
    - Ranks must read different rows of one batch.

    ## Exercises

    `glassgpt learn 3 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("3").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
