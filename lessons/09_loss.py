"""Loss

Which number should training make smaller, and when is it small?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="9. Loss")

with app.setup(hide_code=True):
    import functools
    import math

    import marimo as mo
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from glassgpt.config.model import ModelConfig
    from glassgpt.data.batches import Batches
    from glassgpt.data.builtin_texts import python_docs
    from glassgpt.data.dataset import TokenStream
    from glassgpt.data.tokenizer_training import train_bpe
    from glassgpt.evaluation.perplexity import measure_stream
    from glassgpt.figures import bars, lines
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.model.gpt import GPT
    from glassgpt.model.loss import cross_entropy
    from glassgpt.tokenizers.builtin import CharacterTokenizer, Tokenizer

    STEPS = 150  # of training: some seconds per model

    @functools.cache
    def documentation() -> tuple[str, str]:
        """The Python documentation to train on, and other parts of it to measure on."""
        documents = python_docs()
        held_out = len(documents) // 10
        measured = "\n\n".join(documents[:held_out])[:20_000]
        return "\n\n".join(documents[held_out:]), measured

    @functools.cache
    def tokenizer_of(kind: str) -> Tokenizer:
        """The tokenizer of characters, or one of 1,024 byte pairs."""
        seen, measured = documentation()
        if kind == "characters":
            return CharacterTokenizer.from_texts([seen, measured])
        return train_bpe([seen], 1024)

    @functools.cache
    def trained(kind: str, steps: int = STEPS) -> GPT:
        """A small model after this many steps of 16 windows of 64 tokens."""
        tokenizer = tokenizer_of(kind)
        shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 64}
        shape |= {"vocab_size": tokenizer.vocab_size, "position": "rope"}
        model = GPT.create(ModelConfig(**shape), seed=9)
        stream = TokenStream([tokenizer.encode(documentation()[0])])
        batches = Batches([stream], context_length=64, batch_size=16, seed=9)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a model this small trains no faster on two
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 5e-3 * min((step + 1) / 10, 1 - step / steps)
            rows = torch.from_numpy(batches.batch_at(step))
            optimizer.zero_grad()
            model(rows[:, :-1], rows[:, 1:]).backward()
            optimizer.step()
        torch.set_num_threads(threads)
        return model.requires_grad_(False)

    @functools.cache
    def held_out(kind: str) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, 64) of a text that training did not see."""
        ids = torch.tensor(tokenizer_of(kind).encode(documentation()[1]))
        last = (len(ids) - 1) // 64 * 64
        return ids[:last].view(-1, 64), ids[1 : last + 1].view(-1, 64)

    @functools.cache
    def library_figures(kind: str, steps: int) -> dict:
        """Loss, perplexity and bits per byte on this text, as the library measures."""
        inputs, targets = held_out(kind)
        ids = torch.cat([inputs[0, :1], targets.flatten()]).numpy()
        model, tokenizer = trained(kind, steps), tokenizer_of(kind)
        return measure_stream(model, TokenStream([ids]), tokenizer).figures


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 9. Loss

    **Which number should training make smaller, and when is it small?**

    A model gives each possible next token a probability. Training needs one number
    that says how good these are. This lesson derives it.

    ## From likelihood to loss

    Let the model give the token at place $t$, which really follows, the probability
    $p_t$, computed from the tokens before it. The probability of the whole text is the
    product

    $$P = p_1 \cdot p_2 \cdots p_T$$

    A good model makes the real text likely: this is *maximum likelihood* (Fisher,
    1922). The next cell trains a small model on characters of the Python
    documentation for some seconds. Then it multiplies the probabilities of 64 unseen
    characters.
    """)
    return


@app.cell
def _():
    model = trained("characters")
    inputs, targets = held_out("characters")  # (B, T)
    p = model(inputs[:1])[0].softmax(dim=1)  # (T, V), of the first window
    p_target = p.gather(1, targets[0][:, None])[:, 0]  # (T,)
    assert p_target.shape == (64,)
    product = p_target.prod().item()
    loss = -p_target.log().mean().item()
    assert product == 0
    mo.md(f"Product of 64 probabilities: {product}. Mean of −ln p: {loss:.2f}.")
    return inputs, model, targets


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The product is too small for float32, whose smallest number is about $10^{-45}$. A
    logarithm turns it into a sum. We also change the sign, so that smaller is better,
    and divide by $T$, so that long and short texts compare:

    $$L = -\frac{1}{T} \ln P = -\frac{1}{T} \sum_{t=1}^{T} \ln p_t$$

    This is the *loss*, in *nats per token*. A token with $p_t = 1$ adds nothing to the
    sum, one with $p_t = 0.5$ adds $0.69$, and one with $p_t = 0.01$ adds $4.6$.

    ## Does it reward honesty?

    Often several tokens are possible. Assume that one token follows in 70 % of all
    cases, and another in 30 %. The model always gives the first one the probability
    $p$, and the other $1 - p$.

    **Predict.** Which $p$ has the smallest mean loss: 0.5, 0.7, or 1, since the first
    token is the better guess?
    """)
    return


