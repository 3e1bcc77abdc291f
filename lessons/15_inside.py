"""Inside a trained model

Which parts of a trained model make a prediction, and how can we find them?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="15. Inside a trained model")

with app.setup(hide_code=True):
    import contextlib
    import functools
    import io
    import tempfile
    from pathlib import Path

    import marimo as mo
    import torch
    from torch import Tensor

    from glassgpt.config.recipes import recipe
    from glassgpt.figures import lines
    from glassgpt.interop.references import load
    from glassgpt.interpretability.capture import ActivationCache, capture
    from glassgpt.interpretability.figures import attribution, head, lens
    from glassgpt.interpretability.interventions import Edit, edited
    from glassgpt.interpretability.logit_lens import logit_attribution, logit_lens
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.model.gpt import GPT
    from glassgpt.training.run import train

    PERIOD = 16  # letters before the repetition

    @functools.cache
    def trained() -> tuple:
        """Models of recipe `induction` by training step, and their tokenizer."""
        config = recipe(
            "induction", eval_every=0, eval_tokens=4096, checkpoint_every=10,
            keep_checkpoints=40, sample={"max_new_tokens": 1}, probe={"every": 0},
        )  # fmt: skip
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a model this small trains no faster on two
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                contextlib.redirect_stdout(io.StringIO()),
            ):
                run = train(config, out=Path(folder, "run"))
                steps = range(10, 401, 10)
                loaded = {step: load(f"{run}@{step}") for step in steps}
        finally:
            torch.set_num_threads(threads)
        models = {step: model for step, (model, _) in loaded.items()}
        return models, loaded[400][1]


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 15. Inside a trained model

    **Which parts of a trained model make a prediction, and how can we find them?**

    A trained model is a long list of numbers. Nobody wrote down what they do. This
    lesson trains a model on a puzzle and then takes it apart with four instruments. One
    of them is misleading if you use it alone.

    ## The puzzle

    Each text is a string of 16 random letters, written twice, such as `qxv...qxv...`.
    In the first half, a model can only guess the next letter. In the second half, the
    answer is in the text: find where the current letter stood before, and copy the
    letter that followed it.

    The model has two layers with one attention head each. Its feed-forward blocks are
    very small. The recipe `induction` trains it on random strings of many lengths for
    400 steps, about 10 seconds on one core. We test it on 64 new strings of 16
    different letters.
    """)
    return


@app.function(hide_code=True)
def repeated_strings(count: int = 64) -> Tensor:
    """Ids (B, T): 16 different letters in random order, twice. Letters: 1 to 26."""
    generator = torch.Generator().manual_seed(15)
    order = [torch.randperm(26, generator=generator)[:PERIOD] for _ in range(count)]
    return (torch.stack(order) + 1).repeat(1, 2)


@app.function
def repeat_probability(logits: Tensor, ids: Tensor) -> float:
    """Mean probability of the letters that repeat, except the first of them."""
    p = logits[:, PERIOD:-1].softmax(dim=-1)
    return p.gather(-1, ids[:, PERIOD + 1 :, None]).mean().item()


