"""Generating text

How does a list of probabilities become text, and why is a cache exact?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="14. Generating text")

with app.setup(hide_code=True):
    import textwrap

    import marimo as mo
    import torch
    from torch import Tensor

    from glassgpt.config.schema import SamplingConfig
    from glassgpt.figures import bars, lines, tokens
    from glassgpt.generation.generate import generate, sampling_distribution
    from glassgpt.interpretability.capture import capture
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 14. Generating text

    **How does a list of probabilities become text, and why is a cache exact?**

    A language model reads a text and returns one *logit* per token of its vocabulary.
    A softmax turns logits $l_i$ into probabilities of the next token. To generate, we
    pick one token, append it, and run the model again.

    ## The loop

    The simplest rule is *greedy*: always pick the most likely token. The next cells
    train the small model of lesson 4 for some seconds and run this loop. Its tokens
    are characters.
    """)
    return


@app.function
def continue_greedily(text: str, steps: int) -> str:
    """A text and its most likely next characters, one at a time."""
    model, tokenizer = trained_model()
    ids = torch.tensor(tokenizer.encode(text))[None]  # (1, T)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids)[0, -1]  # (V,): only the last position is needed
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    return tokenizer.decode(ids[0].tolist())


@app.cell
def _():
    prompt = "the list of "
    written = continue_greedily(prompt, steps=48)
    model, tokenizer = trained_model()
    stream = generate(model, tokenizer, prompt, max_new_tokens=48, temperature=0)
    assert written == prompt + "".join(map(str, stream))
    mo.md(f"Our loop and the library's agree: `{written}`")
    return model, prompt, tokenizer


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Greedy text is dull, and it often repeats. It is also not always the most likely
    *text*: a likely first token can have only unlikely successors (exercise 3). So we
    *draw* tokens at random, by their probabilities.

    ## Temperature

    Divide the logits by a *temperature* $\tau > 0$ before the softmax:

    $$p_i = \frac{e^{l_i / \tau}}{\sum_j e^{l_j / \tau}}, \qquad
    \frac{p_i}{p_j} = e^{(l_i - l_j) / \tau}$$

    The ratio of two probabilities is raised to the power $1/\tau$. If one token is
    twice as likely as another at $\tau = 1$, it is four times as likely at $\tau =
    0.5$. A small $\tau$ approaches the greedy rule. A large $\tau$ approaches equal
    probabilities. The order of the tokens never changes.
    """)
    return


@app.function
def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities (..., V) of logits (..., V) at a temperature above 0."""
    return (logits / temperature).softmax(dim=-1)


@app.cell
def _():
    logits_of_three = torch.tensor([0.6, 0.3, 0.1]).log()
    assert at_temperature(logits_of_three, 1.0).allclose(torch.tensor([0.6, 0.3, 0.1]))
    cold = at_temperature(logits_of_three, 0.5)  # (3,)
    assert [round(share, 2) for share in cold.tolist()] == [0.78, 0.20, 0.02]
    mo.md(
        f"0.6, 0.3, 0.1 become {cold[0]:.2f}, {cold[1]:.2f}, {cold[2]:.2f} at τ = 0.5"
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** The figure shows the eight most likely characters after `the list of`
    and a space. One more bar shows all other characters together. At temperature 2,
    which bar is the longest? Below it, the library draws a text at this temperature.
    """)
    return


@app.cell(hide_code=True)
def _():
    temperature = mo.ui.slider(
        steps=[0.25, 0.5, 1.0, 2.0, 4.0],
        value=1.0,
        label="temperature",
        show_value=True,
    )
    temperature
    return (temperature,)


@app.cell
def _(model, prompt, temperature, tokenizer):
    with torch.no_grad():
        next_logits = model(torch.tensor(tokenizer.encode(prompt))[None])[0, -1]  # (V,)
    best = next_logits.topk(8).indices.tolist()
    shares = at_temperature(next_logits, temperature.value)
    named = {repr(tokenizer.decode([i])): shares[i] for i in best}
    rest = 1 - sum(named.values())
    assert temperature.value < 2 or rest > max(named.values())
    assert temperature.value > 0.5 or max(named.values()) > 0.5
    _title = f"Next character at temperature {temperature.value:g}"
    bars(named | {"all others": rest}, title=_title)
    return


@app.cell
def _(model, prompt, temperature, tokenizer):
    drawn = generate(
        model, tokenizer, prompt, max_new_tokens=100, temperature=temperature.value
    )
    sample = prompt + "".join(map(str, drawn))
    mo.plain_text(textwrap.fill(repr(sample), 34))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    At temperature 2, "all others" wins. Each of these characters is unlikely, but there
    are many of them, and together they are drawn most often. One bad character then
    spoils what follows, because the model reads it as part of the text.

    ## Cut off the tail

    Three rules set unlikely tokens to $0$ and divide the rest by their sum:

    - **top-k** (Fan et al., 2018) keeps the $k$ most likely tokens.
    - **top-p** (Holtzman et al., 2020) keeps the fewest most likely tokens whose sum
      is at least $p$. The token that reaches $p$ stays.
    - **min-p** (Nguyen et al., 2024) keeps tokens that are at least $m$ times as likely
      as the most likely one, with $m$ below 1.
    """)
    return