@app.cell(hide_code=True)
def _():
    share = mo.ui.slider(
        steps=[0.5, 0.6, 0.7, 0.8, 0.9],
        value=0.7,
        label="share of cases, q",
        show_value=True,
    )
    share
    return (share,)


@app.cell
def _(share):
    q = share.value
    said = torch.arange(1, 100) / 100  # p from 0.01 to 0.99
    means = -(q * said.log() + (1 - q) * (1 - said).log())
    best, smallest = said[means.argmin()].item(), means.min().item()
    assert math.isclose(best, q, abs_tol=1e-6)
    assert q != 0.7 or round(smallest, 2) == 0.61
    _curves = {"mean loss": (said, means), "smallest": ([best], [smallest])}
    _title = f"Smallest at p = {best:.1f}: {smallest:.2f} nats"
    lines(
        _curves,
        title=_title,
        x="probability p that the model gives",
        points=["smallest"],
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The honest answer wins: $p = q$. The mean loss is $-q \ln p - (1 - q) \ln(1 - p)$,
    and its derivative, $-\frac{q}{p} + \frac{1 - q}{1 - p}$, is $0$ only there. Towards
    $p = 1$ it grows without limit, because the other cases then cost more and more.

    For any number of tokens, $H(q, p) = -\sum_i q_i \ln p_i$ is the **cross-entropy**
    of the true probabilities $q$ and the model's $p$. It is smallest at $p = q$, where
    it is the *entropy* of $q$ (Shannon, 1948): 0.61 nats for 70 %. So even the best
    model of such a text has a loss above 0. A training text shows one token at each
    place. Its $q_i$ is 1, the others are 0, and $-\ln p_t$ remains.

    ## Without overflow

    A model returns logits $z_i$, and a softmax turns them into probabilities. For the
    target $y$:

    $$-\ln p_y = -\ln \frac{e^{z_y}}{\sum_i e^{z_i}} = \ln \sum_i e^{z_i} - z_y$$

    A constant added to all logits cancels. But float32 ends at about $3.4 \cdot
    10^{38} \approx e^{88.7}$. So we subtract the largest logit $m$ first:

    $$-\ln p_y = \ln \sum_i e^{z_i - m} - (z_y - m)$$

    The largest term of the sum is now $e^0 = 1$. The sum lies between 1 and $V$, the
    size of the vocabulary. This is the *log-sum-exp trick*.
    """)
    return


@app.function
def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses (N,) in nats of logits (N, V) and targets (N,)."""
    shifted = logits - logits.amax(dim=1, keepdim=True)  # (N, V), none above 0
    own = shifted.gather(1, targets[:, None])[:, 0]  # (N,)
    return shifted.exp().sum(dim=1).log() - own


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** The logits are 2, 1 and 0, and the first token is the target. We add
    $c$ to all three, from −150 to 150. Where does the formula without $m$ fail?
    """)
    return


@app.cell
def _():
    c = torch.arange(-150, 151, 2.0)  # (N,)
    z = torch.tensor([2.0, 1.0, 0.0]) + c[:, None]  # (N, V)
    naive = z.exp().sum(dim=1).log() - z[:, 0]
    stable = token_losses(z, torch.zeros(len(c), dtype=torch.long))
    assert torch.allclose(stable, torch.tensor(0.4076), atol=1e-4)
    assert (naive[c >= 88] == math.inf).all()
    assert (naive[c <= -108] == -math.inf).all()
    assert (naive - stable)[c.abs() <= 86].abs().max() < 1e-4
    _curves = {"with m": (c, stable), "without m": (c, naive)}
    lines(
        _curves, title="Loss in float32 (gaps: infinite)", x="c", points=["without m"]
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Above about $c = 86$, the sum *overflows*: it is infinite, and so is the loss. From
    about $-106$ down, all exponentials are 0, and $\ln 0 = -\infty$. Shortly
    before, the numbers have few bits left, and the loss is wrong without a warning.
    With $m$, it is right everywhere.

    ## The gradient

    Training moves the logits against their derivatives. For the loss of one token,
    $\ell = \ln \sum_j e^{z_j} - z_y$, the chain rule gives

    $$\frac{\partial \ell}{\partial z_i} =
    \frac{e^{z_i}}{\sum_j e^{z_j}} - [i = y] = p_i - [i = y]$$

    where $[i = y]$ is 1 for the target and 0 for others. The target is pushed up by
    what it lacks to 1, and all others down by what they have.
    """)
    return


