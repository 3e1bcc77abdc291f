"""Cross-attention

How does a model that writes one text look into another?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="7. Cross-attention")

with app.setup(hide_code=True):
    import random

    import marimo as mo
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from glassgpt.config.model import ModelConfig
    from glassgpt.figures import bars, heatmap
    from glassgpt.interpretability.capture import capture
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.model.attention import SDPAKernel, Span
    from glassgpt.model.gpt import GPT
    from glassgpt.model.loss import IGNORED
    from glassgpt.utils.torch_internals import SkipInit

    DETERMINERS = ["the", "my", "every"]
    ADJECTIVES = ["red", "small", "old", "happy", "quick", "brave"]
    NOUNS = ["cat", "dog", "bird", "fish", "king", "child", "horse", "queen"]
    VERBS = ["hears", "likes", "finds", "follows", "greets", "knows"]
    ENGLISH = [*DETERMINERS, *ADJECTIVES, *NOUNS, *VERBS]
    WORDS = ["<pad>", "<start>", "<end>", *ENGLISH, *(word[::-1] for word in ENGLISH)]
    IDS = {word: i for i, word in enumerate(WORDS)}
    TRAINED: dict = {}  # models, so that each is trained once per process

    def as_ids(rows: list[list[str]]) -> Tensor:
        """Rows of words as ids (N, T), padded with 0."""
        ids = [torch.tensor([IDS[word] for word in row]) for row in rows]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True)

    def norm(x: Tensor) -> Tensor:
        """x (..., C), each vector divided by its root mean square."""
        return F.rms_norm(x, x.shape[-1:])

    def embed(model: nn.ModuleDict, ids: Tensor) -> Tensor:
        """Vectors of words and of their places, added: ids (B, T) to (B, T, C)."""
        return model["words"](ids) + model["places"](torch.arange(ids.shape[1]))


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 7. Cross-attention

    **How does a model that writes one text look into another?**

    Attention was invented for translation (Bahdanau et al., 2014): at each word that it
    writes, the model looks at the words of the source text. The Transformer (Vaswani et
    al., 2017) kept this as *cross-attention*. Its **encoder** reads the source, its
    **decoder** writes the target.

    ## A language to translate

    We need a language in which you can see at once which word belongs to which. In
    ours, each English word is spelt backwards. The order changes as well. A sentence
    is a subject, a verb and an object. In subject and object, the noun comes first,
    then its adjectives in their order, then *the*, *my* or *every*. The verb goes to
    the end of the sentence.
    """)
    return


@app.function
def draw_sentence(rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Subject, verb and object in English; nouns have 0 to 2 adjectives."""
    subject, object_ = (
        [
            rng.choice(DETERMINERS),
            *rng.sample(ADJECTIVES, rng.randint(0, 2)),
            rng.choice(NOUNS),
        ]
        for _ in range(2)
    )
    return subject, [rng.choice(VERBS)], object_


@app.function
def translate(
    subject: list[str], verb: list[str], object_: list[str]
) -> tuple[list[str], list[str], list[int]]:
    """Source words, target words, and the source place of each target word."""
    source = [*subject, *verb, *object_]
    parts = subject, object_
    starts = 0, len(subject) + 1
    places = []
    for start, part in zip(starts, parts, strict=True):
        first, *adjectives, noun = range(start, start + len(part))
        places += [noun, *adjectives, first]
    places.append(len(subject))  # the verb
    return source, [source[place][::-1] for place in places], places


@app.function(hide_code=True)
def corpus(count: int = 3000) -> list[tuple[list[str], list[str], list[int]]]:
    """Different sentences, each with its translation and the source places."""
    rng, found = random.Random(7), {}
    while len(found) < count:
        source, target, places = translate(*draw_sentence(rng))
        found[" ".join(source)] = source, target, places
    return list(found.values())


@app.cell
def _():
    training, tests = corpus()[:-200], corpus()[-200:]
    words = "the old cat hears my dog".split()
    example = translate(words[:3], words[3:4], words[4:])
    assert example[1:] == ("tac dlo eht god ym sraeh".split(), [2, 1, 0, 5, 4, 3])
    mo.md(f"**{' '.join(example[0])}** becomes **{' '.join(example[1])}**.")
    return tests, training


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The English text is the *source*, its translation the *target*. The source
    positions $2, 1, 0, 5, 4, 3$, counted from $0$, are the *alignment*: where each
    target word comes from. We know it, but the models below never see it. They see
    2,800 pairs of sentences, and 200 other pairs test them.

    ## Two texts, one formula

    Cross-attention is the attention of lesson 4 with one change. The queries come from
    the target ($T$ words), the keys and values from the source ($S$ words):

    $$q = x W_q, \quad k = m W_k, \quad v = m W_v$$

    $$y = \text{softmax}\left(\frac{q k^\top}{\sqrt{D}}\right) v$$

    Here $x$ $(T, C)$ are the vectors of the target. $m$ $(S, C)$, the *memory*, is the
    output of the encoder: one row for each source word. $W_q$, $W_k$ and $W_v$ are $(C,
    D)$, so $q$ is $(T, D)$, and $k$ and $v$ are $(S, D)$. The softmax is over the
    source: the weights $(T, S)$ sum to $1$ in each row. There is no causal mask, since
    the whole source is known before the first word is written. In a batch of $B$ pairs,
    shorter sources are padded, and a mask hides the padding. If $m = x$, the same
    function is self-attention without a causal mask.
    """)
    return


