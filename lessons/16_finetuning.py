"""From base model to chat

How does a base model learn to answer, and what does it forget?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="16. From base model to chat")

with app.setup(hide_code=True):
    import contextlib
    import copy
    import dataclasses
    import functools
    import math
    import random
    import re

    import marimo as mo
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.nn.utils.rnn import pad_sequence

    from glassgpt.data.builtin_texts import python_docs
    from glassgpt.figures import lines, tokens
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model
    from glassgpt.model.gpt import GPT
    from glassgpt.model.loss import IGNORED
    from glassgpt.tokenizers.builtin import BytesTokenizer

    SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>"]  # their ids: V, V + 1, V + 2
    # Name: learning rate, and how many of the 16 windows of a batch are old text.
    WAYS = {
        "large rate": (3e-3, 0),
        "small rate": (3e-4, 0),
        "large rate, half old text": (3e-3, 8),
    }

    RESULTS: dict = {}  # of training, so that each model is trained once per process

    def once(function):
        """Decorator: return the first result for the same arguments."""

        @functools.wraps(function)
        def cached(*arguments):
            key = function.__name__, arguments
            if key not in RESULTS:
                RESULTS[key] = function(*arguments)
            return RESULTS[key]

        return cached

    @contextlib.contextmanager
    def one_thread():
        """A model this small trains no faster on two."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 16. From base model to chat

    **How does a base model learn to answer, and what does it forget?**

    A *base model* only continues a text. Ours is the small character model of lesson 4,
    trained on the Python documentation. We ask it a question:
    """)
    return


@app.cell(hide_code=True)
def _():
    base_model, characters = trained_model()
    base_text = "Last letter of table?"
    base_reply = written(base_model, characters.encode(base_text).tolist(), 32)
    assert base_reply[0] != "e"
    mo.md(f"`{base_text}` is continued with `{base_reply!r}`.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    It writes what may come next in documentation, not an answer. *Fine-tuning* changes
    that: training continues, on another text. First we see what this costs.

    ## Another text

    Our new text is invented: weather reports, such as `Monday: rain in Oslo, 14
    degrees.`
    """)
    return


@app.function
def weather_report(rng: random.Random) -> str:
    """A line of the new text."""
    day = rng.choice(["Mon", "Tues", "Wednes", "Thurs", "Fri", "Satur", "Sun"])
    weather = rng.choice(["rain", "snow", "fog", "sun", "wind", "hail"])
    city = rng.choice(["Oslo", "Rome", "Lima", "Cairo", "Delhi", "Quito", "Paris"])
    return f"{day}day: {weather} in {city}, {rng.randint(10, 29)} degrees.\n"


@app.function(hide_code=True)
@once
def texts() -> tuple[Tensor, Tensor]:
    """The ids of many weather reports, and of the documentation."""
    _, tokenizer = trained_model()
    rng = random.Random(16)
    reports = "".join(weather_report(rng) for _ in range(4000))
    both = tokenizer.encode(reports), tokenizer.encode("\n\n".join(python_docs()))
    return torch.from_numpy(both[0]), torch.from_numpy(both[1])


@app.function(hide_code=True)
def windows(ids: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random windows (count, 65) of a text (lesson 3)."""
    starts = torch.randint(len(ids) - 64, (count, 1), generator=generator)
    return ids[starts + torch.arange(65)]


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The loop is that of any training. It starts from trained weights, and here its
    learning rate is constant. `batch` draws inputs and targets; `measure` returns what
    we want to know of the model. `mixed_batch` draws windows (lesson 3) of both texts.
    """)
    return


@app.function
def tune(model: GPT, lr: float, steps: int, batch, measure) -> Tensor:
    """Train a model; return its measurements before each 10th step and at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    generator, history = torch.Generator().manual_seed(16), []
    for step in range(steps + 1):
        if step % 10 == 0:
            with torch.no_grad():
                history.append(measure(model))
        if step < steps:
            loss = model(*batch(generator))  # inputs (B, T) and targets (B, T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.tensor(history)


@app.function
def mixed_batch(old_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets (16, 64): this many windows of the old text, others new."""
    new, old = (ids[:-40_000] for ids in texts())  # the rest is for measuring
    parts = windows(new, 16 - old_rows, generator), windows(old, old_rows, generator)
    ids = torch.cat(parts)  # (16, 65)
    return ids[:, :-1], ids[:, 1:]


