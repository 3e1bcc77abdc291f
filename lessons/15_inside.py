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

    A trained model is a long list of numbers, without an explanation. This lesson
    trains a model on a puzzle and takes it apart with four instruments. One of them
    misleads if you use it alone.

    ## The puzzle

    Each text is a string of 16 random letters, written twice, such as `jmw...jmw...`,
    at positions 0 to 31. In the first half, a model can only guess the next letter. In
    the second half, the answer is in the text: find where the current letter stood
    before, and copy the letter that followed it.

    The model has layers 0 and 1, with one attention head and a very small feed-forward
    block each. The recipe `induction` trains it on random strings of many lengths for
    400 steps, about 10 seconds on one core (`trained`, not shown). We test
    it on 64 new strings of `PERIOD` = 16 different letters.
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
    """Mean probability of the right next letter at positions 16 to 30."""
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
    result = f"first half {guessing:.2f}, second half {copying:.2f}"
    mo.md(f"Mean probability of the right next letter: {result}.")
    return cache, copying, ids, model, models, tokenizer


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    A guess among 26 letters is right with probability $1/26 \approx 0.04$. So the model
    guesses, then copies. How?

    ## Instrument 1: the logit lens

    A model like this is a sum. Each part reads the *residual stream* $x$ and adds its
    output to it (lesson 8). With attention outputs $a_0, a_1$ and feed-forward outputs
    $f_0, f_1$, the final vector at a position is

    $$x = e + a_0 + f_0 + a_1 + f_1$$

    where $e$ is the letter's embedding. A norm and a matrix $U$ then turn $x$ into
    logits. $U$ has one row per symbol: 26 letters and the line break ⏎. We can apply
    both at an *earlier* depth: to $e$, or to $e + a_0 + f_0$ after layer 0. This is the
    **logit lens** (nostalgebraist, 2020).
    """)
    return


@app.function
def read_stream(model: GPT, x: Tensor) -> Tensor:
    """Probabilities (T, V) that final norm and U read from a stream x (T, C)."""
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
    **Predict.** Rows are positions 13 to 23 of one string, with their letters. The
    repetition starts at 16. A cell holds the most likely *next* letter and its
    probability after the embedding, after layer 0 (*L0*) and after layer 1 (*L1*). Does
    the right letter appear step by step, or at once?
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
    lens(seen, [f"{i}:{letters[i]}" for i in range(13, 24)], tokenizer)
    return (letters,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Compare each prediction with the letter of the next row. At position 16, the model
    is unsure. From 17 on, layer 1 makes the right prediction, at once. After layer 0,
    the lens shows nothing of use. Is layer 0 useless?

    ## Instrument 2: attribution

    The final norm divides $x$ by its root mean square $\text{rms}(x)$, and multiplies
    it elementwise ($\odot$) by learned weights $g$. A letter's row $u$ of $U$ gives its
    logit:

    $$u \cdot \frac{g \odot x}{\text{rms}(x)} = d \cdot x, \quad
    d = \frac{g \odot u}{\text{rms}(x)}$$

    With $d$ fixed at its value for this $x$, the logit is a sum, too:

    $$d \cdot e + d \cdot a_0 + d \cdot f_0 + d \cdot a_1 + d \cdot f_1$$

    Each term is what one part adds *directly* (Elhage et al., 2021).
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
    much: the model guesses. In the second half, layer 1 adds most, mostly by its head.
    The head of layer 0 adds little. Can we remove it?

    ## Instrument 3: ablation

    Is a part *needed*? Switch it off and measure again. Replacing a head's output by
    zeros is called **ablation**.

    **Predict.** How far does the probability of the right letter fall without the head
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
    Without *either* head, almost nothing is left. Attribution misled us: it counts only
    direct effects. The head of layer 0 must work *through* layer 1.

    ## Instrument 4: attention patterns

    Rows are queries, columns keys; the future is hatched.

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
    layer_1 = cache.layers[1].pattern(head=0)
    assert weight_back(layer_1, PERIOD - 1) > 0.6
    assert layer_1[:, PERIOD, :2].mean(dim=0).min() > 0.2  # position 16 looks at both
    head(cache, layer=level_shown.value, head=0, tokens=letters)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    In layer 1, the lower half has a stripe 15 positions back: one position *after* the
    letter's first occurrence. It holds the letter to copy. A head that does this is an
    **induction head** (Olsson et al., 2022). In the upper half there is nothing to
    find; the weight is mostly on the position itself.

    But how can it find that position? The letter there differs from the current one.
    Only the letter *before* it matches, and the embedding does not hold that. Now
    choose layer 0. It looks at the last few letters, most at the position one back: it
    is a (blurred) **previous-token head**. This suggests two steps:

    1. Layer 0 writes at each position which letter came before.
    2. In layer 1, the query at the second *j* looks for a key "*j* came before". The
       position after the first *j* has it. Its letter is copied.

    This also explains position 16: position 0 can look only at itself, so its key, too,
    says "*j* came before".

    If this is right, the stripe must vanish without layer 0. We compute the queries,
    the keys or both without its head.
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
    pairs = {"neither": (q, k), "both": (q_off, k_off)}
    pairs |= {"queries": (q_off, k), "keys": (q, k_off)}
    stripe = {name: weight_back(pattern_of(*pair), 15) for name, pair in pairs.items()}
    library_pattern = cache.layers[1].pattern(head=0)
    assert (pattern_of(q, k) - library_pattern).abs().max() < 1e-5
    assert stripe["both"] < 0.2 < 0.5 < stripe["queries"]
    assert stripe["keys"] < 0.2
    weights = "; ".join(f"{name} {weight:.2f}" for name, weight in stripe.items())
    mo.md(f"Weight of layer 1 on the position 15 back, without layer 0 in: {weights}")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The stripe is gone if both lack layer 0, and if only the keys do. The queries need
    it far less. So the two heads are one *circuit*: the second reads the first through
    its keys (*K-composition*; Elhage et al., 2021).

    ## How it was learned

    The figure follows four means over the second half during training: the weight of
    layer 0 on the position 1 back, that of layer 1 on 15 back, the latter without layer
    0, and the probability of the right letter.

    **Predict.** Which forms first: the previous-token head, the induction head that
    needs it, or both together? Does the probability rise evenly?
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
    assert 50 < min(half) <= max(half) < 150
    assert history[:, 2].max() < 0.2
    assert history[-1, 0] < history[:, 0].max() - 0.1
    names = ["layer 0, 1 back", "layer 1, 15 back", "without layer 0", "probability"]
    curves = {n: (steps, curve) for n, curve in zip(names, history.T, strict=True)}
    lines(curves, title="Weights of both heads, and probability", x="step")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Both form *together*, between steps 50 and 150, and the probability jumps with them.
    A likely reason: each is useful only with the other. As one grows, the other becomes
    more useful. Without layer 0, the weight of layer 1 stays low. Later, layer 0
    spreads its weight over more letters, and the prediction stays good. Olsson et al.
    (2022) saw such a jump in language models of several sizes.

    All this holds for this model and this puzzle. In larger models, many heads can
    share a task. Zeros are also an input that later layers never saw in training. So
    use several instruments, and believe what they agree on.

    ## What to remember

    - The logit lens shows *when* a prediction appears; attribution shows *who adds it
      directly*.
    - Ablation shows what is needed, also indirectly. Patterns suggest how.
    - An induction head looks one position after an earlier occurrence. It needs a
      previous-token head in a layer before it.

    ## Exercises

    `glassgpt learn 15 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("15").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
