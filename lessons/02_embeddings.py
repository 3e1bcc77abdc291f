"""Ids to vectors

How do ids become vectors that hold a token's meaning and its place?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="2. Ids to vectors")

with app.setup(hide_code=True):
    import marimo as mo
    import torch
    import torch.nn.functional as F

    from glassgpt.config.model import ModelConfig
    from glassgpt.figures import bars, lines
    from glassgpt.interpretability.capture import capture
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model
    from glassgpt.model.attention import Rotary
    from glassgpt.model.gpt import GPT, SinusoidalPositions


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 2. Ids to vectors

    **How do ids become vectors that hold a token's meaning and its place?**

    Ids are names, not quantities: id 6 is not twice id 3. A model needs numbers that
    it can multiply and add. This lesson gives each token a vector. Then it adds what
    an id alone does not say: where in the text the token is.

    ## One-hot and embedding

    A vector that treats all $V$ ids alike is *one-hot*: $V$ numbers, with a 1 at the
    place of the id and 0 elsewhere. The first layer multiplies it by a matrix $E$ of
    shape $(V, C)$. All products with 0 vanish. What remains is row $i$ of $E$ for the
    id $i$:

    $$\text{onehot}(i) \, E = E_i$$

    So the model skips the product and looks up the row: an *embedding*. The rows
    start as random numbers, and training changes them as any other weight.
    """)
    return


@app.function
def embed_by_product(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Embedding (T, C) of ids (T,) by a table (V, C), as a matrix product."""
    return F.one_hot(ids, len(table)).to(table.dtype) @ table


@app.cell
def _():
    model, tokenizer = trained_model()  # 2 layers, on the Python documentation
    ids = torch.tensor(tokenizer.encode("the list"))  # T = 8 characters
    looked_up = model.embedding(ids).detach()
    product = embed_by_product(ids, model.embedding.weight.detach())
    assert product.shape == (8, 64)
    embedding_difference = (product - looked_up).abs().max().item()
    assert embedding_difference < 1e-5
    megabytes = 1024 * 50304 * 4 / 1e6  # one-hot vectors of GPT-2's longest text
    assert round(megabytes) == 206
    mo.md(f"Product and lookup differ by at most {embedding_difference:.2g}.")
    return model, tokenizer


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The lookup also saves memory: for a text of 1,024 tokens, GPT-2's one-hot vectors
    would take 206 MB in float32.

    ## What rows learn

    The model above was trained for some seconds to predict the next character. Two
    vectors are similar if they point in the same direction. The *cosine similarity*
    measures this: 1 for the same direction, 0 for a right angle.

    **Predict.** Which characters are most similar to `a`: its neighbours `b` and `c`,
    its capital `A`, or others?
    """)
    return


@app.cell(hide_code=True)
def _():
    character = mo.ui.dropdown(
        options=["a", "u", "t", "T", ",", "3"], value="a", label="character"
    )
    character
    return (character,)


@app.cell
def _(character, model, tokenizer):
    names = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    unit = F.normalize(model.embedding.weight.detach(), dim=1)  # rows of length 1
    similarity = unit @ unit.T  # (V, V): cosines
    own = names.index(character.value)
    best = similarity[own].topk(6)  # the most similar is the character itself
    nearest = {names[i]: similarity[own, i] for i in best.indices.tolist()[1:]}
    bars(nearest, title=f"Cosine similarity to {character.value}", form=".2f")
    return names, similarity