@app.function(hide_code=True)
@once
def tuned(lr: float, old_rows: int) -> tuple[GPT, Tensor]:
    """A fine-tuned copy of the base model, and its losses (N, 2) on both texts."""
    model, generator = copy.deepcopy(trained_model()[0]), torch.Generator()
    tests = [windows(ids[-40_000:], 64, generator.manual_seed(0)) for ids in texts()]
    batch = functools.partial(mixed_batch, old_rows)

    def losses(model: GPT) -> list[float]:
        return [model(ids[:, :-1], ids[:, 1:]).item() for ids in tests]

    with one_thread():
        return model, tune(model, lr, 60, batch, losses)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    `tuned`, which is not shown, trains copies of the base model for 60 steps. The large
    rate is 0.003, the small one 0.0003. The third way has 8 windows of old text among
    the 16 of each batch.

    **Predict.** During 60 steps on weather reports, what happens to the loss on the
    documentation? The dotted line is the loss of a model that learned nothing, and
    gives all characters the same probability. Can fine-tuning make the model worse?
    """)
    return


@app.cell(hide_code=True)
def _():
    way = mo.ui.dropdown(list(WAYS), value="large rate", label="fine-tuning")
    way
    return (way,)


@app.cell
def _(way):
    model, history = tuned(*WAYS[way.value])
    steps, equal = range(0, 61, 10), math.log(model.vocab_size)  # -ln(1 / V)
    new_loss, old_loss = history.T  # (N,) each
    assert new_loss[-1] < 0.5 < 3 < new_loss[0]
    assert (old_loss[-1] > equal) == (way.value == "large rate")
    losses_of = {"reports (new)": (steps, new_loss)}
    losses_of["documentation (old)"] = steps, old_loss
    losses_of["equal probabilities"] = steps, [equal] * 7
    lines(losses_of, title=f"Loss, {way.value}", x="step")
    return (model,)


@app.function(hide_code=True)
def written(model: GPT, ids: list[int], count: int = 24) -> str:
    """What a model writes greedily after ids, to <|end|> or to this many tokens."""
    _, tokenizer = trained_model()
    V, start = tokenizer.vocab_size, len(ids)
    while len(ids) < start + count and ids[-1] != V + 2:
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    new = ids[start:]
    return "".join(SPECIAL[i - V] if i >= V else tokenizer.decode([i]) for i in new)


@app.cell(hide_code=True)
def _(model):
    _ids = trained_model()[1].encode("the list of ").tolist()
    mo.md(f"Greedy continuation of `the list of `: `{written(model, _ids, 36)!r}`")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    At the large rate, the loss on the old text rises above the dotted line. The model
    now expects weather reports everywhere, and it is sure of them. To be sure and wrong
    costs more than to know nothing: the loss $-\ln p$ grows without limit as $p$ goes
    to $0$. This is **catastrophic forgetting** (McCloskey and Cohen, 1989). Both texts
    share all weights, and nothing in the loss protects the old text.

    Now choose the two other ways. With a ten times smaller rate, the model forgets
    less, but it also learns less in 60 steps. If half of each batch is old text
    (*rehearsal*; Ratcliff, 1990), it learns the reports and forgets least.

    **Predict.** Is the small rate only slower? Compare the ways at the *same* loss on
    the reports, for example 0.5. Has each forgotten equally much there?
    """)
    return


@app.cell
def _():
    curves, forgotten = {}, []
    for name, (lr, old_rows) in WAYS.items():
        new, old = tuned(lr, old_rows)[1].T  # (N,) each, from step 0 on
        curves[name] = new, old
        forgotten.append(np.interp(0.5, new.flip(0), old.flip(0)) - old[0].item())
    assert forgotten[0] > 1.3 * forgotten[1]
    assert forgotten[1] > 1.3 * forgotten[2]
    assert old[-1] < old[1]  # rehearsal
    look = {"title": "Loss on the old text", "x": "loss on the new text"}
    lines(curves, log_x=True, points=True, **look)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    All curves start at the base model, on the right, and go to the left. At 0.5, the
    small rate has forgotten less than the large one, and rehearsal least. A likely
    reason: AdamW's first steps move nearly every weight by about the learning rate,
    however little the new text needs it (lesson 10). With a large rate, such moves
    damage what the weights did for the old text. Rehearsal repairs it: after the first
    10 steps, its curve falls again.

    So measure both texts, fine-tune at a small rate, stop early, and mix in old text if
    you have it.

    ## Chat templates

    A chat model is a language model that was fine-tuned on chats. A chat becomes one
    text by a **template**:

    `<|user|>Last letter of table?<|assistant|>e<|end|>`

    The three marks are *special tokens*. Each has an id of its own, which no text
    encodes to. If a user types `<|end|>`, a tokenizer of bytes makes seven ordinary
    bytes of it. So only the program can begin a turn. Use a model with the template it
    was trained with: with another mark, or one space more, it reads a text unlike any
    that it saw.

    Our vocabulary of $V$ characters gets three more ids, so embedding and head get
    three more rows. They are drawn at random; all other weights stay.
    """)
    return


@app.function
def with_special_tokens(model: GPT) -> GPT:
    """A copy of the model with three more ids."""
    V = model.vocab_size
    wider = GPT.create(dataclasses.replace(model.config, vocab_size=V + 3), seed=0)
    weights = wider.state_dict()  # views: changing them changes the model
    for name, old in model.state_dict().items():
        weights[name][: len(old)] = old
    return wider


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    In a chat, the program writes the question and both marks of roles. The model writes
    only the rest. So only these targets count toward the loss.

    **Predict.** Which tokens count: `<|assistant|>`? The answer? `<|end|>`?
    """)
    return