@app.cell
def _():
    models, tokenizer = trained()
    model = models[400]
    ids = repeated_strings()
    with torch.no_grad(), capture(model) as cache:
        logits = model(ids)
    assert ids.shape == (64, 32)
    assert cache.layers[1].pattern().shape == (64, 1, 32, 32)
    first_half = logits[:, : PERIOD - 1].softmax(-1).gather(-1, ids[:, 1:PERIOD, None])
    guessing, copying = first_half.mean().item(), repeat_probability(logits, ids)
    assert guessing < 0.06
    assert copying > 0.75
    mo.md(f"Probability of the right letter: first {guessing:.2f}, then {copying:.2f}.")
    return cache, copying, ids, model, models, tokenizer


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A guess among 26 letters is right with probability $1/26 \approx 0.04$. The model
    guesses in the first half and copies in the second. How does it do that?

    ## Instrument 1: the logit lens

    A model like this is a sum. Each part reads the *residual stream* $x$ and adds its
    output to it (lesson 8). With attention outputs $a_0, a_1$ and feed-forward outputs
    $f_0, f_1$, the final vector at a position is

    $$x = e + a_0 + f_0 + a_1 + f_1$$

    where $e$ is the letter's embedding. The head of the model turns $x$ into logits: a
    norm, then a matrix $U$ with one row per letter. We can apply both to the stream at
    an *earlier* depth. This is the **logit lens** (nostalgebraist, 2020).
    """)
    return


@app.function
def read_stream(model: GPT, x: Tensor) -> Tensor:
    """Probabilities (T, V) that final norm and head read from a stream x (T, C)."""
    normed = x / (x.square().mean(dim=-1, keepdim=True) + model.config.norm_eps).sqrt()
    logits = (normed * model.norm.weight) @ model.head.weight.T
    return logits.softmax(dim=-1)


@app.cell
def _(cache, ids, model):
    library = logit_lens(model, cache).next_p[:, :-1]  # (depths, T - 1)
    with torch.no_grad():
        streams = [read_stream(model, x[0, :-1]) for x in cache.residual_stream]
    ours = torch.stack(streams)  # (depths, T - 1, V)
    next_ids = ids[0, 1:].expand(3, -1)[..., None]
    assert ours.shape == (3, 31, 27)
    lens_error = (ours.gather(-1, next_ids)[..., 0] - library).abs().max().item()
    assert lens_error < 1e-5
    mo.md(f"Largest difference from the library's lens: {lens_error:.1g}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** The figure shows one string from position 13 on. The repetition starts
    at position 16. A cell holds the most likely next letter after the embedding, after
    layer 0 and after layer 1. Does the right letter appear step by step, or at once?
    """)
    return


@app.cell
def _(cache, ids, model, tokenizer):
    letters = list(tokenizer.decode(ids[0].tolist()))
    assert letters[:PERIOD] == letters[PERIOD:]
    seen = logit_lens(model, cache, start=13, stop=24)
    assert seen.next_p[:2, 4:].mean() < 0.2
    assert seen.next_p[2, 3] < 0.5
    assert (seen.next_rank[2, 4:] == 0).all()
    lens(seen, letters[13:24], tokenizer)
    return (letters,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Compare each row with the letter of the next row. At position 16, the model is not
    sure yet. From 17 on, layer 1 (*L1*) makes the right prediction, at once. After
    layer 0, the lens shows nothing of use. Is layer 0 useless? Keep this question.

    ## Instrument 2: attribution

    The final norm divides $x$ by a number, $\text{rms}(x)$, and multiplies it by
    weights $g$. If we fix that number to its value here, the logit of a letter with row
    $u$ is a sum, too:

    $$\text{logit} = d \cdot e + d \cdot a_0 + d \cdot f_0 + d \cdot a_1 + d \cdot f_1,
    \quad d = \frac{g \odot u}{\text{rms}(x)}$$

    Each term is what one part adds *directly* to the logit (Elhage et al., 2021).
    """)
    return


@app.function
def contributions(
    model: GPT, cache: ActivationCache, position: int, letter: int
) -> list[float]:
    """What e, a0, f0, a1 and f1 add to a letter's logit in the first text."""
    layers = cache.layers
    x = layers[-1].resid_post[0, position].double()  # (C,)
    rms = (x.square().mean() + model.config.norm_eps).sqrt()
    d = model.norm.weight.double() * model.head.weight[letter].double() / rms
    parts = [layers[0].resid_pre]
    for layer in layers:
        parts += [layer.attn_out, layer.mlp_out]
    return [(part[0, position].double() @ d).item() for part in parts]


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** At position 20, in the second half, which of the five parts adds most
    to the logit of the right next letter? What does the head of layer 0 add? And at
    position 8, in the first half?
    """)
    return


@app.cell(hide_code=True)
def _():
    position = mo.ui.slider(
        steps=[8, 18, 20, 22, 24, 26], value=20, label="position", show_value=True
    )
    position
    return (position,)


@app.cell
def _(cache, ids, model, position):
    place, right_letter = position.value, ids[0, position.value + 1].item()
    direct = logit_attribution(model, cache, place, right_letter)
    terms = contributions(model, cache, place, right_letter)
    _, a0, _, a1, f1 = terms
    for term, part in zip(terms, direct.parts, strict=True):
        assert abs(term - part.value) < 1e-5
    assert abs(sum(terms) - direct.logit) < 1e-4
    if place < PERIOD:
        assert max(map(abs, terms)) < 2
    else:
        assert a1 > 2
        assert a1 + f1 > 4 * abs(a0)
    attribution(direct)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Our terms equal the library's, and sum to the logit. At position 8, no part adds
    much: the model guesses. In the second half, layer 1 adds most: its head, and at
    some positions also its feed-forward block. The head of layer 0 adds little. So it
    looks as if we could remove it.

    ## Instrument 3: ablation

    To learn what a part is *needed* for, switch it off and measure again. Replacing a
    head's output by zeros is called **ablation**.

    **Predict.** Probability of the right letter: how far does it fall without the head
    of layer 1? And without the head of layer 0?
    """)
    return