@app.cell
def _(names, similarity):
    vowels = [names.index(letter) for letter in "aeiou"]
    others = [names.index(letter) for letter in "bcdfghjklmnpqrstvwxz"]
    among = similarity[vowels][:, vowels].masked_select(~torch.eye(5).bool()).mean()
    across = similarity[vowels][:, others].mean()
    assert among > across + 0.1
    mo.md(f"Mean similarity: two vowels {among:.2f}, vowel and consonant {across:.2f}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The vowels are close to each other, although nobody labelled them. Similar letters
    follow after vowels, so similar vectors help to predict. Very rare characters were
    hardly trained, so their neighbours may be chance.

    ## The same words in another order

    *Dog bites man.* and *Man bites dog.* have the same four vectors. Attention (lesson
    4) is a weighted average of the tokens so far, and an average has no order.

    **Predict.** We give both sentences to new models, with random weights. We compare
    the scores that they compute for the token after the full stop. For which of these
    three are the scores equal: one layer or two layers without positions, or one layer
    with positions?
    """)
    return


@app.function
def order_effect(position: str, layers: int) -> float:
    """Largest change of a new model's last scores if dog and man change places."""
    shape = {"vocab_size": 8, "context_length": 8, "n_embd": 32, "n_head": 2}
    new = GPT.create(ModelConfig(**shape, n_layer=layers, position=position), seed=2)
    dog, bites, man, stop = range(4)
    sentences = torch.tensor([[dog, bites, man, stop], [man, bites, dog, stop]])
    with torch.no_grad():
        scores = new(sentences)[:, -1]  # (2, V)
    return (scores[0] - scores[1]).abs().max().item()


@app.cell
def _():
    effects = {
        "none, 1 layer": order_effect("none", 1),
        "none, 2 layers": order_effect("none", 2),
        "learned, 1 layer": order_effect("learned", 1),
    }
    assert effects["none, 1 layer"] < 1e-6
    assert min(list(effects.values())[1:]) > 1e-3
    bars(effects, title="Change of the last scores, by positions", form=".1g")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    One layer without positions cannot see the order (what remains is rounding). Two
    layers can: a token sees only itself and earlier ones. In the first layer, *bites*
    takes in *dog* in one sentence and *man* in the other. The second layer sees that
    difference (Haviv et al., 2022). But this is indirect, so most models get positions.

    ## Added positions

    GPT-2 *learns* a second table with a row per position, and adds row $t$ to the
    vector of token $t$. It has 1,024 rows, so longer texts are impossible. Vaswani et
    al. (2017) use a formula instead, a vector $p_t$ of $C$ numbers. Each pair of
    numbers is a hand of a clock with its own speed $\omega_i$, from fast to slow:

    $$p_t = (\sin \omega_0 t, \cos \omega_0 t, \sin \omega_1 t,
    \ldots)$$

    $$\omega_i = 10000^{-2i/C}$$
    """)
    return


@app.function
def sinusoid(T: int, C: int) -> torch.Tensor:
    """Sinusoidal positions (T, C) for an even width C."""
    table = torch.empty(T, C)
    for i in range(C // 2):
        angles = torch.arange(T) * 10000 ** (-2 * i / C)  # (T,)
        table[:, 2 * i] = angles.sin()
        table[:, 2 * i + 1] = angles.cos()
    return table


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    How similar are two positions? By $\cos(a - b) = \cos a \cos b + \sin a \sin b$,

    $$p_t \cdot p_s = \sum_i \cos(\omega_i (t - s))$$

    **Predict.** The figure shows this product for a position $t$ and all $s$. When
    you move $t$, does the curve change its shape, its height, or its place?
    """)
    return


@app.cell(hide_code=True)
def _():
    place = mo.ui.slider(
        steps=[0, 16, 32, 48, 63], value=0, label="position t", show_value=True
    )
    place
    return (place,)


