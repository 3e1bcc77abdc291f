"""Heads

Why does attention have several heads, and can they share keys and values?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="6. Heads")

with app.setup(hide_code=True):
    from dataclasses import replace

    import marimo as mo
    import torch
    from torch import Tensor

    from glassgpt.config.model import ModelConfig
    from glassgpt.figures import bars, heatmap
    from glassgpt.interpretability.capture import capture
    from glassgpt.interpretability.interventions import Edit, edited
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model
    from glassgpt.model.gpt import GPT
    from glassgpt.model.kv_cache import KVCache
    from glassgpt.model.summary import ModelSummary

    TEXT = (
        "Return the first item of the list. If the list is empty, an error is raised. "
        "The function takes one argument, the name of the file to open. "
        "It returns a new object of the same type as the class."
    )

    def loss_on_text(model: GPT) -> float:
        """Loss in nats per character on 3 pieces of 64 characters."""
        ids = torch.tensor(trained_model()[1].encode(TEXT))[: 3 * 64 + 1]
        with torch.no_grad():
            return model(ids[:-1].view(3, 64), ids[1:].view(3, 64)).item()


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 6. Heads

    **Why does attention have several heads, and can they share keys and values?**

    ## One head makes one average

    A head gives each token one row of weights, and so one average (lesson 4). Often a
    token needs two things at once: in "the keys to the house *are*", the word before it
    and the subject. Let $a$ and $b$ be the contents of two earlier tokens. A head that
    looks at both returns a mixture:

    $$z = w a + (1 - w) b$$

    How much of $a$ is left in $z$? Let $a$ and $b$ be vectors of independent random
    numbers with mean $0$ and variance $1$. We look for the matrix that recovers $a$
    from $z$ best, by least squares, and ask for the *share of the variance* of $a$ that
    it recovers: $1$ is all, $0$ is none.
    """)
    return


@app.function
def recovered(z: Tensor, wanted: Tensor) -> float:
    """Share of the variance of `wanted` (N, D) that the best matrix finds in z."""
    matrix = torch.linalg.lstsq(z, wanted).solution
    error = (wanted - z @ matrix).square().mean()
    return 1 - (error / wanted.square().mean()).item()


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** Three quarters of the weight are on $a$, $w = 0.75$. Which share of $a$
    is recovered, and which share of $b$? Two heads can look at one token each. What do
    they recover?
    """)
    return


@app.cell(hide_code=True)
def _():
    share = mo.ui.slider(
        steps=[0.0, 0.25, 0.5, 0.75, 1.0],
        value=0.75,
        label="weight w on a",
        show_value=True,
    )
    share
    return (share,)


@app.cell
def _(share):
    a, b = torch.randn(2, 4096, 8, generator=torch.Generator().manual_seed(6))  # (N, D)
    w = share.value
    one, two = w * a + (1 - w) * b, torch.cat([a, b], dim=1)
    shares = {
        "a, from one head": recovered(one, a),
        "b, from one head": recovered(one, b),
        "a, from two heads": recovered(two, a),
        "b, from two heads": recovered(two, b),
    }
    expected = w**2 / (w**2 + (1 - w) ** 2)
    assert abs(shares["a, from one head"] - expected) < 0.02
    bars(shares, title="Share of the variance recovered", form=".2f")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    At $w = 0.75$, one head keeps $0.9$ of $a$ and only $0.1$ of $b$. The covariance of
    $a$ and $z$ is $w$, and the variance of $z$ is $w^2 + (1 - w)^2$. The best estimate
    of $a$ is a number times $z$, and the share that it recovers is their squared
    correlation, since the variance of $a$ is $1$:

    $$\frac{\text{cov}(a, z)^2}{\text{var}(a) \, \text{var}(z)} =
    \frac{w^2}{w^2 + (1 - w)^2}$$

    For $b$, $w$ and $1 - w$ change places, so both shares sum to $1$ at every $w$. Two
    heads recover both in full. A wider head would not help: its weight $w$ applies to
    all its numbers.

    (This holds for a *matrix* that reads random numbers. With a few possible words, a
    later non-linear layer can sometimes separate a mixture.)

    ## Many heads for the price of one

    *Multi-head attention* (Vaswani et al., 2017) divides the width: $H$ heads of width
    $D = C / H$. Together, the $H$ query matrices have $C \cdot H D = C^2$ numbers, for
    every $H$. The same holds for keys and values. But now there are $H$ rows of weights
    per token.

    The outputs $z_h$ of all heads are put side by side and multiplied by $W_o$. This is
    a *sum over heads*, each with its own $D$ rows of $W_o$, the part $W_o^{(h)}$:

    $$y = [z_0, \dots, z_{H-1}]\, W_o = \sum_h z_h W_o^{(h)}$$

    So each head adds its own vector to the token, as if it were alone.
    """)
    return