@app.function
def attend(
    model: nn.ModuleDict, layer: str, x: Tensor, memory: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """One head from x (B, T, C) to memory (B, S, C): output and weights (B, T, S)."""
    x, memory = norm(x), norm(memory)
    q, k, v = (
        model[f"{layer}_q"](x),
        model[f"{layer}_k"](memory),
        model[f"{layer}_v"](memory),
    )
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return model[f"{layer}_o"](weights @ v), weights


@app.function
def translator(
    model: nn.ModuleDict, source: Tensor, target: Tensor, mix: bool
) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) of each next target word, and weights (B, T, S)."""
    T = target.shape[1]
    seen = (source != 0)[:, None]  # (B, 1, S): False at padding
    memory, x = embed(model, source), embed(model, target)
    if mix:  # the encoder lets the source words see each other
        memory = memory + attend(model, "encoder", memory, memory, seen)[0]
    causal = torch.ones(1, T, T, dtype=torch.bool).tril()
    x = x + attend(model, "decoder", x, x, causal)[0]
    y, weights = attend(model, "cross", x, memory, seen)
    x = x + y
    x = x + model["down"](F.gelu(model["up"](norm(x))))
    return model["head"](norm(x)), weights


@app.function(hide_code=True)
def new_translator(seed: int, C: int = 32) -> nn.ModuleDict:
    """Matrices of a translator with vectors of C numbers, drawn from a seed."""
    square = [
        f"{layer}_{role}"
        for layer in ("encoder", "decoder", "cross")
        for role in "qkvo"
    ]
    with SkipInit():
        model = nn.ModuleDict({name: nn.Linear(C, C, bias=False) for name in square})
        model["words"], model["places"] = (
            nn.Embedding(len(WORDS), C),
            nn.Embedding(11, C),
        )
        model["up"] = nn.Linear(C, 4 * C, bias=False)
        model["down"] = nn.Linear(4 * C, C, bias=False)
        model["head"] = nn.Linear(C, len(WORDS), bias=False)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data = (
            torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
        )
    return model


@app.function(hide_code=True)
def ids_of(pairs: list) -> tuple[Tensor, Tensor, Tensor]:
    """Source (N, S), what the decoder gets (N, T), and the words to predict (N, T)."""
    target = as_ids([["<start>", *target, "<end>"] for _, target, _ in pairs])
    goals = target[:, 1:].clone()
    goals[goals == 0] = IGNORED
    return as_ids([source for source, _, _ in pairs]), target[:, :-1], goals


@app.function(hide_code=True)
def train(model: nn.Module, loss_of, count: int, steps: int, seed: int) -> None:
    """Adam on batches of 64 of `count` rows; `loss_of` maps rows to their loss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fastest number for matrices this small
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = loss_of(torch.randint(count, (64,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)


@app.function(hide_code=True)
def trained_translator(mix: bool, seed: int = 0) -> nn.ModuleDict:
    """A translator after 500 steps."""
    if (mix, seed) not in TRAINED:
        model = TRAINED[mix, seed] = new_translator(seed)
        source, target, goals = ids_of(corpus()[:-200])

        def loss_of(rows: Tensor) -> Tensor:
            logits, _ = translator(model, source[rows], target[rows], mix)
            return F.cross_entropy(
                logits.transpose(1, 2), goals[rows], ignore_index=IGNORED
            )

        train(model, loss_of, len(source), 500, seed)
    return TRAINED[mix, seed]


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The decoder predicts each target word from the ones before it, and adds the output
    of cross-attention. `embed` adds a vector of the word and one of its position
    (lesson 2); `norm` divides a vector by its root mean square. The matrices `q`,
    `k` and `v` are those above, here with $D = C = 32$; `o` maps the result back to
    $C$ numbers. The last steps are a small feed-forward part (lesson 8) and scores for
    all $V$ words. The training loop is in the file of this lesson.

    glassgpt's models have no cross-attention. But its attention kernel, the function
    that computes softmax and average, takes any queries and keys. So we can compare
    it with `attend`, with trained weights, for a target of 4 words and a source of 6.
    """)
    return


@app.cell
def _():
    model = trained_translator(mix=False)
    x = embed(model, as_ids([["<start>", "tac", "dlo", "eht"]]))  # T = 4
    memory = embed(model, as_ids(["the old cat hears my dog".split()]))  # S = 6
    nothing_hidden = torch.tensor(True)
    ours, weights = attend(model, "cross", x, memory, nothing_hidden)
    assert weights.shape == (1, 4, 6)
    q, k, v = (
        model[f"cross_{role}"](norm(y))[:, None]  # (B, H, T or S, D) with H = 1
        for role, y in (("q", x), ("k", memory), ("v", memory))
    )
    kernel = SDPAKernel(Span(), dropout=0.0)
    library = model["cross_o"](kernel.fused(q, k, v)[:, 0])
    difference = (ours - library).abs().max().item()
    assert difference < 1e-5
    mo.md(f"Largest difference from the library's attention: {difference:.2g}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The alignment matrix

    The first translator has the simplest encoder: the vectors of the source words
    themselves (`mix=False`). It trains for 500 steps. The figure shows its weights $(T,
    S)$. Columns are source words. Each row is the step that writes a target word: the
    decoder then has the words *before* it. A word *looks most at* the column with the
    largest weight of its row.

    **Predict.** Where do you expect the large weights: on the diagonal?
    """)
    return


@app.cell(hide_code=True)
def _():
    number = mo.ui.slider(
        steps=[0, 1, 2, 3, 4], value=0, label="test sentence", show_value=True
    )
    number
    return (number,)


@app.function(hide_code=True)
def weights_of(model: nn.ModuleDict, mix: bool, pairs: list) -> list[Tensor]:
    """Cross-attention (T, S) of each pair, for the words that the model writes."""
    source, target, _ = ids_of(pairs)
    with torch.no_grad():
        _, weights = translator(model, source, target, mix)
    return [w[: len(p[1]), : len(p[0])] for w, p in zip(weights, pairs, strict=True)]


@app.function(hide_code=True)
def aligned(weights: list[Tensor], pairs: list, shift: int = 0) -> list[bool]:
    """Whether each target word looks most `shift` positions after its source."""
    return [
        int(matrix[t].argmax()) == place + shift
        for matrix, (_, _, places) in zip(weights, pairs, strict=True)
        for t, place in enumerate(places)
    ]


@app.cell
def _(number, tests):
    pair = tests[number.value]
    direct = weights_of(trained_translator(mix=False), False, [pair])
    hits = aligned(direct, [pair])
    assert sum(hits) >= len(hits) - 1
    heading = f"{sum(hits)} of {len(hits)} words look most at their source"
    axes = {"x": "source", "y": "word to write"}
    heatmap(direct[0], rows=pair[1], columns=pair[0], title=heading, **axes)
    return (axes,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The large weights follow the alignment: in each phrase the noun first and *the*,
    *my* or *every* last, and the verb at the end. No one showed it to the model. It has
    little choice: row $s$ of the memory holds only word $s$. If its weight is $0$,
    the output cannot depend on the word. (That the weight must not be $0$ is logic.
    That it is the largest is measured.)

    ## An encoder that mixes

    Real encoders let the source words see each other. Ours gets one layer of
    self-attention (`mix=True`), and trains for the same number of steps, from three
    seeds of its first weights.

    **Predict.** It translates as well as before. Will its cross-attention show the same
    alignment? What does a row of the memory hold now?
    """)
    return


@app.cell(hide_code=True)
def _():
    encoder_seed = mo.ui.slider(
        steps=[0, 1, 2], value=0, label="seed of the weights", show_value=True
    )
    encoder_seed
    return (encoder_seed,)


@app.cell
def _(axes, encoder_seed, tests):
    first = tests[0]
    mixed = weights_of(trained_translator(True, encoder_seed.value), True, [first])
    mixed_hits = aligned(mixed, [first])
    title = f"{sum(mixed_hits)} of {len(mixed_hits)} words look most at their source"
    heatmap(mixed[0], rows=first[1], columns=first[0], title=title, **axes)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Fewer words look most at their source, and which ones depends on the seed. After the
    encoder, each row of the memory holds a mixture: self-attention has copied other
    words into it. So the decoder may read a word from another word's row. The loss does
    not depend on the row from which it reads.

    ## One text instead of two

    A decoder-only model, such as GPT, has no cross-attention. We give it one text,
    source `<start>` target `<end>`, and count the loss on the target only. Its causal
    self-attention can look back at the source. We train the library's GPT in this way,
    with 2 layers, 0 and 1, of 1 head each, from two seeds.

    The figure shows a part of one layer's attention matrix: the rows of the steps that
    write target words, and the columns of the source and `<start>`. It leaves out the
    columns of the target words, so a row need not sum to 1.

    **Predict.** This part is like a cross-attention matrix. Will it show the alignment:
    in layer 0, in layer 1, in both, or not at all?
    """)
    return


@app.function(hide_code=True)
def trained_gpt(seed: int = 0) -> GPT:
    """A decoder-only model of the same task after 500 steps."""
    if ("gpt", seed) not in TRAINED:
        config = ModelConfig(
            vocab_size=len(WORDS), context_length=20, n_layer=2, n_head=1, n_embd=32,
            position="rope",
        )  # fmt: skip
        model = TRAINED["gpt", seed] = GPT.create(config, seed)
        ids, goals = one_text(corpus()[:-200])
        train(model, lambda rows: model(ids[rows], goals[rows]), len(ids), 500, seed)
    return TRAINED["gpt", seed]


@app.function
def one_text(pairs: list) -> tuple[Tensor, Tensor]:
    """Texts (N, T) of source and target, and the target words to predict (N, T)."""
    ids = as_ids([[*s, "<start>", *target, "<end>"] for s, target, _ in pairs])
    goals = ids[:, 1:].clone()
    goals[goals == 0] = IGNORED
    for row, (source, _, _) in zip(goals, pairs, strict=True):
        row[: len(source)] = IGNORED
    return ids[:, :-1], goals


@app.function(hide_code=True)
def share_right(logits: Tensor, goals: Tensor) -> float:
    """Share of sentences in which each word to predict has the largest logit."""
    right = (logits.argmax(dim=-1) == goals) | (goals == IGNORED)
    return right.all(dim=1).float().mean().item()


@app.function(hide_code=True)
def compared(tests: list) -> tuple[dict[str, float], dict[str, float]]:
    """Share of right translations by model, and of aligned words by layer."""
    right, looking = {}, {}
    source, target, goals = ids_of(tests)
    for name, mix, seed in (
        ("not mixed", False, 0),
        *((f"mixed, seed {i}", True, i) for i in range(3)),
    ):
        model = trained_translator(mix, seed)
        with torch.no_grad():
            right[name] = share_right(translator(model, source, target, mix)[0], goals)
        hits = aligned(weights_of(model, mix, tests), tests)
        looking[name] = sum(hits) / len(hits)
    ids, goals = one_text(tests)
    for seed in range(2):
        gpt, name = trained_gpt(seed), f"GPT, seed {seed}"
        with torch.no_grad():
            right[name] = share_right(gpt(ids), goals)
        for i, parts in enumerate(gpt_weights(seed, tests)):
            hits = aligned(parts, tests)
            looking[f"{name}, layer {i}"] = sum(hits) / len(hits)
    hits = aligned(parts, tests, shift=1)  # of the last layer of the last seed
    looking[f"{name}, layer 1, one after"] = sum(hits) / len(hits)
    return right, looking


@app.function(hide_code=True)
def gpt_weights(seed: int, pairs: list) -> list[list[Tensor]]:
    """For both layers, attention (T, S + 1) to source and <start>, per pair."""
    model = trained_gpt(seed)
    with torch.no_grad(), capture(model) as cache:
        model(one_text(pairs)[0])
    return [
        [
            matrix[len(s) : len(s) + len(target), : len(s) + 1]
            for matrix, (s, target, _) in zip(layer.pattern(head=0), pairs, strict=True)
        ]
        for layer in cache.layers
    ]


@app.cell(hide_code=True)
def _():
    part_of_gpt = mo.ui.dropdown(
        {f"seed {i}, layer {j}": (i, j) for i in range(2) for j in range(2)},
        value="seed 0, layer 0",
        label="GPT",
    )
    part_of_gpt
    return (part_of_gpt,)


@app.cell
def _(axes, part_of_gpt, tests):
    gpt_seed, gpt_layer = part_of_gpt.value
    part = gpt_weights(gpt_seed, tests[:1])[gpt_layer]
    gpt_hits = aligned(part, tests[:1])
    name = f"{sum(gpt_hits)} of {len(gpt_hits)} words look most at their source"
    columns = [*tests[0][0], "<start>"]
    heatmap(part[0], rows=tests[0][1], columns=columns, title=name, **axes)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    One sentence proves little. The last figure counts the target words of all 200 test
    sentences that look most at their source word. A source has 7 words on average, so a
    random column is right in about 1 of 7 cases. The last bar counts something else:
    words of seed 1, layer 1, that look most at the position *after* their source word.

    **Predict.** You have seen one sentence of each model. What share do you expect with
    an encoder that does not mix, with one that mixes, and in the layers of the GPT?
    """)
    return


@app.cell
def _(tests):
    right, looking = compared(tests)
    assert round(sum(len(s) for s, _, _ in tests) / len(tests)) == 7  # words
    bars(looking, title="Share of words that look most at their source", form=".0%")
    return looking, right


@app.cell
def _(looking, right):
    assert min(right.values()) > 0.8
    assert looking["not mixed"] > 0.95
    assert max(looking[f"mixed, seed {seed}"] for seed in range(3)) < 0.95
    assert looking["GPT, seed 0, layer 1"] > looking["GPT, seed 1, layer 1"] + 0.1
    assert looking["GPT, seed 1, layer 1, one after"] > 0.15
    mo.md("Right translations: " + "; ".join(f"{n}: {r:.1%}" for n, r in right.items()))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Nearly all translations are right, so all models use the alignment in some form. The
    matrix shows it reliably only where the rows of the memory were not mixed. The GPT
    shows it in layer 1, with one seed far better than with the other. Layer 0 has
    already mixed the source words, as an encoder does. With seed 1, many words are read
    from the position *after* their own: layer 0 has copied them there (last bar).

    Attention weights show from which *position* a model reads, not which *word* it
    reads. They are evidence, not an explanation (Jain and Wallace, 2019). To learn what
    a position holds, change the input and see what changes (lessons 5 and 15).

    All this holds for our toy task and these small models. Measure your own.

    ## What to remember

    - Cross-attention: queries from one text, keys and values from another, weights
      $(T, S)$, no causal mask.
    - A decoder-only model does the same within one text, with self-attention.
    - A clear matrix is an alignment only as far as each row still holds its own word.

    ## Exercises

    `glassgpt learn 7 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("7").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
