"""The block

What must a block look like so that many of them can be stacked?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="8. The block")

with app.setup(hide_code=True):
    import math

    import marimo as mo
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from glassgpt.config.model import ModelConfig
    from glassgpt.figures import heatmap, lines
    from glassgpt.interpretability.capture import capture
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model
    from glassgpt.model.attention import LayerNorm, RMSNorm
    from glassgpt.model.gpt import ACTIVATIONS, GPT
    from glassgpt.model.summary import ModelSummary

    CHANGES = "none", "add 3 to each", "multiply each by 10", "make the last one 30"

    def new_model(n_layer: int) -> GPT:
        """An untrained GPT of width 256, otherwise as GPT-2."""
        config = ModelConfig(
            vocab_size=256, context_length=64, n_layer=n_layer, n_head=4, n_embd=256
        )
        return GPT.create(config, seed=4)

    def mean_cosine(x: Tensor) -> float:
        """Mean cosine of the angles between different rows of x (T, C)."""
        rows = F.normalize(x, dim=1)
        return ((rows @ rows.T).sum() - len(x)).item() / (len(x) * (len(x) - 1))


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 8. The block

    **What must a block look like so that many of them can be stacked?**

    Attention moves information between tokens (lessons 4 to 6). The largest GPT-2 does
    it 48 times, once in each of its 48 *blocks*. This lesson builds the block, takes
    parts away, and measures what breaks.

    ## One sum per token

    Each token has a vector $x$ of $C$ numbers. A block changes it in two steps:

    $$x \leftarrow x + \text{attention}(\text{norm}(x))$$

    $$x \leftarrow x + \text{feedforward}(\text{norm}(x))$$

    Each step *reads* $x$ and *adds* its result. Nothing is overwritten: after $L$
    blocks, $x$ is the embedding plus $2L$ results. This running sum is the **residual
    stream** (Elhage et al., 2021).

    ## Norms: read at a fixed size

    A sum grows. So each step first brings what it reads to a fixed size. **RMSNorm**
    (Zhang and Sennrich, 2019) divides by the root mean square and multiplies each
    number by a learned weight $g_i$:

    $$y_i = g_i \frac{x_i}{\sqrt{\frac{1}{C} \sum_j x_j^2 + \epsilon}}$$

    The small $\epsilon$ avoids a division by zero. **LayerNorm** (Ba et al., 2016) is
    older. It first subtracts the mean of the $C$ numbers, and at the end adds a learned
    bias. GPT-2 uses LayerNorm; many newer models use RMSNorm. (The first Transformer,
    Vaswani et al., 2017, had its norms after the additions.)
    """)
    return


@app.function
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm of x (..., C)."""
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


@app.function
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of x (..., C): RMSNorm of the distance from the mean, plus a bias."""
    return rms_norm(x - x.mean(dim=-1, keepdim=True), weight) + bias


