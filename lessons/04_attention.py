"""Attention from averages

How can a token collect what it needs from the tokens before it?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="4. Attention from averages")

with app.setup(hide_code=True):
    import marimo as mo
    import torch

    from glassgpt.figures import bars, heatmap, lines
    from glassgpt.interpretability.capture import capture
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 4. Attention from averages

    **How can a token collect what it needs from the tokens before it?**

    A language model predicts the next token. For that, each position must use the
    tokens before it, and none after it. This lesson starts with the simplest way to
    do so, an average, and changes it step by step until it is attention.

    ## Three ways to a causal average

    Let $x$ be a text of $T$ tokens, each a vector of $C$ numbers. The *causal
    average* replaces row $t$ by the mean of the rows $0$ to $t$:

    $$y_t = \frac{1}{t + 1} \sum_{s=0}^{t} x_s$$

    Rows are counted from $0$. The first way is this formula as a loop. The second is
    one matrix product, $y = W x$, with a matrix $W$ of *weights* $(T, T)$. Its entry
    $W_{ts}$ is the weight of row $s$ in the mean of row $t$: $\frac{1}{t+1}$ if $s \le
    t$, and $0$ if $s > t$, since the future must not count.
    """)
    return


@app.function
def average_by_loop(x: torch.Tensor) -> torch.Tensor:
    """Causal average of x (T, C)."""
    return torch.stack([x[: t + 1].mean(dim=0) for t in range(len(x))])


@app.function
def average_by_matrix(x: torch.Tensor) -> torch.Tensor:
    """Causal average of x (T, C), as one matrix product."""
    ones = torch.ones(len(x), len(x)).tril()  # (T, T): 1 if s <= t, otherwise 0
    W = ones / ones.sum(dim=1, keepdim=True)  # each row divided by its sum
    return W @ x


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The third way looks like a detour. Give every pair of rows $t$ and $s$ a *score*,
    replace it by $-\infty$ if $s > t$, and turn each row of scores into weights with a
    *softmax*:

    $$W_{ts} = \frac{e^{\text{score}_{ts}}}{\sum_{r=0}^{T-1} e^{\text{score}_{tr}}}$$

    Weights of a softmax are positive and sum to $1$ in each row. Since $e^{-\infty} =
    0$, later tokens get no weight. If all other scores are $0$, each of the $t + 1$
    visible rows has $e^0 = 1$ and so the weight $\frac{1}{t+1}$: the causal average
    again. The detour pays off as soon as scores differ.
    """)
    return


@app.function
def average_by_softmax(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Causal weighted average of x (T, C), with weights from scores (T, T)."""
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(diagonal=1)  # s > t
    return scores.masked_fill(future, -torch.inf).softmax(dim=1) @ x


@app.cell
def _():
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))  # (T, C)
    loop = average_by_loop(x)
    others = average_by_matrix(x), average_by_softmax(x, torch.zeros(8, 8))
    assert loop.shape == (8, 2)
    largest_difference = max((loop - y).abs().max().item() for y in others)
    assert largest_difference < 1e-6
    mo.md(f"The three ways agree: the largest difference is {largest_difference:.2g}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Weights that depend on content

    Think of a shelf of recipe books. You want to cook something: your wish is the
    **query**. Each book has a title on its spine: its **key**. What you take home is
    not the title but the recipes inside: the **value**. You compare your wish with
    every title, and take most from the books that fit best.

    In attention, query, key and value are vectors. The score of a query and a key is
    their dot product $q \cdot k$: large if they are long and point in the same
    direction. A softmax turns the scores into weights. The result is the average of
    the values with these weights.

    The shelf has three books. Their keys say how much each is about *pasta*, *dessert*
    and *quick* dishes:

    | book | pasta | dessert | quick |
    | --- | --- | --- | --- |
    | Lasagne | 4 | 0 | 1 |
    | Sweet pasta | 2.5 | 2.5 | 0 |
    | Cakes | 0 | 4 | 1 |

    **Predict.** Your wish moves from pasta, the query $(1, 0, 0)$, to dessert, $(0, 1,
    0)$. In the middle, at $(0.5, 0.5, 0)$, which book gets the largest weight? Does it
    get all of it?
    """)
    return


@app.cell(hide_code=True)
def _():
    wish = mo.ui.slider(
        steps=[0.0, 0.25, 0.5, 0.75, 1.0],
        value=0.0,
        label="share of dessert in the wish",
        show_value=True,
    )
    wish
    return (wish,)


@app.cell
def _(wish):
    books = ["Lasagne", "Sweet pasta", "Cakes"]
    keys = torch.tensor([[4, 0, 1], [2.5, 2.5, 0], [0, 4, 1]])  # (S, D), S = D = 3
    query = torch.tensor([1 - wish.value, wish.value, 0.0])  # (D,)
    weights = (keys @ query).softmax(dim=0)  # (S,)
    bars(dict(zip(books, weights, strict=True)), title="Weight of each book")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    In the middle, *Sweet pasta* scores $2.5$ and the others $2$. Its weight is
    $e^{0.5} \approx 1.65$ times each of theirs: $0.45$ against $0.27$. No book gets a
    weight of $0$, since $e$ to any finite score is positive. At both ends, the
    specialist wins.

    ## Self-attention

    In *self*-attention, every token plays all three roles. Three matrices $(C, D)$,
    learned in training, make them from the same rows $x$: $q = x W_q$, $k = x W_k$, $v
    = x W_v$, each $(T, D)$. These three matrices make a **head**, and $D$ is its width.
    Entry $(t, s)$ of the product $q k^\top$ is the dot product of query $t$ and key
    $s$:

    $$y = \text{softmax}\left(\frac{q k^\top}{\sqrt{D}} + \text{mask}\right) v$$

    The mask is $-\infty$ where $s > t$ and $0$ elsewhere. The last section explains
    the divisor.
    """)
    return