@app.function
def chat(question: str, answer: str) -> tuple[list[int], list[int]]:
    """The ids of a chat; and for each id, 1 if it counts toward the loss."""
    _, tokenizer = trained_model()
    user, assistant, end = range(tokenizer.vocab_size, tokenizer.vocab_size + 3)
    prompt = [user, *tokenizer.encode(question).tolist(), assistant]
    reply = [*tokenizer.encode(answer).tolist(), end]
    return prompt + reply, [0] * len(prompt) + [1] * len(reply)


@app.cell
def _():
    question = "Last letter of table?"
    ids, counts = chat(question, "e")
    pieces = [SPECIAL[0], *question, SPECIAL[1], "e", SPECIAL[2]]
    assert len(pieces) == len(ids) == len(trained_model()[1].encode(question)) + 4
    assert BytesTokenizer().encode("<|end|>").tolist() == [*b"<|end|>"]  # as typed
    assert sum(counts) == 2
    tokens(pieces, counts, title="1: counts toward the loss", form=".0f")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The answer *and* `<|end|>`. Without the end, the model would never learn to stop.
    The mark `<|assistant|>` does not count, but it is an *input*: after it, the model
    predicts the first token of the answer. (Targets are the inputs shifted by one.)

    Now many chats, about words of the documentation. The batch is padded to equal
    length. Targets that do not count get the value $-100$, here `IGNORED`.
    """)
    return


@app.function
def chats(words: list[str], answers_only: bool) -> tuple[Tensor, Tensor]:
    """Inputs (N, T) and targets (N, T) of a chat per word."""
    rows = [chat(f"Last letter of {word}?", word[-1]) for word in words]
    padded = functools.partial(pad_sequence, batch_first=True, padding_value=-1)
    ids = padded([torch.tensor(row) for row, _ in rows])  # (N, T + 1)
    counts = padded([torch.tensor(row) for _, row in rows])
    counted = counts == 1 if answers_only else ids >= 0
    return ids[:, :-1].clamp(min=0), ids.masked_fill(~counted, IGNORED)[:, 1:]


@app.function(hide_code=True)
@once
def vocabulary() -> list[str]:
    """Words of 3 to 8 letters in the documentation, in random order."""
    words = sorted(set(re.findall(r"\b[a-z]{3,8}\b", "\n".join(python_docs()))))
    random.Random(16).shuffle(words)
    return words


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The masked loss

    Let $A$ be the set of the targets that count, in the whole batch, and $|A|$ their
    number. With the probability $p_t$ of target $t$:

    $$L = -\frac{1}{|A|} \sum_{t \in A} \ln p_t$$
    """)
    return


@app.function
def masked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of the targets (N, T) that count, from logits (N, T, V)."""
    counted = targets != IGNORED
    index = targets.masked_fill(~counted, 0)[..., None]  # any valid id
    own = logits.log_softmax(dim=-1).gather(-1, index)[..., 0]  # (N, T): ln p
    return -(own * counted).sum() / counted.sum()


@app.cell
def _():
    wider, unseen = with_special_tokens(trained_model()[0]), vocabulary()[-200:]
    inputs, targets = chats(unseen, answers_only=True)
    with torch.no_grad():
        logits, library = wider(inputs), wider(inputs, targets).item()
    by_torch = F.cross_entropy(logits.mT, targets, ignore_index=IGNORED).item()
    ours = masked_loss(logits, targets).item()
    error = max(abs(ours - by_torch), abs(ours - library))
    assert error < 1e-5
    count = (targets != IGNORED).sum().item()
    assert count == 2 * len(unseen)
    divided = ours * count / targets.numel()
    mo.md(
        f"Loss {ours:.2f}; difference from PyTorch's and the library's {error:.1g}. "
        f"Divided by all {targets.numel():,} positions: {divided:.2f}."
    )
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    PyTorch's `ignore_index`, $-100$ by default, does the same. A tempting mistake is to
    set the other losses to $0$ and then average over *all* positions. This multiplies
    the loss and its gradient by $|A| / (N T)$, with $N T$ positions in the batch. The
    factor depends on the length of the questions and on the padding: the same answers
    count less in a batch with one long question. AdamW would hide a constant factor
    (lesson 10), but this one changes from batch to batch.

    ## Answers only, or all tokens?

    We fine-tune the wider base model twice for 120 steps of 32 chats: once with the
    masked loss, once with the loss of all tokens, without padding. Of about 25 targets
    per chat, 2 are the answer and its end. (`chat_model` is not shown.)

    **Predict.** Which model gives more right answers for 200 words that it never saw in
    a chat: with the loss on answers only, or on all tokens? And what happens to the
    loss on the questions?
    """)
    return