@app.cell
def _(copying, ids, model):
    rows = [f"| none | {copying:.2f} |"]
    for level in (1, 0):
        with torch.no_grad(), edited(model, [Edit("head", layer=level, head=0)]):
            ablated = repeat_probability(model(ids), ids)
        assert ablated < 0.2
        rows.append(f"| head of layer {level} | {ablated:.2f} |")
    table = ["| switched off | probability of the right letter |", "| --- | --- |"]
    mo.md("\n".join([*table, *rows]))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Without *either* head, little or nothing is left. Attribution misled us: it counts
    only what a part adds to the logit directly. The head of layer 0 must work
    *through* layer 1.

    ## Instrument 4: attention patterns

    **Predict.** The current letter stood 16 positions before. Which position must the
    head of layer 1 look at to copy the right letter? And what could layer 0 do to help?
    """)
    return


@app.cell(hide_code=True)
def _():
    level_shown = mo.ui.dropdown(
        {"layer 1": 1, "layer 0": 0}, value="layer 1", label="head of"
    )
    level_shown
    return (level_shown,)


@app.cell
def _(cache, letters, level_shown):
    layer_0 = cache.layers[0].pattern(head=0)
    nearby = [weight_back(layer_0, distance) for distance in range(PERIOD)]
    assert max(nearby) == nearby[1]
    assert weight_back(cache.layers[1].pattern(head=0), PERIOD - 1) > 0.6
    head(cache, layer=level_shown.value, head=0, tokens=letters)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    In layer 1, the lower half has a stripe 15 positions back: one place *after* the
    letter's first occurrence. That place holds the letter to copy. A head that does
    this is an **induction head** (Olsson et al., 2022). In the upper half it has
    nothing to find.

    But how can it find that place? A query compares itself with keys. The letter there
    differs from the current one. What matches is the letter *before* it, and the
    embedding of a position does not hold that. Now look at layer 0. It looks at the
    last few letters, most at the position one back: it is a (blurred) **previous-token
    head**. It can copy into each position which letter came before. The key of layer 1
    can use this:

    1. Layer 0 writes at each position: "the letter before me was *q*".
    2. In layer 1, a query at *q* asks: "before whom was *q*?" The best key is the
       position after the first *q*. Its letter is copied.

    If this is right, the stripe of layer 1 must vanish without layer 0.
    """)
    return


@app.function
def weight_back(pattern: Tensor, distance: int) -> float:
    """Mean weight on the position `distance` back: pattern (B, T, T), second half."""
    rows = torch.arange(PERIOD + 1, 2 * PERIOD)
    return pattern[:, rows, rows - distance].mean().item()


