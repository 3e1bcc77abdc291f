"""Optimisation

How far should each weight move in one update?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="10. Optimisation")

with app.setup(hide_code=True):
    import functools
    import math

    import marimo as mo
    import torch
    from torch import Tensor

    from glassgpt.config.model import ModelConfig
    from glassgpt.config.schema import OptimConfig
    from glassgpt.data.batches import Batches
    from glassgpt.data.builtin_texts import python_docs
    from glassgpt.data.dataset import TokenStream
    from glassgpt.figures import lines
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.model.gpt import GPT
    from glassgpt.tokenizers.builtin import CharacterTokenizer
    from glassgpt.training.optim import build_adamw, lr_at, orthogonalize

    T, STEPS, WARMUP, PEAK = 32, 400, 10, 0.01

    @functools.cache
    def documentation() -> tuple[int, Batches, Tensor]:
        """Size of the vocabulary, training batches of 8 rows, and 128 other rows."""
        text = "\n\n".join(python_docs())
        tokenizer = CharacterTokenizer.from_texts([text])
        ids = tokenizer.encode(text)
        cut = len(ids) * 9 // 10
        batches = Batches([TokenStream([ids[:cut]])], T, 8, seed=0)
        held_out = Batches([TokenStream([ids[cut:]])], T, 128, seed=0).batch_at(0)
        return tokenizer.vocab_size, batches, torch.from_numpy(held_out)

    def rows_at(step: int) -> Tensor:
        """The rows (8, T + 1) of an update."""
        return torch.from_numpy(documentation()[1].batch_at(step))

    def new_model() -> GPT:
        """One layer of width 32, of parts that train fast."""
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "context_length": T}
        parts = {"position": "rope", "norm": "rmsnorm", "qk_norm": True, "bias": False}
        start = {"residual_init": "zero", "tied_head": False}
        V = documentation()[0]
        return GPT.create(ModelConfig(vocab_size=V, **shape, **parts, **start), seed=0)

    def compute_gradients(model: GPT, rows: Tensor) -> None:
        """Compute the gradients of the mean loss on rows (B, T + 1)."""
        model.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()

    @functools.cache
    def losses_of(rates: tuple[float, ...]) -> tuple[list[int], list[float]]:
        """Train with these rates: updates and losses on held-out rows, every 10."""
        model, held_out = new_model(), documentation()[2]
        optimizer = build_adamw(list(model.parameters()), OptimConfig())
        updates, losses = [], []
        for step, rate in enumerate(rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
            compute_gradients(model, rows_at(step))
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    losses.append(model(held_out[:, :-1], held_out[:, 1:]).item())
                updates.append(step + 1)
        return updates, losses


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 10. Optimisation

    **How far should each weight move in one update?**

    The *gradient* of the loss (lesson 9) has one number $g$ per weight $w$: its slope.
    Gradient descent moves each weight downhill, $w\leftarrow w-\eta g$, with one
    *learning rate* $\eta$ for all.

    But a slope is not a distance. A weight that every token uses can have large
    gradients, and one for a rare character tiny ones. A rate that suits one is wrong
    for the other.

    ## Adam: divide by the usual size

    *Adam* (Kingma and Ba, 2015) keeps two running averages per weight, its *moments*:
    $m$ of the gradient, and $v$ of its square. At update $t$ (1, 2, ...)

    $$m\leftarrow\beta_1m+(1-\beta_1)g$$

    $$v\leftarrow\beta_2v+(1-\beta_2)g^2$$

    Both start at $0$, so they are too small at first. For a constant $g$, $m$ is
    $(1-\beta_1^t)g$. Dividing by $1-\beta_1^t$ corrects it, and likewise for $v$. Adam
    divides the one by the root of the other. *AdamW* (Loshchilov and Hutter, 2019) also
    shrinks the weight a little, by the *weight decay* $\lambda$:

    $$\hat m=\frac{m}{1-\beta_1^t},\qquad\hat v=\frac{v}{1-\beta_2^t}$$

    $$w\leftarrow w-\eta\lambda w-\eta\frac{\hat m}{\sqrt{\hat v}+\epsilon}$$

    If all gradients are 1,000 times as large, the quotient stays the same, apart from
    the tiny $\epsilon$. The library's defaults are $\beta_1=0.9$ and $\beta_2=0.95$.
    """)
    return