@app.cell
def _(place):
    ours = sinusoid(64, 64)
    library = SinusoidalPositions(ModelConfig(n_embd=64, n_head=1))
    theirs = library(torch.zeros(1, 64, 64), torch.arange(64))[0]
    assert (ours - theirs).abs().max() < 1e-5
    products = ours @ ours[place.value]  # (64,)
    assert products.argmax() == place.value
    assert round(products.max().item(), 3) == 32  # C / 2 cosines of 0
    curve = {"product": (range(64), products)}
    lines(curve, title=f"Product of positions {place.value} and s", x="position s")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Only its place: the product depends on the distance $t - s$ alone, and is largest,
    $C/2 = 32$, at distance 0. (Our table is the library's, to within $10^{-5}$.)

    But the model adds $p_t$ to the embedding and multiplies the sum by learned
    matrices. Then, in general, the product depends on more than the distance.

    ## Rotary positions

    Attention gives two tokens a *score*: the dot product of two vectors of $D$ numbers,
    the *query* of one and the *key* of the other (lesson 4). Su et al. (2021) use the
    clock hands there. They split each query and key into pairs of numbers, which are
    arrows in a plane, and *rotate* arrow $i$ of token $t$ by the angle $\omega_i t$,
    now with $\omega_i = 10000^{-2i/D}$. A dot product of two arrows is the product of
    their lengths times the cosine of the angle between them. Rotation keeps lengths. If
    the query is at $m$ and the key at $n$, the angle changes by $\omega_i (n - m)$:
    distance alone, exactly.
    """)
    return


@app.function
def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x (T, D) at positions (T,), rotated: number i is paired with i + D/2."""
    D = x.shape[1]
    a, b = x[:, : D // 2], x[:, D // 2 :]  # the ends of the arrows (T, D/2)
    length, angle = (a**2 + b**2).sqrt(), torch.atan2(b, a)
    speed = 10000 ** (-torch.arange(0, D, 2) / D)  # (D/2,)
    angle = angle + positions[:, None] * speed
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)


@app.cell
def _(model, tokenizer):
    text = torch.tensor(tokenizer.encode("the list and the list of"))  # T = 24
    with torch.no_grad(), capture(model) as cache:
        model(text[None])
    layer, t = cache.layers[0], torch.arange(24)
    q, k = layer.q_norm[0, 0], layer.k_norm[0, 0]  # (T, D) of head 0, not rotated
    difference = (rotate(q, t) - layer.rot_q[0, 0]).abs().max().item()
    scores = rotate(q, t) @ rotate(k, t).T  # (T, T)
    moved = rotate(q, t + 100) @ rotate(k, t + 100).T
    change = ((scores - moved).abs().max() / scores.abs().max()).item()
    assert q.shape == (24, 16)
    assert max(difference, change) < 1e-5
    result = f"Difference from the library: {difference:.2g}. After the shift, scores"
    mo.md(f"{result} change by at most {change:.1g} of the largest score.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The rotation is the library's, on the queries of the trained model. When all tokens
    move by 100 positions, the scores stay the same, up to rounding.

    **Predict.** A query and a key are equal, with $D = 64$: 32 arrows of length 1. How
    does their score change with the distance: does it fall steadily? The figure shows
    the score divided by that at distance 0. The *base* is the number $10000$ in the
    speeds. What does a larger base do?
    """)
    return


@app.cell(hide_code=True)
def _():
    base = mo.ui.dropdown(
        options={"100": 1e2, "10,000": 1e4, "1,000,000": 1e6},
        value="10,000",
        label="base",
    )
    base
    return (base,)


@app.cell
def _(base):
    arrows = torch.tensor([1.0] * 32 + [0.0] * 32).expand(1, 1, 256, 64)  # (1, 1, T, D)
    rotated = Rotary(64, base.value)(arrows, torch.arange(256))[0, 0]
    by_distance = rotated @ rotated[0] / 32  # (T,): 1 at distance 0
    assert abs(by_distance[0] - 1) < 1e-5
    steps = by_distance.diff()
    assert steps.min() < 0 < steps.max()  # it falls and rises
    title = f"Score relative to distance 0, base {base.value:,.0f}"
    lines({"score": (range(256), by_distance)}, title=title, x="distance in tokens")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    It falls, but in waves: fast arrows return to their start again and again. A larger
    base slows all arrows but the first, so that the score falls more slowly. This suits
    long texts: Code Llama (Rozière et al., 2023) uses 1,000,000. Trained queries and
    keys are not equal, so a head can also learn to look at other distances.

    ## What to remember

    - An embedding is a product with a one-hot vector, done as a lookup.
    - One attention layer without positions cannot see the order of earlier tokens.
    - Learned and sinusoidal positions are added; rotary ones rotate queries and keys.
    - After the rotation, a score depends on the distance of two tokens, not on their
      places.

    ## Exercises

    `glassgpt learn 2 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("2").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