@app.function(hide_code=True)
def answer_measures(model: GPT) -> list[float]:
    """Loss on answers and on questions, and share of right answers, of unseen words."""
    inputs, answers = chats(vocabulary()[-200:], answers_only=True)
    _, everything = chats(vocabulary()[-200:], answers_only=False)
    logits, counted = model(inputs), answers != IGNORED
    right = (logits.argmax(dim=-1) == answers) | ~counted
    questions = everything.masked_fill(counted, IGNORED)
    both = masked_loss(logits, answers), masked_loss(logits, questions)
    return [*(loss.item() for loss in both), right.all(dim=1).float().mean().item()]


@app.function(hide_code=True)
@once
def chat_model(answers_only: bool) -> tuple[GPT, Tensor]:
    """The base model fine-tuned on chats, and its measures (N, 3)."""
    model = with_special_tokens(trained_model()[0])
    inputs, targets = chats(vocabulary()[:-200], answers_only)
    per_chat = (targets != IGNORED).sum().item() / len(targets)
    assert round(per_chat) == (2 if answers_only else 25)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(inputs), (32,), generator=generator)
        return inputs[rows], targets[rows]

    with one_thread():
        return model, tune(model, 1e-3, 120, batch, answer_measures)


@app.cell(hide_code=True)
def _():
    loss_on = mo.ui.dropdown(
        {"answers only": True, "all tokens": False},
        value="answers only",
        label="loss on",
    )
    loss_on
    return (loss_on,)


@app.cell
def _(loss_on):
    assistant, measures = chat_model(loss_on.value)
    answer_loss, question_loss, share = measures.T  # (N,) each
    uniform = math.log(assistant.vocab_size)
    assert share[-1] > 0.95  # of the unseen words
    assert answer_loss[-1] < 0.2
    assert (question_loss[-1] > uniform) == loss_on.value
    chat_steps = range(0, 121, 10)
    losses = {"answers": (chat_steps, answer_loss)}
    losses["questions"] = chat_steps, question_loss
    losses["equal probabilities"] = chat_steps, [uniform] * 13
    heading = f"Loss. In the end, {share[-1]:.1%} of answers are right"
    lines(losses, title=heading, x="step")
    return (assistant,)


@app.cell(hide_code=True)
def _(assistant, loss_on):
    _texts = [f"Last letter of {word}?" for word in vocabulary()[-2:]]
    _texts = ["<|user|>", *_texts, "First letter of table?"]
    _prompts = [
        [assistant.vocab_size - 3],
        *(chat(text, "")[0][:-1] for text in _texts[1:]),
    ]
    _replies = [written(assistant, ids) for ids in _prompts]
    assert _replies[0].startswith("Last letter of ") == (not loss_on.value)
    assert _replies[3] == "e<|end|>"
    _shown = ["<|user|>", *(f"<|user|>{text}<|assistant|>" for text in _texts[1:])]
    _rows = [f"| `{a}` | `{b}` |" for a, b in zip(_shown, _replies, strict=True)]
    mo.md("\n".join(["| text | continued with |", "| :-- | :-- |", *_rows]))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Both models answer nearly all questions right: here, the mask hardly changes the
    answers. It changes the *questions*. Without a loss on them, the curve rises above
    the dotted line: forgetting again. With a loss on all tokens, the model learns to
    write questions as well: choose it, and the table shows that it continues `<|user|>`
    with a question of its own.

    So why mask? First, the loss then measures what we want. The mean over all tokens is
    mostly about questions, whose words no model can foresee. Second, the model does not
    learn to imitate users and their errors. But measure it for your data: with long
    questions and short answers, or few examples, a loss on the questions can help (Shi
    et al., 2024).

    The last row of the table shows what neither model learned. We asked for the *first*
    letter and got the last one. Every chat in training asked for the last, so the
    models never needed to read that word. Real chat models are trained on many kinds of
    questions (Ouyang et al., 2022).

    ## What to remember

    - Fine-tuning continues training on another text. What has no loss is not protected.
    - A small rate and old text in the batches forget less. Measure both texts.
    - A template turns a chat into one text. Special tokens mark turns; `<|end|>` counts
      toward the loss.
    - The masked loss divides by the number of targets that count.

    ## Exercises

    `glassgpt learn 16 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("16").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