@app.function
def truncated(p: Tensor, method: str, value: float) -> Tensor:
    """Probabilities p (V,) without the unlikely tokens."""
    ordered, order = p.sort(descending=True)  # (V,) each
    if method == "top-k":
        kept = torch.arange(len(p)) < value
    elif method == "top-p":
        kept = ordered.cumsum(dim=0) - ordered < value  # the sum before the token
    else:  # min-p
        kept = ordered >= value * ordered[0]
    result = torch.zeros_like(p)
    result[order[kept]] = ordered[kept]
    return result / result.sum()


@app.cell
def _(model, tokenizer):
    text = "Return the first item of the list"  # T = 33 characters
    with torch.no_grad(), capture(model) as cache:
        logits = model(torch.tensor(tokenizer.encode(text))[None])[0]  # (T, V)
    kept, difference = {}, 0.0
    for method, value in {"top-k": 5, "top-p": 0.9, "min-p": 0.1}.items():
        option = {method.replace("-", "_"): value}
        library = sampling_distribution(logits, SamplingConfig(temperature=1, **option))
        ours = torch.stack(
            [truncated(p, method, value) for p in logits.softmax(dim=-1)]
        )
        difference = max(difference, (ours - library).abs().max().item())
        kept[method] = (ours > 0).sum(dim=-1)  # (T,)
    assert difference < 1e-5
    mo.md(f"Largest difference from the library's rules: {difference:.2g}.")
    return cache, kept, logits, text


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** The number below each character counts the candidates that the rule
    kept at its place. Where do top-p and min-p keep many: at the start of a word or at
    its end? And top-k?
    """)
    return


@app.cell(hide_code=True)
def _():
    rule = mo.ui.dropdown(
        {"top-k with k = 5": "top-k", "top-p 0.9": "top-p", "min-p 0.1": "min-p"},
        value="top-k with k = 5",
        label="rule",
    )
    rule
    return (rule,)


@app.cell
def _(kept, rule, text):
    candidates = kept[rule.value][:-1]  # (T - 1,): for the characters after the first
    assert set(kept["top-k"].tolist()) == {5}
    for adaptive in (kept["top-p"], kept["min-p"]):
        assert adaptive.min() == 1
        assert adaptive.max() > 15
    _title = f"Candidates that {rule.value} keeps before each character"
    tokens(list(text[1:]), candidates, title=_title, form=".0f")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Top-k keeps 5 everywhere. Where one character is nearly certain, it keeps four poor
    ones. Where a word starts, it drops good ones. Top-p and min-p adapt: they keep
    from 1 to more than 15. (Here no two tokens tie at the border. Of equally likely
    tokens, the library's top-k keeps all.)

    The library divides by the temperature first, then applies the rules. A high
    temperature therefore also lets more tokens through top-p and min-p, but not
    through top-k.

    ## Why a cache is exact

    Each step of our loop reads the whole text again. But the mask is causal: what a
    layer computes at position $s$ depends on tokens $0$ to $s$ only. Appending a token
    changes no earlier key or value. So we keep them, and compute the query, key and
    value of the new token alone:
    """)
    return