@app.cell
def _():
    model, tokenizer = trained_model()  # trained for some seconds, as in lesson 4
    ids = torch.tensor(tokenizer.encode("the list and the list of"))[None]
    with torch.no_grad(), capture(model) as cache:
        model(ids)
    x = cache.layers[1].resid_pre  # the stream before block 1
    assert x.shape == (1, 24, 64)  # (B, T, C)
    weight, bias = torch.randn(2, 64, generator=torch.Generator().manual_seed(8))
    rms, layer = RMSNorm(64, eps=1e-5), LayerNorm(64, eps=1e-5)
    rms.weight.data = layer.weight.data = weight
    layer.bias.data = bias
    rms_error = (rms_norm(x, weight) - rms(x)).abs().max().item()
    layer_error = (layer_norm(x, weight, bias) - layer(x)).abs().max().item()
    assert max(rms_error, layer_error) < 1e-5
    mo.md(f"Differences from the library's: {rms_error:.1g} and {layer_error:.1g}.")
    return cache, ids, model


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** You add 3 to each of a token's 6 numbers. Which norm gives another
    result, LayerNorm or RMSNorm? And if you multiply each number by 10? What happens to
    the other five if one number is very large? (Weights are 1, biases 0.)
    """)
    return


@app.cell(hide_code=True)
def _():
    change = mo.ui.dropdown(CHANGES, value="none", label="change of x")
    change
    return (change,)


@app.function(hide_code=True)
def changed(change: str) -> Tensor:
    """x and its two norms (3, 6), after a change of x."""
    x = torch.tensor([2.0, -1.0, 0.5, -2.0, 1.0, 1.5])
    if change == "add 3 to each":
        x = x + 3
    elif change == "multiply each by 10":
        x = x * 10
    elif change == "make the last one 30":
        x[5] = 30.0
    ones = torch.ones(6)
    return torch.stack([x, layer_norm(x, ones, 0 * ones), rms_norm(x, ones)])


@app.cell(hide_code=True)
def _(change):
    before, shifted, scaled, outlier = map(changed, CHANGES)
    assert torch.allclose(before[1:], scaled[1:], atol=1e-4)
    assert torch.allclose(before[1], shifted[1], atol=1e-4)
    assert not torch.allclose(before[2], shifted[2], atol=0.1)
    assert (outlier[2, :5].abs() < 0.2).all()
    heatmap(
        changed(change.value),
        rows=["x", "LayerNorm", "RMSNorm"],
        columns=[f"number {i}" for i in range(6)],
        title="A vector and its norms",
        signed=True,
        limits=(-3, 3),
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A shift changes only RMSNorm's result. A factor changes neither (but for
    $\epsilon$). With one large number, RMSNorm leaves the other five between $-0.2$ and
    $0.2$: a norm fixes the size of the whole *vector*, not of each number.

    ## Feed-forward: compute within a token

    Attention only averages values, with weights that depend on the content. The
    feed-forward part computes on each token alone: a matrix to $F$ inner numbers
    (usually $F = 4C$), a nonlinear function $\phi$, and a matrix back:

    $$\text{feedforward}(x) = \phi(x W_1)\, W_2$$

    Without $\phi$, the product $W_1 W_2$ is one matrix: a linear map, however large
    $F$ is. Three common choices:

    - **GELU** (Hendrycks and Gimpel, 2016): $z\,\Phi(z)$, where $\Phi(z)$ is the
      probability that a standard normal number is below $z$. GPT-2 uses a formula that
      comes close to it.
    - **SiLU** (from the same paper): $z / (1 + e^{-z})$, that is, $z$ times a sigmoid.
    - **ReLU²** (So et al., 2021): $\max(0, z)^2$.
    """)
    return


@app.function
def gelu(z: Tensor) -> Tensor:
    """GELU of z, by the formula of GPT-2."""
    return z / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** Each function is nearly 0 far on the left and rises on the right. Does
    each rise everywhere? Training needs a slope: where is it exactly 0?
    """)
    return


@app.cell(hide_code=True)
def _():
    activation = mo.ui.dropdown(
        ["GELU", "SiLU", "ReLU²"], value="GELU", label="function"
    )
    activation
    return (activation,)


@app.cell
def _(activation):
    functions = {
        "GELU": (gelu, "gelu_tanh"),
        "SiLU": (lambda z: z * z.sigmoid(), "silu"),
        "ReLU²": (lambda z: z.clamp(min=0) ** 2, "relu_squared"),
    }
    z = torch.linspace(-4, 2, 121).requires_grad_()
    for function, name in functions.values():
        assert (function(z) - ACTIVATIONS[name]()(z)).abs().max() < 1e-5
    assert (gelu(z) - F.gelu(z)).abs().max() < 5e-4  # from z Φ(z)
    phi = functions[activation.value][0](z)
    (slope,) = torch.autograd.grad(phi.sum(), z)
    curves = {"function": (z.detach(), phi.detach()), "slope": (z.detach(), slope)}
    lines(curves, title=activation.value, x="z")
    return (functions,)


@app.cell(hide_code=True)
def _(functions):
    places = torch.linspace(-4, 2, 6001)
    lowest = {name: each(places).min(dim=0) for name, (each, _) in functions.items()}
    assert round(lowest["GELU"].values.item(), 2) == -0.17
    assert round(lowest["SiLU"].values.item(), 2) == -0.28
    mo.md(r"""
    GELU and SiLU *fall* first, to $-0.17$ and $-0.28$, and then rise. Their slope is
    exactly 0 at the lowest point only. ReLU² has slope 0 at every $z \le 0$, so
    such inputs get no gradient. To the right, its slope $2z$ grows without limit.

    **SwiGLU** (Shazeer, 2020) adds a *gate*, a third matrix whose result multiplies the
    inner numbers one by one ($\odot$):

    $$\text{SwiGLU}(x) = \left(\text{SiLU}(x W_g) \odot x W_u\right) W_d$$

    Three matrices have $3CF$ weights, two have $2CF = 8C^2$. For a fair comparison,
    choose $F$ so that $3CF = 8C^2$, that is $F = \frac{8}{3} C$. The library
    rounds it up to a multiple of 8.
    """)
    return


@app.function
def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of x (..., C): gate and up are (F, C), down is (C, F)."""
    g = x @ gate.T
    return (g * g.sigmoid() * (x @ up.T)) @ down.T