@app.function
def contributions(q: Tensor, k: Tensor, v: Tensor, W_o: Tensor) -> Tensor:
    """What each head adds (H, T, C): q (H, T, D), k and v (K, T, D), W_o (H, D, C)."""
    H, T, D = q.shape
    group = H // len(k)  # query heads per key head
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    parts = []
    for h in range(H):
        scores = q[h] @ k[h // group].T / D**0.5
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=1)
        parts.append(weights @ v[h // group] @ W_o[h])
    return torch.stack(parts)


@app.function
def difference_from_library(model: GPT, K: int) -> float:
    """Largest difference of our sum from the library's attention, layer 1."""
    ids = torch.tensor(trained_model()[1].encode(TEXT[:24]))[None]
    with torch.no_grad(), capture(model) as cache:
        model(ids)
    layer = cache.layers[1]
    q, k, v = layer.rot_q[0], layer.rot_k[0], layer.v[0]
    assert q.shape == (4, 24, 16)  # (H, T, D)
    assert k.shape == v.shape == (K, 24, 16)
    W_o = model.blocks[1].attention.out.weight.T.view(4, 16, 64)  # (H, D, C)
    ours = contributions(q, k, v, W_o).sum(dim=0)
    return (ours - layer.attn_out[0]).abs().max().item()


@app.cell
def _():
    model, _ = trained_model()  # trained for some seconds, as in lesson 4
    difference = difference_from_library(model, K=4)
    assert difference < 1e-5
    mo.md(f"Largest difference from the library's attention: {difference:.2g}.")
    return (model,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The model has 2 layers of 4 heads. We set the output of one head to zero and measure
    the loss on a text (lesson 5). `edited` does this inside the library's model.

    **Predict.** Without one head, the loss rises. Does each of the 8 heads matter about
    equally?
    """)
    return


@app.function
def rise_without(model: GPT, layer: int, head: int) -> float:
    """How much the loss rises, in nats per character, without a head."""
    with edited(model, [Edit("head", layer=layer, head=head)]):
        without = loss_on_text(model)
    return without - loss_on_text(model)


@app.cell
def _(model):
    rises = [[rise_without(model, i, head) for head in range(4)] for i in range(2)]
    largest = max(max(row) for row in rises)
    smallest = min(min(row) for row in rises)
    assert largest > 3 * smallest
    heatmap(
        rises,
        rows=["layer 0", "layer 1"],
        columns=[f"head {head}" for head in range(4)],
        title="Rise of the loss without a head, nats per character",
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The heads are far from equal: the largest rise is more than three times the
    smallest. Michel et al. (2019) found the same in large models, where many heads can
    be removed. (Zero is only one way to remove a head: lesson 15 has others.)

    ## Heads that share keys and values

    A model that writes keeps the keys and values of all earlier tokens: the *KV cache*
    (lesson 14). Without it, they would be computed again for each new token. Per token,
    the cache holds

    $$2 \cdot L \cdot K \cdot D \text{ numbers}$$

    for keys and values, $L$ layers, and $K$ key/value heads of width $D$. So far
    $K = H$. *Multi-query attention* (Shazeer, 2019) has $K = 1$: all query heads share
    one key head and one value head. *Grouped-query attention* (Ainslie et al., 2023)
    lies between: each group of $H / K$ query heads shares one. In `contributions`
    above, this is `k[h // group]`.

    **Predict.** GPT-2 small has $L = 12$, $H = 12$ and $D = 64$. It writes 16 texts of
    1,024 tokens at once. Which needs more memory in float32: its 124 million weights,
    or the cache? What happens to both if $K$ falls to 1?
    """)
    return


@app.cell(hide_code=True)
def _():
    key_heads = mo.ui.slider(
        steps=[1, 2, 3, 4, 6, 12],
        value=12,
        label="key/value heads K",
        show_value=True,
    )
    key_heads
    return (key_heads,)


@app.function
def megabytes(K: int, texts: int = 16, tokens: int = 1024) -> dict[str, float]:
    """Size of GPT-2 small with K key/value heads, and of its cache, in float32."""
    config = ModelConfig(vocab_size=50_257, n_kv_head=K)
    no_memory = torch.empty(0, device="meta")  # tensors with a shape but no contents
    cache = KVCache(config, texts, tokens, like=no_memory)
    assert cache.layers[0].k.shape == (texts, K, tokens, 64)  # (B, K, S, D)
    numbers = sum(layer.k.numel() + layer.v.numel() for layer in cache.layers)
    assert numbers == 2 * 12 * K * 64 * texts * tokens
    parameters = ModelSummary(config).parameters
    return {"weights": parameters * 4 / 1e6, "cache": numbers * 4 / 1e6}


@app.cell
def _(key_heads):
    sizes = {K: megabytes(K) for K in (1, key_heads.value, 12)}
    assert [round(sizes[12][name]) for name in ("weights", "cache")] == [498, 1208]
    assert [round(sizes[1][name]) for name in ("weights", "cache")] == [446, 101]
    bars(
        sizes[key_heads.value],
        title=f"Memory with {key_heads.value} key/value heads",
        y="megabytes",
        form=",.0f",
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    With 12 key/value heads, the cache needs 1,208 MB and the weights 498 MB. With one,
    the cache needs 101 MB, a twelfth. The weights shrink as well, to 446 MB, since
    $W_k$ and $W_v$ are smaller. The queries, and the rows of attention weights, stay as
    many as before.

    Memory also means speed: for each new token, attention reads the whole cache.

    ## Is sharing free?

    A model with few key heads is usually trained that way. Ainslie et al. also convert
    a finished model: each new key head is the mean of the key heads of its group, and
    the same for values.
    """)
    return


@app.function
def pooled(model: GPT, K: int) -> GPT:
    """The model with K key/value heads, each the mean of a group of the old ones."""
    H, D = model.config.n_head, model.config.resolved_head_dim
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith("qkv.weight"):
            q, k, v = weight.view(3, H, D, -1)
            k, v = (part.view(K, H // K, D, -1).mean(dim=1) for part in (k, v))
            state[name] = torch.cat([q, k, v]).flatten(0, 1)
    small = GPT.empty(replace(model.config, n_kv_head=K))
    small.load_state_dict(state)
    return small


@app.cell
def _(model):
    grouped = max(difference_from_library(pooled(model, K), K) for K in (1, 2))
    assert grouped < 1e-5
    mo.md(f"Grouped heads: largest difference from the library's: {grouped:.2g}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** We convert our small model from 4 key/value heads to 2 and to 1,
    without training it again. Does its loss hardly change, or rise by a large part?
    """)
    return


@app.cell
def _(model):
    losses = {f"K = {K}": loss_on_text(pooled(model, K)) for K in (4, 2, 1)}
    assert losses["K = 2"] > 1.2 * losses["K = 4"]
    assert losses["K = 1"] > losses["K = 2"]
    bars(losses, title="Loss after averaging key/value heads", y="nats per character")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The loss rises much: the heads had learned different keys, and a mean of different
    keys fits none of the queries. The paper therefore trains the converted model again,
    for 5 % of the original steps, and then comes close to the original quality.

    ## What to remember

    - One head makes one average. Several heads read several places without mixing them.
    - The output of attention is a sum of one vector per head.
    - The cache holds $2 L K D$ numbers per token. Fewer key/value heads make it
      smaller; the number of query heads does not change it.

    ## Exercises

    `glassgpt learn 6 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("6").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