@app.function
def self_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal self-attention of one head: q, k and v (T, D)."""
    return average_by_softmax(v, q @ k.T / q.shape[1] ** 0.5)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    That is the whole mechanism: a causal average whose weights come from the content.
    The next cell trains a small model on the Python documentation for some seconds. It
    has 2 layers, one after the other, each with 4 heads of width 16. Then the cell
    compares our function with the library. It takes the queries and keys (rotated by
    their positions, lesson 2) and the values that layer 1, the second, computes for a
    text.
    """)
    return


@app.cell
def _():
    model, tokenizer = trained_model()
    text = "the list and the list of"  # T = 24 characters
    with torch.no_grad(), capture(model) as cache:
        model(torch.tensor(tokenizer.encode(text))[None])
    layer = cache.layers[1]
    q, k, v = layer.rot_q[0], layer.rot_k[0], layer.v[0]  # (H, T, D): H = 4 heads
    assert q.shape == (4, 24, 16)
    ours = torch.stack([self_attention(q[h], k[h], v[h]) for h in range(4)])
    difference = (ours - layer.kernel_out[0]).abs().max().item()
    assert difference < 1e-5
    mo.md(f"Largest difference from the library's attention: {difference:.2g}.")
    return layer, text


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** The figure shows $W$ for one head. Row $t$ is the token (here a
    character; ␣ is a space) that has the query, column $s$ the token that has the key.
    Stronger colour is more weight. Where must the figure be empty? How would a causal
    average look, and will a trained head look like it?
    """)
    return


@app.cell(hide_code=True)
def _():
    head = mo.ui.slider(
        steps=[0, 1, 2, 3], value=0, label="head of layer 1", show_value=True
    )
    head
    return (head,)


@app.cell
def _(head, layer, text):
    pattern = layer.pattern(head=head.value)[0]  # (T, T)
    assert torch.allclose(pattern.sum(dim=1), torch.ones(len(text)))
    letters = list(text.replace(" ", "␣"))
    name = f"Attention weights of head {head.value}"
    heatmap(pattern, rows=letters, columns=letters, title=name, x="key", y="query")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The upper triangle is empty: the future is masked. Every row sums to 1, as in an
    average. But an average would have the same colour along a row, paler from row to
    row. A trained head prefers some tokens. The four heads prefer different ones; which
    ones, training has found.

    ## Why divide by √D?

    Let the $D$ numbers of $q$ and of $k$ be independent, with mean $0$ and variance
    $1$. If the mean is $0$, the variance is the mean of the square. So each product has
    mean $0$ and, with $E$ for the mean, the variance

    $$E[q_i^2 k_i^2] = E[q_i^2] \, E[k_i^2] = 1 \cdot 1 = 1.$$

    Variances of independent terms add: the sum $q \cdot k$ of $D$ products has
    variance $D$. Wide heads therefore get large scores, and a softmax of large scores
    puts nearly all weight on one token. A divisor $c$ divides the variance by $c^2$, so
    $\sqrt{D}$ brings it back to $1$, whatever the width. Note that $D$ is the width of
    the *head*, not $C$, the width of the model.

    **Predict.** The weight of a random query is shared by 64 random keys. Equal shares
    would be $1/64 \approx 0.016$. How large is the largest of the 64 weights, on
    average: with the division, and without it at $D = 4$ and at $D = 256$? A rough
    guess will do.
    """)
    return


@app.function
def largest_weight(D: int, factor: float) -> float:
    """Mean largest weight among 64 random keys of width D, over 512 queries."""
    generator = torch.Generator().manual_seed(D)
    queries = torch.randn(512, D, generator=generator)
    keys = torch.randn(512, 64, D, generator=generator)
    dots = (keys @ queries[:, :, None])[:, :, 0]  # (512, 64): each query and its keys
    return (dots * factor).softmax(dim=1).amax(dim=1).mean().item()


@app.cell
def _():
    widths = [4, 16, 64, 256, 1024]
    divided = [largest_weight(D, D**-0.5) for D in widths]
    plain = [largest_weight(D, 1.0) for D in widths]
    assert all(round(weight, 2) in (0.11, 0.1) for weight in divided)
    assert [round(plain[i], 2) for i in (0, 3)] == [0.28, 0.89]
    curves = {"divided by √D": (widths, divided), "not divided": (widths, plain)}
    title = "Largest weight among 64 tokens"
    lines(curves, title=title, x="head width D", log_x=True, points=True)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    With the division, the largest weight is about 0.11 at every width. Without it, it
    is 0.28 at $D = 4$ and 0.89 at $D = 256$. Then the other tokens hardly influence the
    output. Training hardly changes the scores either: the derivative of a softmax
    weight $p$ by its own score is $p(1 - p)$, which is nearly $0$ if $p$ is near $0$ or
    $1$.

    ## What to remember

    - Attention is an average whose weights are a softmax of scores.
    - Query and key decide *how much*; the value decides *what*.
    - The mask makes it causal; $\sqrt{D}$, with $D$ the width of a head, keeps the
      weights soft.

    ## Exercises

    `glassgpt learn 4 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("4").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