@app.function
def adamw_step(w, g, m, v, t: int, lr: float, decay: float):
    """The weights w after update t, with their new averages m and v."""
    m = 0.9 * m + 0.1 * g
    v = 0.95 * v + 0.05 * g**2
    mean, square = m / (1 - 0.9**t), v / (1 - 0.95**t)
    return w - lr * decay * w - lr * mean / (square**0.5 + 1e-8), m, v


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    We train a small model (1 layer of width 32, on the Python documentation) for 20
    updates, and give our function and PyTorch's AdamW the same gradients. As in the
    library, only matrices decay.
    """)
    return


@app.cell
def _():
    model = new_model()
    theirs = list(model.parameters())
    optimizer = build_adamw(theirs, OptimConfig(lr=0.01, weight_decay=0.1))
    ours = [(p.detach().clone(), 0.0, 0.0) for p in theirs]  # w, m, v
    for t in range(1, 21):
        compute_gradients(model, rows_at(t))
        for i, p in enumerate(theirs):
            w, m, v = ours[i]
            decay = 0.1 if p.ndim >= 2 else 0.0
            ours[i] = adamw_step(w, p.grad, m, v, t, 0.01, decay)
        optimizer.step()
    pairs = zip(ours, theirs, strict=True)
    difference = max((w - p).abs().max().item() for (w, *_), p in pairs)
    assert difference < 1e-5
    mo.md(f"Largest difference from `torch.optim.AdamW`: {difference:.2g}.")
    return model, ours


@app.cell(hide_code=True)
def _(ours):
    usual = torch.cat([v.flatten() for *_, v in ours]).div(1 - 0.95**20).sqrt()
    low, high = usual.quantile(0.05).item(), usual.quantile(0.95).item()
    assert high > 10 * low
    mo.md(
        r"The usual sizes $\sqrt{\hat v}$ differ much from weight to weight: "
        f"5 % of them are below {low:.1g}, and 5 % above {high:.1g}."
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Decay belongs outside

    The older way to keep weights small is *L2*: add $\frac{\lambda}{2} w^2$ to the
    loss, and thereby $\lambda w$ to the gradient. For gradient descent, both ways give
    the same formula. But Adam divides L2's $\lambda w$ as well.

    **Predict.** A weight starts at 1. Its gradient is $+s$ and $-s$ in turn, so on
    average only the decay moves it. Which curve depends on $s$? Does the weight shrink
    faster if $s$ is large, or if it is small?
    """)
    return


@app.cell(hide_code=True)
def _():
    size = mo.ui.slider(
        steps=[0.01, 0.1, 1, 10], value=1, label="gradient size s", show_value=True
    )
    size
    return (size,)


@app.function
def decayed(size: float, l2: bool) -> list[float]:
    """The weight over 2,000 updates, with a decay of 0.1 in the gradient or outside."""
    w, m, v, path = 1.0, 0.0, 0.0, [1.0]
    for t in range(1, 2001):
        g = size * (-1) ** t + (0.1 * w if l2 else 0.0)
        w, m, v = adamw_step(w, g, m, v, t, lr=0.001, decay=0.0 if l2 else 0.1)
        path.append(w)
    return path