@app.function
def loss_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient (N, V) of each row's loss by its logits (N, V)."""
    return logits.softmax(dim=1) - F.one_hot(targets, logits.shape[1])


@app.cell
def _(inputs, model, targets):
    logits = model(inputs[:16]).flatten(0, 1).requires_grad_()  # (B * T, V)
    flat = targets[:16].flatten()  # (B * T,)
    ours = token_losses(logits, flat).mean().item()
    by_torch = F.cross_entropy(logits, flat)
    by_model = model(inputs[:16], targets[:16]).item()  # glassgpt's own loss
    (by_autograd,) = torch.autograd.grad(by_torch, logits)
    gradient = loss_gradient(logits.detach(), flat) / len(flat)  # of the mean loss
    in_loss = max(abs(ours - by_torch.item()), abs(ours - by_model))
    in_gradient = (gradient - by_autograd).abs().max().item()
    assert in_loss < 1e-5
    assert in_gradient < 1e-5 * by_autograd.abs().max()
    mo.md(f"Differences: {in_loss:.2g} in the loss, {in_gradient:.2g} in the gradient.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Why not the squared error $(1 - p_y)^2$, which is also 0 for a perfect answer?

    **Predict.** A model is certain and wrong: the target has $p_y \approx 0$. Which
    loss pushes its logit up more strongly? And which is stronger at $p_y = 0.5$?
    """)
    return


@app.cell
def _():
    margin = torch.linspace(-6, 6, 121, requires_grad=True)  # target's logit; other: 0
    p_y = margin.sigmoid()  # the softmax of two logits
    pushes = {}
    for name, losses in {"−ln p": -p_y.log(), "(1 − p)²": (1 - p_y) ** 2}.items():
        (slope,) = torch.autograd.grad(losses.sum(), margin, retain_graph=True)
        pushes[name] = p_y.detach(), -slope
    assert pushes["−ln p"][1][0] > 0.99
    assert pushes["(1 − p)²"][1][0] < 0.01
    assert round(pushes["(1 − p)²"][1][60].item(), 2) == 0.25
    lines(pushes, title="Push on the target's logit", x="probability of the target")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Cross-entropy pushes with $1 - p_y$: the more wrong, the stronger. The squared error
    pushes with $2 p_y (1 - p_y)^2$, since $\partial p_y / \partial z_y = p_y (1 -
    p_y)$. At 0.5 that is 0.25 against 0.5. Near 0 it vanishes: a certain mistake
    teaches nothing.

    ## In chunks

    For 16 texts of 1,024 tokens, 50,304 logits per token (lesson 1) take 3.3 GB in
    float32, and their gradient as much. But $p_i - [i = y]$ needs only the
    logits of its own row. So glassgpt passes some rows at a time through the output
    matrix $W$, and forms their gradient while their logits exist. With $z = W h$, the
    gradient of the hidden vector $h$ is $W^\top (p - \text{onehot})$.
    """)
    return


@app.function
def chunked_loss(h: Tensor, W: Tensor, targets: Tensor, rows: int) -> tuple:
    """Mean loss of hidden vectors h (N, C) and head W (V, C); its gradient by h."""
    total, gradients = 0.0, []
    for start in range(0, len(h), rows):
        chunk, wanted = h[start : start + rows], targets[start : start + rows]
        logits = chunk @ W.T  # (rows, V): the only logits in memory
        total += token_losses(logits, wanted).sum().item()
        gradients.append(loss_gradient(logits, wanted) @ W)
    return total / len(h), torch.cat(gradients) / len(h)