@app.function
def attention_with_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, k and v (H, T, D), one token at a time."""
    keys, values = k[:, :0], v[:, :0]  # (H, 0, D): the empty cache
    outputs = []
    for t in range(q.shape[1]):
        keys = torch.cat([keys, k[:, t : t + 1]], dim=1)  # (H, t + 1, D)
        values = torch.cat([values, v[:, t : t + 1]], dim=1)
        scores = q[:, t : t + 1] @ keys.mT / q.shape[-1] ** 0.5  # (H, 1, t + 1)
        outputs.append(scores.softmax(dim=-1) @ values)
    return torch.cat(outputs, dim=1)


@app.cell
def _(cache, logits, model, text, tokenizer):
    layer = cache.layers[1]
    by_token = attention_with_cache(layer.rot_q[0], layer.rot_k[0], layer.v[0])
    in_layer = (by_token - layer.kernel_out[0]).abs().max().item()
    kv_cache = model.new_cache(1, capacity=len(text))
    ids = torch.tensor(tokenizer.encode(text))[None]
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], cache=kv_cache)[0] for t in range(len(text))]
    by_step = torch.cat(steps).softmax(dim=-1)  # (T, V)
    in_model = (by_step - logits.softmax(dim=-1)).abs().max().item()
    assert max(in_layer, in_model) < 1e-5
    n_bytes = sum(each.k.nbytes + each.v.nbytes for each in kv_cache.layers)
    assert n_bytes / len(text) == 2 * 2 * 4 * 16 * 4 == 1024
    mo.md(
        f"Differences: {in_layer:.2g} in a layer, {in_model:.2g} in the probabilities."
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A mask is not needed: the cache holds no future. The sums run in another order, so
    the last bits may differ, but nothing is approximated.

    **Predict.** From a first token, we run the model 1,000 times, so the last run sees
    1,000 tokens. How many times more positions does it process without a cache?
    """)
    return


@app.cell
def _():
    counts = [1, 10, 100, 1000]
    without = [sum(range(1, n + 1)) for n in counts]  # step i processes i positions
    assert without[-1] == 500_500
    curves = {"no cache": (counts, without), "cache": (counts, counts)}
    lines(
        curves,
        title="Positions that the model processes",
        x="steps",
        log_x=True,
        log_y=True,
        points=True,
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Step $i$ processes $i$ positions without a cache: $1 + 2 + \dots + 1{,}000 =
    500{,}500$, about 500 times more. The time shrinks less. A step for one position
    still reads all weights, and hardware processes many positions of one pass at once.

    ## What the cache costs

    Per token, each of $L$ layers stores a key and a value for each of $K$ key/value
    heads of width $D$, in numbers of $b$ bytes:

    $$\text{bytes per token} = 2 \cdot L \cdot K \cdot D \cdot b$$

    Our model stores $2 \cdot 2 \cdot 4 \cdot 16 \cdot 4 = 1{,}024$ bytes, as the cell
    above asserts. GPT-2 small in bfloat16 stores $2 \cdot 12 \cdot 12 \cdot 64 \cdot 2
    = 36{,}864$ bytes per token: 36 MiB for its context of 1,024 tokens.

    When a context is full, the oldest tokens must leave. Dropping their keys is not
    exact: in deeper layers, the remaining keys were computed *from* the dropped tokens.
    The library drops the older half of the text and reads the rest again.

    ## What to remember

    - Generation is a loop: probabilities, one token, append.
    - Temperature raises ratios of probabilities to the power $1/\tau$.
    - Top-k keeps a number of tokens, top-p a share of probability, min-p a ratio.
    - A cache is exact because the mask is causal. It saves work and costs memory.

    ## Exercises

    `glassgpt learn 14 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("14").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