@app.cell
def _(size):
    with_l2 = [f"{decayed(s, l2=True)[-1]:.2f}" for s in (10, 1, 0.1)]
    assert with_l2 == ["0.98", "0.82", "0.17"]
    assert abs(decayed(0.01, l2=True)[-1]) < 0.01
    decoupled = decayed(size.value, l2=False)
    assert f"{decoupled[-1]:.2f}" == f"{0.9999**2000:.2f}" == "0.82"
    l2_path, times = decayed(size.value, l2=True), range(2001)
    decays = {"L2": (times, l2_path), "decoupled (AdamW)": (times, decoupled)}
    lines(decays, title=f"A weight that decays, s = {size.value:g}", x="update")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    AdamW's curve ends at $0.9999^{2000}\approx0.82$ for each $s$: its decay is
    *decoupled* from the gradient. With L2, the weight ends at 0.98 for $s=10$, at
    0.82 for 1, at 0.17 for 0.1, and near 0 for 0.01: the smaller the gradient, the
    faster the decay. At $s=1$ both agree, since there Adam divides by about 1.

    ## Clipping

    Sometimes a batch has a huge gradient. *Clipping* (Pascanu et al., 2013) limits it.
    If the length of *all* weights' gradient, as one vector, exceeds a limit, it is
    multiplied by $\text{limit}/\text{length}$. The direction stays.

    But Adam divides by the size anyway. Is clipping superfluous?

    **Predict.** A weight's gradient is 1 in each update, so Adam moves it by $\eta$. At
    update 100 only, it is $-1000$. How far does this update move the weight the wrong
    way: $1000\eta$, $10\eta$, or less than $\eta$? And how long does the effect last?
    """)
    return


@app.cell(hide_code=True)
def _():
    outlier = mo.ui.slider(
        steps=[1, 10, 100, 1000],
        value=1,
        label="size of the wrong gradient",
        show_value=True,
    )
    outlier
    return (outlier,)


@app.function
def moves(size: float, limit: float = math.inf) -> list[float]:
    """Moves of a weight downhill, in learning rates, over 400 updates."""
    w, m, v, path = 0.0, 0.0, 0.0, []
    for t in range(1, 401):
        g = -size if t == 100 else 1.0
        g *= min(1.0, limit / abs(g))  # clipping, of a single weight
        new, m, v = adamw_step(w, g, m, v, t, lr=1.0, decay=0.0)
        path.append(w - new)
        w = new
    return path


@app.cell
def _(outlier):
    worst = moves(1000)
    wrong = [move for move in worst if move < 0]
    assert (len(wrong), f"{wrong[0]:.2f}", f"{sum(wrong):.1f}") == (44, "-0.44", "-5.3")
    assert sum(move < 0.5 for move in worst) == 190
    assert f"{min(moves(1000, limit=1.0)):.1f}" == "0.8"
    t400 = range(1, 401)
    both = {"not clipped": (t400, moves(outlier.value))}
    both["clipped at 1"] = t400, moves(outlier.value, limit=1.0)
    title = f"Moves, with a gradient of -{outlier.value} at update 100"
    lines(both, title=title, x="update", y="learning rates")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Only $0.44\eta$: a tenth of the outlier enters $m$, a twentieth of its square enters
    $v$, and $0.1/\sqrt{0.05}\approx0.45$. But both forget slowly. The weight moves
    the wrong way for 44 updates, $5.3\eta$ in all. For 190 updates, its moves are below
    half of the usual ones. Clipped at 1, the outlier does little: the smallest move is
    still $0.8\eta$ the right way.

    ## The learning rate over time

    At the first update, $\hat m/\sqrt{\hat v}=g/|g|$: each weight with a gradient
    moves by the full $\eta$, however uncertain the direction. *Warmup* therefore starts
    with small rates.

    Later, the gradient varies from batch to batch, and the weights jump around. Smaller
    rates make the jumps smaller, but also the progress. So the rate falls: along half a
    *cosine* wave (Loshchilov and Hutter, 2017), or only at the end, as in *WSD*
    (warmup, stable, decay; Hu et al., 2024).
    """)
    return


@app.function
def learning_rate(step: int, schedule: str) -> float:
    """Rate of update `step` from 0: 10 of warmup, 400 in all."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    if schedule == "cosine":
        progress = (step - WARMUP) / (STEPS - 1 - WARMUP)  # from 0 to 1
        return PEAK * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "WSD":
        return PEAK * min(1.0, (STEPS - 1 - step) / 80)  # the last fifth decays
    return PEAK


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Three runs of the small model, of 400 updates, differ only in their schedule. The
    loss is that of held-out text.

    **Predict.** At update 320, just before WSD decays: is its loss higher or lower
    than that of cosine, whose rate is already small? And at the end?
    """)
    return