@app.function(hide_code=True)
def pattern_of(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights (B, T, T) of queries and keys (B, 1, T, D), as in lesson 4."""
    scores = (q @ k.transpose(2, 3))[:, 0] / q.shape[-1] ** 0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


@app.cell
def _(cache, ids, model):
    no_head_0 = Edit("head", layer=0, head=0)
    with torch.no_grad(), edited(model, [no_head_0]), capture(model) as edited_cache:
        model(ids)
    (q, k), (q_off, k_off) = (
        (c.layers[1].rot_q, c.layers[1].rot_k) for c in (cache, edited_cache)
    )
    pairs = {"nothing": (q, k), "both": (q_off, k_off)}
    pairs |= {"the queries": (q_off, k), "the keys": (q, k_off)}
    stripe = {name: weight_back(pattern_of(*pair), 15) for name, pair in pairs.items()}
    library_pattern = cache.layers[1].pattern(head=0)
    assert (pattern_of(q, k) - library_pattern).abs().max() < 1e-5
    assert stripe["both"] < 0.2 < 0.5 < stripe["the queries"]
    assert stripe["the keys"] < 0.2
    mo.md("Without layer 0: " + "; ".join(f"{n} {w:.2f}" for n, w in stripe.items()))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    These are the weights of layer 1 on the position 15 back, if what is named is
    computed without the head of layer 0. Without it, the stripe is gone. It is enough
    to take it from the keys; the queries need it far less. So the two heads are one
    *circuit*: the second reads the first through its keys (*K-composition*; Elhage et
    al., 2021).

    ## How it was learned

    Both weights can be measured during training.

    **Predict.** Which forms first: the previous-token head, the induction head that
    needs it, or both together? Does the probability of the right letter rise evenly?
    """)
    return


@app.function(hide_code=True)
def measured(model: GPT, ids: Tensor) -> list[float]:
    """Both heads' weights, that of layer 1 without layer 0, and the probability."""
    with torch.no_grad(), capture(model) as cache:
        probability = repeat_probability(model(ids), ids)
    no_layer_0 = Edit("head", layer=0, head=0)
    with torch.no_grad(), edited(model, [no_layer_0]), capture(model) as alone:
        model(ids)
    return [
        weight_back(cache.layers[0].pattern(head=0), 1),
        weight_back(cache.layers[1].pattern(head=0), PERIOD - 1),
        weight_back(alone.layers[1].pattern(head=0), PERIOD - 1),
        probability,
    ]


@app.cell
def _(ids, models):
    steps = torch.tensor(list(models))
    history = torch.tensor([measured(each, ids) for each in models.values()])
    half = [steps[curve > curve.max() / 2][0].item() for curve in history.T[:2]]
    assert abs(half[0] - half[1]) <= 20  # steps
    assert max(half) < 150
    assert history[:, 2].max() < 0.2
    assert history[-1, 0] < history[:, 0].max() - 0.1
    names = ["layer 0, 1 back", "layer 1, 15 back", "the same, alone", "probability"]
    curves = {
        name: (steps, curve) for name, curve in zip(names, history.T, strict=True)
    }
    lines(curves, title="Weights of both heads, and probability", x="step")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    You might expect the previous-token head first. Here, both form *together*, after a
    long wait, and the probability jumps with them. A likely reason: each is useful only
    with the other. While both are weak, each barely improves the loss. As one grows,
    the other becomes more useful. Before, the weight of layer 1 is not induction: alone
    it is about as high. Afterwards, layer 0 spreads its weight over more of the letters
    before, and the prediction stays good. Olsson et al. (2022) saw such a jump in
    language models of several sizes.

    What we found holds for this model and this puzzle. Larger models have many heads,
    which can share or back up a task. Zeros are also an input that later layers never
    saw in training. So use several instruments, and believe what they agree on.

    ## What to remember

    - The logit lens shows *when* a prediction appears; attribution shows *who adds it
      directly*.
    - Ablation shows what is needed, also indirectly. Patterns suggest how.
    - An induction head looks one place after an earlier occurrence. It needs a
      previous-token head in a layer before it.

    ## Exercises

    Write your answers with `glassgpt learn 15 --exercises answers.py`, and check them
    with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("15").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
