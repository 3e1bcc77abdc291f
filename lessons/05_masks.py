"""Masks

Which tokens may a token use, and how far does information travel?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="5. Masks")

with app.setup(hide_code=True):
    from dataclasses import replace

    import marimo as mo
    import torch
    from torch import Tensor

    from glassgpt.figures import heatmap, lines, side_by_side
    from glassgpt.interpretability.capture import LayerActivations, capture
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model
    from glassgpt.model.attention import Span, WindowKernel
    from glassgpt.model.gpt import GPT


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 5. Masks

    **Which tokens may a token use, and how far does information travel?**

    Attention computes a score for each pair of a query and a key (lesson 4). A *mask*
    decides which pairs count. It is a matrix of True and False: row $t$ is a query,
    column $s$ is a key, and True means that token $t$ sees token $s$. Nothing in a mask
    is learned.

    ## Four masks

    - **Causal**: each token sees itself and all earlier tokens, $s \le t$.
    - **Sliding window**: it sees only the last $W$ of these, itself included: in
      addition, $t - s < W$. The cost per token no longer grows with the text.
    - **Window and global tokens**: the first $G$ tokens stay visible to all later
      tokens, however far away.
    - **Longformer** (Beltagy et al., 2020): for reading a text, not for writing it. The
      window reaches to both sides. Global tokens are seen by all tokens, *and they see
      all tokens*.
    """)
    return


@app.function
def masks(T: int, W: int, G: int) -> dict[str, Tensor]:
    """Masks (T, T) by name, of a window of W and G global tokens at the start."""
    t, s = torch.arange(T)[:, None], torch.arange(T)  # (T, 1) and (T,)
    causal, near = s <= t, (t - s).abs() < W
    return {
        "causal": causal,
        "window": causal & near,
        "window and global tokens": causal & (near | (s < G)),
        "Longformer": near | (s < G) | (t < G),
    }


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** A text has 12 tokens. The causal mask allows $1 + 2 + \dots + 12 = 78$
    pairs. How many pairs does a window of $W = 4$ allow: $4 \cdot 12 = 48$? And where
    do the cells appear if token 0 is global?
    """)
    return


@app.cell(hide_code=True)
def _():
    kind = mo.ui.dropdown(
        ["causal", "window", "window and global tokens", "Longformer"],
        value="causal",
        label="mask",
    )
    kind
    return (kind,)


@app.cell
def _(kind):
    T, W, G = 12, 4, 1
    pairs = {name: int(mask.sum()) for name, mask in masks(T, W, G).items()}
    assert list(pairs.values()) == [78, 42, 50, 88]
    places = [str(place) for place in range(T)]
    heatmap(
        masks(T, W, G)[kind.value],
        rows=places,
        columns=places,
        title=f"{kind.value}: {pairs[kind.value]} of {T * T} pairs",
        x="key",
        y="query",
        show_values=False,
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The window allows 42 pairs, not 48: the first three tokens have fewer than four
    tokens to see. Global token 0 adds a column, 50 pairs in all. In the causal mask it
    adds no row, since token 0 may not see the future. In the Longformer mask it adds
    both.

    (The paper counts a window of $w$ as $w/2$ tokens on each side. Ours has $W - 1 = 3$
    on each side, so $w = 6$. The paper also gives global attention projections of its
    own, which we leave out.)

    ## Where to apply the mask

    Masked scores become $-\infty$ **before** the softmax:
    """)
    return


@app.function
def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention by a mask (T, S): q (..., T, D), k and v (..., S, D)."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


@app.function
def masked_too_late(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same, but hidden tokens get weight 0 after the softmax."""
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return weights * mask @ v


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The next cell trains the small model of lesson 4 for some seconds. It takes the
    queries, keys and values of its last layer for a text, and compares our function
    with the library's attention, for three masks. `Span(window, n_global)` is the
    library's name for a causal mask.
    """)
    return


@app.function
def layer_of(text: str) -> LayerActivations:
    """What the last layer of the trained model computes for a text."""
    model, tokenizer = trained_model()
    with torch.no_grad(), capture(model) as cache:
        model(torch.tensor(tokenizer.encode(text))[None])
    return cache.layers[-1]


@app.cell
def _():
    layer = layer_of("the list and the list of")  # T = 24 characters
    q, k, v = layer.rot_q, layer.rot_k, layer.v
    assert q.shape == (1, 4, 24, 16)  # (B, H, T, D)
    library = {
        "causal": layer.kernel_out,
        "window": WindowKernel(Span(4), dropout=0.0)(q, k, v),
        "window and global tokens": WindowKernel(Span(4, 1), dropout=0.0)(q, k, v),
    }
    difference = max(
        (masked_attention(q, k, v, masks(24, 4, 1)[name]) - other).abs().max().item()
        for name, other in library.items()
    )
    assert difference < 1e-5
    mo.md(f"Largest difference from the library's attention: {difference:.2g}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** `masked_too_late` also gives future tokens weight 0, but after the
    softmax. We change the last character of a text (· in the figure) from a space to a
    full stop. We compare the layer's output at each position with the output before.
    Which positions change, with each of the two functions?
    """)
    return


@app.cell
def _():
    before, after = layer_of("the list is "), layer_of("the list is.")
    changes = []
    for attention in (masked_attention, masked_too_late):
        y, new = (
            attention(a.rot_q, a.rot_k, a.v, masks(12, 1, 0)["causal"])[0]
            for a in (before, after)
        )
        changes.append(((new - y).norm(dim=-1) / y.norm(dim=-1)).mean(dim=0))  # (T,)
    assert changes[0][:-1].max() < 1e-6
    assert changes[1].min() > 1e-4
    heatmap(
        torch.stack(changes), rows=["before softmax", "after softmax"],
        columns=list("the␣list␣is·"), form=".1%",
        title="Change of the output by place of the mask",
    )  # fmt: skip
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Masked before the softmax, only the last position changes. Masked after it, *all*
    positions change: the denominator of the softmax still has the scores of future
    tokens in it. Their weights are 0, but they take weight away from the others. A
    model trained with such a mask could read the future, and its loss would look better
    than it is. A test by perturbation, as here, finds such leaks.

    ## Layers carry information further

    In one layer, a token receives only from tokens that it sees. But these have
    received from others in the layer before. Let $r_l$ be the set of tokens that depend
    on token $p$ after $l$ layers. At first, $r_0 = \{p\}$. Then token $t$ is in
    $r_{l+1}$ if it sees any member of $r_l$:
    """)
    return