@app.cell
def _():
    config = OptimConfig(lr=PEAK, warmup_steps=WARMUP, min_lr_ratio=0.0)
    names = ("constant", "cosine", "WSD")
    rates = {name: [learning_rate(s, name) for s in range(STEPS)] for name in names}
    library = [lr_at(step, STEPS, config) for step in range(STEPS)]
    assert torch.allclose(torch.tensor(rates["cosine"]), torch.tensor(library))
    runs = {name: losses_of(tuple(rates[name])) for name in names}
    at = {name: dict(zip(*runs[name], strict=True)) for name in names}
    assert at["WSD"][320] > at["cosine"][320]
    assert at["WSD"][400] < min(at["cosine"][400], at["constant"][400])
    late = {name: (run[0][9:], run[1][9:]) for name, run in runs.items()}
    lines(late, title="Loss on held-out text, from update 100", x="update", y="nats")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Before it decays, WSD looks worse than cosine: at a high rate, the jumps hide its
    progress. In the last 80 updates they shrink, and it ends lowest. This holds for our
    short runs; longer ones end about equal (Hägele et al., 2024). But cosine needs the
    length of the run in advance.

    ## Accumulation

    A batch that does not fit into memory is divided into *micro-batches*, whose
    gradients are added before one update. The loss is a mean over all $N$ targets. If
    micro-batch $i$ has $n_i$ targets, and its mean loss has the gradient $g_i$, then

    $$g=\sum_i\frac{n_i}{N}g_i$$

    A common error is to divide by the number of micro-batches instead. That is right
    only if all $n_i$ are equal, as in pretraining. In fine-tuning, some targets have no
    loss (lesson 16), and widely used trainers had this error until 2024 (Han and Han,
    2024).
    """)
    return


@app.function
def accumulated(model, micro_batches, weights: list[float]) -> Tensor:
    """Gradient (parameters,) of a weighted sum of the micro-batches' mean losses."""
    model.zero_grad()
    for (inputs, targets), weight in zip(micro_batches, weights, strict=True):
        (weight * model(inputs, targets)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@app.cell
def _(model):
    rows = rows_at(21)
    inputs, targets = rows[:, :-1], rows[:, 1:].clone()  # (8, 32) each
    targets[4:, 2:] = -100  # without loss: 4 x 32 and 4 x 2 targets are left
    halves = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    whole = accumulated(model, [(inputs, targets)], [1.0])
    by_targets = accumulated(model, halves, [128 / 136, 8 / 136])
    by_number = accumulated(model, halves, [1 / 2, 1 / 2])
    assert torch.cosine_similarity(by_number, whole, dim=0) < 0.95
    difference_by_targets = (by_targets - whole).abs().max().item()
    assert difference_by_targets < 1e-5
    error = ((by_number - whole).norm() / whole.norm()).item()
    mo.md(
        f"Largest difference by targets: {difference_by_targets:.2g}. "
        f"Divided by 2, the error is {error:.1f} times as long as the gradient."
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    With the wrong division, each of the 8 targets counts 16 times as much as each of
    the 128. This changes the direction, so Adam does not repair it.

    ## Muon: all directions of a matrix

    AdamW treats each number of a matrix alone. But every matrix is a sum
    $G=\sum_i\sigma_iu_iv_i^\top$, in which the $u_i$ are perpendicular unit vectors,
    and so are the $v_i$. The *singular values* $\sigma_i\ge0$ give the strength of each
    direction. *Muon* (Jordan et al., 2024) averages a matrix's gradients as momentum,
    and brings most $\sigma_i$ of the average near 1. So weak directions move nearly as
    far as strong ones.

    How, without computing $u_i$ and $v_i$? Because they are perpendicular,
    $GG^\top G=\sum_i\sigma_i^3u_iv_i^\top$. Such products thus apply a polynomial to
    each $\sigma$ alone. A *Newton-Schulz step* is

    $$\sigma\leftarrow3.4445\,\sigma-4.7750\,\sigma^3+2.0315\,\sigma^5$$

    It multiplies small values by about 3.4. First, $G$ is divided by its length,
    the root of $\sum_i\sigma_i^2$, so that no $\sigma$ exceeds 1.
    """)
    return


@app.function
def newton_schulz(X: Tensor, steps: int = 5) -> Tensor:
    """X (R, C) of length 1 after some steps, which bring its singular values near 1."""
    for _ in range(steps):
        S = X @ X.T  # (R, R)
        X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
    return X


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** The figure shows the 32 singular values of a gradient of the model
    above. The largest is over 10,000 times the smallest. Are all near 1 after five
    steps?
    """)
    return


@app.cell(hide_code=True)
def _():
    ns_steps = mo.ui.slider(
        steps=[0, 1, 2, 3, 4, 5], value=0, label="steps", show_value=True
    )
    ns_steps
    return (ns_steps,)


@app.cell
def _(model, ns_steps):
    compute_gradients(model, rows_at(21))
    qkv = model.blocks[0].attention.qkv.weight.grad.double()  # (96, 32)
    G = qkv[:32]  # of the weights that make queries
    X = G / G.norm()
    library_G = orthogonalize(G[None], torch.float64)[0]
    assert (newton_schulz(X) - library_G).abs().max() < 1e-5
    before, after = torch.linalg.svdvals(X), torch.linalg.svdvals(newton_schulz(X))
    assert before[0] > 10_000 * before[-1]
    assert 0.68 < after[before > 0.003].min() < after.max() < 1.21
    now = torch.linalg.svdvals(newton_schulz(X, ns_steps.value))
    numbers = range(1, 33)
    shown = {"gradient": (numbers, before), "after the steps": (numbers, now)}
    lines(shown, title="Singular values", x="number", log_y=True, points=True)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    All values above 0.003 are: they end between 0.68 and 1.21. The smallest stay far
    below, since five steps multiply by at most $3.4445^5\approx485$. Our result is the
    library's. Muon finally multiplies it by $0.2\sqrt{\max(R,C)}$, which gives moves of
    AdamW's typical size (Liu et al., 2025).

    In recipe `speedrun` (180 updates, tinyshakespeare), Muon reached a loss of 1.86,
    and AdamW with the best of three rates 2.14 (2 cores of an AMD EPYC, 2026-11-22).

    ## What to remember

    - Adam divides each move by the usual size of the weight's gradient.
    - Decoupled decay is the same for all weights; L2 in Adam is not.
    - An outlier stays in $v$ for many updates, unless it is clipped.
    - Muon makes the directions of a matrix nearly equal.

    ## Exercises

    Write your answers with `glassgpt learn 10 --exercises answers.py`, and check them
    with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("10").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