@app.cell(hide_code=True)
def _():
    weights_of = {}
    for kind in ("gelu_tanh", "swiglu"):
        config = ModelConfig(vocab_size=50257, activation=kind)  # GPT-2 small
        weights_of[kind] = ModelSummary(config).block_matrices - 4 * 768**2
    assert config.resolved_n_inner == 2048
    assert weights_of["gelu_tanh"] == weights_of["swiglu"] == 8 * 768**2
    mo.md(
        f"Feed-forward weights in a block of GPT-2 small: {weights_of['gelu_tanh']:,} "
        f"with GELU (F = 3,072), {weights_of['swiglu']:,} with SwiGLU (F = 2,048)."
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Our trained model has RMSNorm and SwiGLU. Here is its block 1, from our parts and
    the library's attention:
    """)
    return


@app.cell
def _(cache, ids, model):
    block, captured = model.blocks[1], cache.layers[1]
    positions = torch.arange(ids.shape[1])  # T = 24
    stream = captured.resid_pre
    with torch.no_grad():
        normed = rms_norm(stream, block.attention_norm.weight)
        stream = stream + block.attention(normed, positions, None)
        normed = rms_norm(stream, block.feed_forward_norm.weight)
        part = block.feed_forward
        matrices = part.gate.weight, part.up.weight, part.down.weight
        stream = stream + swiglu(normed, *matrices)
    block_error = (stream - captured.resid_post).abs().max().item()
    assert block_error < 1e-5
    mo.md(f"Largest difference from the library's block: {block_error:.1g}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Why add?

    Now take something away: the `x +`. A text of 24 different tokens goes through 12
    untrained blocks, once as they are, once with $x \leftarrow f(\text{norm}(x))$ for
    both parts $f$. We measure how similar the vectors of different tokens are: the mean
    cosine between them. 0 means unrelated, 1 means the same direction.
    """)
    return


@app.function
def similarities(add: bool) -> list[float]:
    """Mean cosine between tokens, at the embedding and after each of 12 blocks."""
    model, positions = new_model(12), torch.arange(24)
    x = model.positions(model.embedding(positions[None]), positions)  # (1, T, C)
    found = [mean_cosine(x[0])]
    for block in model.blocks:
        y = block.attention(block.attention_norm(x), positions, None)
        x = x + y if add else y
        y = block.feed_forward(block.feed_forward_norm(x))
        x = x + y if add else y
        found.append(mean_cosine(x[0]))
    return found


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** Both curves start near 0. After how many blocks without the addition
    are all tokens nearly the same?
    """)
    return


@app.cell
def _():
    with torch.no_grad():
        added, replaced = similarities(add=True), similarities(add=False)
    assert max(added) < 0.4
    assert replaced[1] > 0.7
    assert replaced[5] > 0.98
    by_depth = {
        "x + f(norm(x))": (range(13), added),
        "f(norm(x))": (range(13), replaced),
    }
    title = "Mean cosine between different tokens"
    lines(by_depth, title=title, x="blocks", points=True)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Without the addition, the cosine is above 0.7 after one block and above 0.98 after
    five. Attention is an average, and averages of averages become alike (Dong et
    al., 2021). The addition keeps what was there before.

    It also helps the gradient (He et al., 2016). If $J$ is the derivative of $f$, that
    of $x + f(x)$ is $I + J$. Through the identity $I$, a part of the gradient reaches
    earlier blocks unchanged, whatever $f$ is.

    ## How large is the sum?

    Untrained weights are random: mean $0$, standard deviation $\sigma = 0.02$. If $x$
    has mean square $m$, each number of $x W$ has variance $C m \sigma^2$, the sum of
    $C$ independent terms. After a norm, $m = 1$.

    Take texts of a *single* token, so that attention returns its value. With $\sigma_w$
    for the matrices that write to the stream:

    - Attention is two products: it writes variance $C\sigma^2 \cdot C\sigma_w^2$.
    - Feed-forward: an inner $z$ has variance $s^2 = C\sigma^2$. Let $g$ be the mean of
      $\text{GELU}(z)^2$ over normal $z$. With $4C$ inner numbers, it writes
      $4C g\, \sigma_w^2$.

    Both writes have mean 0, whatever the stream holds, so variances add up. The norm
    makes each write independent of the stream's size. So the variance grows by the same
    amount per block: a straight line.
    """)
    return