@app.cell
def _(inputs, model, targets):
    h = model.hidden(inputs[:16]).flatten(0, 1).requires_grad_()  # (N, C)
    W, y = model.head.weight[: model.vocab_size], targets[:16].flatten()
    library = cross_entropy(h, model.head.weight, y, model.vocab_size)
    (library_gradient,) = torch.autograd.grad(library, h)
    mean, gradient_by_h = chunked_loss(h.detach(), W, y, rows=100)
    assert gradient_by_h.shape == (1024, 64)
    errors = [abs(mean - library.item())]
    errors += [(gradient_by_h - library_gradient).abs().max().item()]
    assert max(errors) < 1e-5
    mo.md(f"Differences: {errors[0]:.2g} in the loss, {errors[1]:.2g} in the gradient.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What is a good loss?

    A new model has small random weights, so all $V$ logits are near 0. Each token gets
    a probability near $1/V$, and the loss is near $-\ln \frac{1}{V} = \ln V$. For
    GPT-2, that is $\ln 50{,}257 \approx 10.8$. A first loss far above $\ln V$ points
    to an error: too large weights make a model certain before it knows anything. The
    next cell shows it with logits times 10.

    *Perplexity* is $e^L$ (Jelinek et al., 1977). With $k$ equally likely tokens, the
    loss is $\ln k$ and the perplexity $k$.
    """)
    return


@app.cell
def _(inputs, targets):
    new = trained("characters", 0)
    V = new.vocab_size
    start = new(inputs).flatten(0, 1)  # (N, V)
    first = token_losses(start, targets.flatten()).mean().item()
    certain = token_losses(10 * start, targets.flatten()).mean().item()
    assert abs(first - math.log(V)) < 0.02
    assert certain > first + 1
    mo.md(
        f"ln {V} = {math.log(V):.2f}, first loss {first:.2f}, times 10 {certain:.2f}."
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Loss and perplexity are *per token*. With another tokenizer, a token is another
    amount of text. But the text and its bytes stay the same. So divide the sum of all
    losses, $L \cdot T$, by the number of bytes $B$, and by $\ln 2$, which turns nats
    into bits:

    $$\text{bits per byte} = \frac{L \cdot T}{B \cdot \ln 2}$$

    The second model has a BPE of 1,024 ids (lesson 1), the same layers, and as many
    steps of training. Its tokens have 2.8 bytes on average.

    **Predict.** Which trained model has the lower loss, and which one predicts the text
    better? Where does a *new* BPE model stand?
    """)
    return


@app.function
def bits_per_byte(losses: Tensor, text: str) -> float:
    """Losses (T,) in nats of a text's tokens, as bits per byte of the text."""
    return losses.double().sum().item() / math.log(2) / len(text.encode("utf-8"))


@app.cell(hide_code=True)
def _():
    measure = mo.ui.dropdown(
        options=["loss", "perplexity", "bits per byte"], value="loss", label="measure"
    )
    measure
    return (measure,)


@app.cell
def _(measure):
    figures, bits = {}, []
    for kind in ("characters", "BPE"):
        x, goal = held_out(kind)
        text = tokenizer_of(kind).decode(goal.flatten().tolist())
        for state, steps in (("new", 0), ("trained", STEPS)):
            row = library_figures(kind, steps)
            scores = trained(kind, steps)(x).flatten(0, 1)  # (N, V)
            own = bits_per_byte(token_losses(scores, goal.flatten()), text)
            assert abs(own - row["bits_per_byte"]) < 1e-5
            bits.append(own)
            figures[f"{kind}, {state}"] = row[measure.value.replace(" ", "_")]
    assert all(abs(a - b) < 0.2 for a, b in zip(bits[1:], [3.6, 3.6, 2.5], strict=True))
    bars(figures, title=f"{measure.value.capitalize()} on unseen text", form=".2f")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The trained BPE model has about twice the loss, and predicts the text better: about
    2.5 bits per byte against 3.6. Each of its predictions is harder, but it makes 2.8
    times fewer. (Other ways to cut the same text are not counted.) Even the *new* BPE
    model is at 3.6. It knows nothing, but its tokenizer has frequent strings as single
    tokens.

    ## What to remember

    - The loss is the mean of $-\ln p$ of the real tokens, smallest for honest
      probabilities.
    - Subtract the largest logit before any exponential.
    - The gradient by the logits is softmax minus one-hot.
    - A new model's loss is near $\ln V$. Compare tokenizers by bits per byte.

    ## Exercises

    Write your answers with `glassgpt learn 9 --exercises answers.py`, and check them
    with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("9").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
