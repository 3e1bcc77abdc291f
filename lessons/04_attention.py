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

    The first way is this formula as a loop. The second is one matrix product: row $t$
    of a matrix $W$ holds the weights $\frac{1}{t+1}$ for the places $s \le t$ and $0$
    for later ones, so $y = W x$.
    """)
    return


@app.function
def average_by_loop(x: torch.Tensor) -> torch.Tensor:
    """Causal average of x (T, C)."""
    return torch.stack([x[: t + 1].mean(dim=0) for t in range(len(x))])


@app.function
def average_by_matrix(x: torch.Tensor) -> torch.Tensor:
    """Causal average of x (T, C), as one matrix product."""
    ones = torch.ones(
        len(x), len(x)
    ).tril()  # (T, T): 1 at and before the token, 0 after it
    return ones / ones.sum(dim=1, keepdim=True) @ x


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The third way looks like a detour. Give every pair of places a *score*, put
    $-\infty$ where $s > t$, and turn each row of scores into weights with a
    *softmax*:

    $$W_{ts} = \frac{e^{\text{score}_{ts}}}{\sum_{r} e^{\text{score}_{tr}}}$$

    Since $e^{-\infty} = 0$, later tokens get no weight. If all scores are $0$, the
    other weights are equal: the causal average again. The detour pays off as soon as
    scores differ.
    """)
    return


@app.function
def average_by_softmax(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Causal weighted average of x (T, C), with weights from scores (T, T)."""
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=1) @ x


@app.cell
def _():
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))  # T = 8, C = 2
    loop, matrix, softmax = (
        average_by_loop(x),
        average_by_matrix(x),
        average_by_softmax(x, torch.zeros(8, 8)),
    )
    assert loop.shape == (8, 2)
    largest_difference = max(
        (loop - matrix).abs().max().item(), (loop - softmax).abs().max().item()
    )
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
    their dot product $q \cdot k$: large if they point in the same direction. The
    shelf below has three books. Their keys say how much each is about *pasta*,
    *dessert* and *quick* dishes.

    **Predict.** Your wish moves from *pasta* to *dessert*. In the middle, half of
    each, which book gets the largest weight?
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
    keys = torch.tensor(
        [[4.0, 0.0, 1.0], [2.5, 2.5, 0.0], [0.0, 4.0, 1.0]]
    )  # (S, D): pasta, dessert, quick
    query = torch.tensor([1 - wish.value, wish.value, 0.0])  # (D,)
    weights = (keys @ query).softmax(dim=0)  # (S,)
    bars(dict(zip(books, weights, strict=True)), title="Weight of each book")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    In the middle, *Sweet pasta* scores $2.5$ and the others $2$. A small difference
    in scores makes a moderate difference in weights: the softmax never takes one book
    only. At both ends, the specialist wins.

    ## Self-attention

    In *self*-attention, every token plays all three roles. Three matrices, learned in
    training, make them from the same row: $q = x W_q$, $k = x W_k$, $v = x W_v$. The
    causal mask stays. With a head width of $D$:

    $$y = \text{softmax}\left(\frac{q k^\top}{\sqrt{D}} + \text{mask}\right) v$$
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
    The next cell trains a small model (2 layers, 4 heads) on the Python documentation
    for some seconds. Then it compares this function with the library, on the queries,
    keys and values that the trained model computes for a text.
    """)
    return


@app.cell
def _():
    model, tokenizer = trained_model()
    text = "the list and the list of"  # T = 24 characters
    with torch.no_grad(), capture(model) as cache:
        model(torch.tensor(tokenizer.encode(text))[None])
    layer = cache.layers[1]
    q, k, v = layer.rot_q[0], layer.rot_k[0], layer.v[0]  # (H, T, D) each
    assert q.shape == (4, 24, 16)
    ours = torch.stack([self_attention(q[h], k[h], v[h]) for h in range(4)])
    difference = (ours - layer.kernel_out[0]).abs().max().item()
    assert difference < 1e-5
    mo.md(f"Largest difference from the library's attention: {difference:.2g}.")
    return layer, text


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** Each row below is a token (a character), each column a token that it
    can look at. Where is the figure empty? Will the weights of a trained head look
    like those of an average?
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
    heatmap(
        pattern,
        rows=list(text),
        columns=list(text),
        title=f"Attention weights of head {head.value}",
        show_values=False,
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The upper triangle is empty: the future is masked. Every row sums to 1, as in an
    average. But the heads prefer different tokens, which training found.

    ## Why divide by √D?

    If the $D$ numbers of $q$ and $k$ are independent with mean $0$ and variance $1$,
    each product $q_i k_i$ has variance $1$, and their sum $q \cdot k$ has variance
    $D$. Wide heads therefore get large scores, and a softmax of large scores puts
    nearly all weight on one token. Division by $\sqrt{D}$ brings the variance back to
    $1$, whatever the width. Note that $D$ is the width of the *head*, not of the
    model.

    **Predict.** 64 tokens share the weight. An equal share each is $1/64 \approx
    0.016$. How large is the largest weight without the division, at $D = 4$ and at $D
    = 256$?
    """)
    return


@app.function
def largest_weight(D: int, factor: float) -> float:
    """Mean largest weight among 64 random keys of width D, over 512 queries."""
    generator = torch.Generator().manual_seed(D)
    queries = torch.randn(512, D, generator=generator)
    keys = torch.randn(512, 64, D, generator=generator)
    dots = torch.einsum("nd,nsd->ns", queries, keys)
    return (dots * factor).softmax(dim=1).amax(dim=1).mean().item()


@app.cell
def _():
    widths = [4, 16, 64, 256, 1024]
    divided = [largest_weight(D, D**-0.5) for D in widths]
    plain = [largest_weight(D, 1.0) for D in widths]
    assert max(divided) < 0.2
    assert plain[0] < 0.5
    assert round(plain[3], 2) == 0.89
    curves = {"divided by √D": (widths, divided), "not divided": (widths, plain)}
    title = "Largest weight among 64 tokens"
    lines(curves, title=title, x="head width D", log_x=True, points=True)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    With the division, the largest weight stays below 0.2 at each width. Without it,
    one token takes 0.89 of the weight at $D = 256$. Then the other tokens
    hardly influence the output, and hardly any gradient reaches their scores: the
    derivative of a softmax weight $p$ by its own score is $p(1 - p)$, which is nearly
    $0$ at both ends.

    ## What to remember

    - Attention is an average whose weights are a softmax of scores.
    - Query and key decide *how much*; the value decides *what*.
    - The mask makes it causal; $\sqrt{D}$, with $D$ the width of a head, keeps the
      weights soft.

    ## Exercises

    Write your answers with `glassgpt learn 4 --exercises answers.py`, and check them
    with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("4").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