@app.function
def reached(mask: Tensor, token: int, n_layer: int) -> Tensor:
    """Which tokens can depend on `token` after 0 to n_layer layers (n_layer + 1, T)."""
    rows = [torch.arange(len(mask)) == token]
    for _ in range(n_layer):
        rows.append((mask & rows[-1]).any(dim=1))
    return torch.stack(rows)


@app.function
def changed(mask: Tensor, token: int, n_layer: int, C: int = 16) -> Tensor:
    """Measure the same: change `token` of random x (T, C) in layers x + attention."""
    generator = torch.Generator().manual_seed(5)
    draw = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(len(mask), C, **draw)
    new = x.clone()
    new[token] += 1
    rows = [(x - new).abs().amax(dim=1) > 1e-12]
    for _ in range(n_layer):
        W_q, W_k, W_v = torch.randn(3, C, C, **draw) / C**0.5
        for h in (x, new):
            h += masked_attention(h @ W_q, h @ W_k, h @ W_v, mask)
        rows.append((x - new).abs().amax(dim=1) > 1e-12)
    return torch.stack(rows)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    In the figure, columns are tokens, rows are layers, and a coloured cell has changed.

    **Predict.** 16 tokens, 4 layers, a window of $W = 4$. Token 0 changes. Which is the
    last token that changes with it? Then move the slider to token 2: do the last tokens
    notice its change, if token 0 is global?
    """)
    return


@app.cell(hide_code=True)
def _():
    token = mo.ui.slider(
        steps=[0, 2, 5, 8, 15], value=0, label="changed token", show_value=True
    )
    token
    return (token,)


@app.cell
def _(token):
    figures = []
    for name, mask in list(masks(16, 4, 1).items())[1:]:
        measured = changed(mask, token.value, n_layer=4)  # (5, 16)
        assert torch.equal(measured, reached(mask, token.value, n_layer=4))
        labels = [f"after layer {i}" if i else "input" for i in range(5)]
        columns = [str(i) for i in range(16)]
        title = f"{name}: {int(measured[-1].sum())} tokens changed at the end"
        figure = heatmap(
            measured, rows=labels, columns=columns, title=title, show_values=False
        )
        figures.append(figure)
    side_by_side(*figures)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Each layer carries a change $W - 1 = 3$ tokens further, so token 12 is the last: $L$
    layers reach $L(W - 1)$ tokens back. Mistral 7B (Jiang et al., 2023) has 32 layers
    with a window of 4,096, which reach $32 \cdot 4{,}095 = 131{,}040$ tokens back.

    The second question has two answers. In the causal mask, token 0 cannot help: it
    never sees token 2, so it has nothing to pass on. It only *sends*. In the Longformer
    mask it also receives: after two layers, every token depends on every other.

    ## Allowed is not used

    A mask says what a model *may* use. The trained model may use 64 characters. We keep
    its weights and narrow its window, without training again. The *loss* (lesson 9) is
    the mean of $-\ln p$, with $p$ the probability that the model gives to the right
    next character. Its unit is the *nat*, and smaller is better.

    **Predict.** At which window does the loss become clearly worse: 32, 8 or 2?
    """)
    return


@app.function
def loss_with_window(window: int) -> float:
    """Loss in nats per character of the trained model with a narrower mask."""
    model, tokenizer = trained_model()
    narrow = GPT.empty(replace(model.config, window=window))
    narrow.load_state_dict(model.state_dict())
    text = "Return the first item of the list. If it is empty, raise an error"
    ids = torch.tensor(tokenizer.encode(text))[None]  # (1, 65)
    with torch.no_grad():
        return narrow(ids[:, :-1], ids[:, 1:]).item()


@app.cell
def _():
    windows = [1, 2, 4, 8, 16, 32, 64]
    losses = [loss_with_window(window) for window in windows]
    assert losses[0] > losses[-1] + 0.5
    assert abs(losses[3] - losses[-1]) < 0.25
    lines(
        {"loss": (windows, losses)},
        title="Loss of the trained model by window",
        x="window W in characters",
        y="nats per character",
        log_x=True,
        points=True,
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Only very small windows hurt. After some seconds of training, this model uses little
    more than the last few characters, although its mask shows it all of them. A longer
    context helps only a model that has learned to use it.

    ## What to remember

    - A mask is fixed and acts on scores, before the softmax.
    - $L$ layers of window $W$ reach $L(W - 1)$ tokens back.
    - Causal global tokens send, but receive nothing from later tokens. Longformer's
      receive too.
    - To test a mask, change one token and see what else changes.

    ## Exercises

    `glassgpt learn 5 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("5").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