@app.function
def derived_variances(L: int, sigma_w: float, C: int = 256) -> list[float]:
    """Variance of the stream at the embedding and after each of L blocks."""
    s = C**0.5 * 0.02
    u = torch.linspace(-8, 8, 4001)
    density = torch.exp(-u * u / 2)  # of a normal number, up to a factor
    g = (gelu(s * u) ** 2 * density).sum().item() / density.sum().item()
    attention = s**2 * C * sigma_w**2
    feed_forward = 4 * C * g * sigma_w**2
    start = 2 * 0.02**2  # token embedding and position embedding
    return [start + n * (attention + feed_forward) for n in range(L + 1)]


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    GPT-2 (Radford et al., 2019) divides: $\sigma_w = 0.02 / \sqrt{2L}$, since $2L$
    results are added. The library does the same.

    **Predict.** Models of 12, 24 and 48 blocks, as deep as GPT-2's small, medium and
    XL. With this $\sigma_w$, is the variance the same after each block?
    """)
    return


@app.cell(hide_code=True)
def _():
    divided = mo.ui.dropdown(
        {"0.02 / √(2L)": True, "0.02": False},
        value="0.02 / √(2L)",
        label="σ of the matrices that write",
    )
    divided
    return (divided,)


@app.function
def measured_variances(L: int, sigma_w: float) -> list[float]:
    """The same in the library's model: mean over 128 texts of one token each."""
    model = new_model(L)
    for block in model.blocks:
        for matrix in (block.attention.out, block.feed_forward.down):
            matrix.weight.data *= sigma_w * (2 * L) ** 0.5 / 0.02
    with torch.no_grad(), capture(model) as cache:
        model(torch.arange(128)[:, None])  # (B, T) = (128, 1)
    return [x.square().mean().item() for x in cache.residual_stream]


@app.cell
def _(divided):
    variances = {}
    for L in (12, 24, 48):
        sigma_w = 0.02 / (2 * L) ** 0.5 if divided.value else 0.02
        measured = measured_variances(L, sigma_w)
        derived = derived_variances(L, sigma_w)
        assert abs(measured[-1] / derived[-1] - 1) < 0.05
        variances[f"L = {L}, measured"] = (range(L + 1), measured)
        variances[f"L = {L}, derived"] = (range(L + 1), derived)
    faint = [name for name in variances if "derived" in name]
    lines(variances, title="Variance of the stream", x="blocks", faint=faint)
    return


@app.cell(hide_code=True)
def _(model):
    scaled_end = [derived_variances(n, 0.02 / (2 * n) ** 0.5)[-1] for n in (12, 24, 48)]
    plain_end = derived_variances(48, 0.02)[-1]
    share_scaled, share_plain = 0.0008 / scaled_end[2], 0.0008 / plain_end
    assert model.config.residual_init == "zero"
    assert all(round(end, 3) == 0.012 for end in scaled_end)
    assert [round(plain_end, 1), round(scaled_end[0] / 0.0008)] == [1.1, 15]
    assert (f"{share_scaled:.1%}", f"{share_plain:.2%}") == ("6.6%", "0.07%")
    mo.md(r"""
    No: it grows about 15 times in each model. But all three end at the same 0.012,
    since twice the blocks make twice as many writes, each of half the variance.

    With $\sigma_w = 0.02$, all models follow *one* line, and 48 blocks end at 1.1. This
    does not overflow: the next norm divides by the size. But the norm shrinks all parts
    alike. The embedding has variance 0.0008. Its share of the final stream falls to
    0.07 %, instead of 6.6 % with the division. The rest is what random matrices wrote.

    Our trained model started with $\sigma_w = 0$: its blocks wrote nothing at first.

    All this holds before training, for one draw of the weights. Another draw can differ
    from the derived line by a fifth at 48 blocks. In longer texts, attention averages
    over tokens and writes less.

    ## What to remember

    - A block reads the stream twice, each time through a norm, and adds both results.
    - Without the addition, tokens become alike; with it, the embedding and the gradient
      get through.
    - The variance of $2L$ random writes adds up; $1/\sqrt{2L}$ makes its end
      independent of depth.

    ## Exercises

    `glassgpt learn 8 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("8").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
