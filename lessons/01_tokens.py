"""Text to numbers

How does a text become numbers, and how many does it need?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="1. Text to numbers")

with app.setup(hide_code=True):
    import functools
    import itertools
    import re
    from collections import Counter

    import marimo as mo

    from glassgpt.config.model import ModelConfig
    from glassgpt.data.builtin_texts import python_docs
    from glassgpt.data.tokenizer_training import train_bpe
    from glassgpt.figures import heatmap, lines, tokens
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.tokenizers.builtin import (
        BPETokenizer,
        BytesTokenizer,
        CharacterTokenizer,
    )
    from glassgpt.utils.errors import UserError

    @functools.cache
    def documentation() -> tuple[str, str]:
        """Nine tenths of the Python documentation to train on, and the rest."""
        documents = python_docs()
        held_out = len(documents) // 10
        return "\n\n".join(documents[held_out:]), "\n\n".join(documents[:held_out])

    @functools.cache
    def library_bpe(text: str, vocab_size: int) -> BPETokenizer:
        """The library's tokenizer of this many ids, trained on a text."""
        return train_bpe([text], vocab_size)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 1. Text to numbers

    **How does a text become numbers, and how many does it need?**

    A language model computes with numbers. A *tokenizer* cuts a text into pieces, the
    *tokens*, and gives each a whole number, its *id*. All possible tokens together are
    the *vocabulary*. This lesson builds three tokenizers: of characters, of bytes, and
    byte-pair encoding, which GPT-2 uses.

    ## Characters

    The simplest vocabulary is the sorted list of the characters in a text. The id of
    a character is its place in that list, counted from 0: a space is first.
    """)
    return


@app.function
def encode_characters(text: str, vocabulary: str) -> list[int]:
    """The ids of a text's characters: their places in the vocabulary."""
    return [vocabulary.index(character) for character in text]


@app.cell
def _():
    vocabulary = "".join(sorted(set("the cat sat")))
    by_character = CharacterTokenizer(vocabulary)
    ids = encode_characters("the cat", vocabulary)
    assert ids == by_character.encode("the cat").tolist() == [6, 4, 3, 0, 2, 1, 6]
    try:
        by_character.encode("the dog")
    except UserError as error:
        refusal = str(error).splitlines()[0].rstrip(";")
    mo.md(f"Ids of `the cat`: {ids}. Error for `the dog`: `{refusal}`")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Our ids are the library's. But such a tokenizer cannot encode a character that its
    text did not have. Unicode has more than 150,000 characters, too many to list.

    ## Bytes

    Every text is stored as *bytes*, numbers from 0 to 255. The encoding UTF-8 gives
    each character one to four of them. So 256 ids are enough for any text.

    **Predict.** How many bytes does `é` have? And `€`, or an emoji? Choose a text: each
    box is a byte, and a stronger colour is a character of more bytes.
    """)
    return


@app.cell(hide_code=True)
def _():
    example = mo.ui.dropdown(
        options=["cafe", "café", "5 €", "ok 🙂"], value="cafe", label="text"
    )
    example
    return (example,)


@app.cell
def _(example):
    letters = [letter for letter in example.value for _ in letter.encode("utf-8")]
    values = list(example.value.encode("utf-8"))
    assert values == BytesTokenizer().encode(example.value).tolist()
    sizes_of = [[len(letter.encode("utf-8")) for letter in letters]]
    look = {"title": f"{len(example.value)} characters, {len(values)} bytes"}
    look["columns"] = [letter.replace(" ", "␣") for letter in letters]
    look["texts"] = [[str(value) for value in values]]
    heatmap(sizes_of, limits=(0, 4), form=".0f", **look)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    English letters have one byte, `é` has two, `€` three and the emoji four. So a
    byte model can see and write anything. The price is length: English has one token
    per letter, and other scripts several. Attention compares each token with
    all earlier ones, so twice the tokens are four times the comparisons.

    ## Words first

    We want few tokens without a list of all words. *Byte-pair encoding* (BPE; Gage,
    1994; Sennrich et al., 2016) starts from bytes and *merges* neighbours that often
    occur together. Without a limit, it would also learn `dog.`, `dog!` and `dog?`.
    GPT-2 (Radford et al., 2019) therefore splits the text first, and no token crosses
    a split. Its rule, for plain English text, as a regular expression:
    """)
    return


@app.function
def split(text: str) -> list[str]:
    """GPT-2's pieces of an ASCII text; a space belongs to the word after it."""
    endings = r"'(?:s|t|re|ve|m|ll|d)"  # of it's, don't, you're ...
    words = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+"  # letters, digits, signs
    spaces = r"\s+(?!\S)|\s+"  # all but the last one before a word
    return re.findall(f"{endings}|{words}|{spaces}", text)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    An example, with `␣` for a space: `It's␣1984.␣␣Run!` has the pieces `It`, `'s`,
    `␣1984`, `.`, `␣`, `␣Run` and `!`. The words `␣Run` and `Run` are different tokens.
    This is why a prompt should not end with a space: in training, the space came with
    its word.

    ## Merge by merge

    Training counts each pair of neighbours within words, and merges the most frequent
    pair everywhere: it becomes one token with the next free id. Then it counts again.
    GPT-2 gives the ids 0 to 255 to the single bytes, printable ones first.
    """)
    return


@app.function
def byte_ids(word: str) -> tuple[int, ...]:
    """The ids of a word's bytes, in GPT-2's order: printable ones first."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    order = sorted(range(256), key=lambda byte: byte not in printable)
    return tuple(order.index(byte) for byte in word.encode())


@app.function
def merge(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """A word in which the id `new` replaces each occurrence of the pair."""
    merged = []
    for each in word:
        if merged and (merged[-1], each) == pair:
            merged[-1] = new
        else:
            merged.append(each)
    return tuple(merged)


@app.function
def learn_merges(text: str, count: int) -> list[tuple[int, int]]:
    """Pairs of ids to merge, in order. The first makes id 256, the second 257 ..."""
    words = Counter(byte_ids(word) for word in split(text))
    merges = []
    for new in range(256, 256 + count):
        pairs = Counter()
        for word, occurrences in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += occurrences
        # Among equally frequent pairs, the one with the smallest ids.
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        words = {merge(word, best, new): n for word, n in words.items()}
        merges.append(best)
    return merges


@app.function
def encode(text: str, merges: list[tuple[int, int]]) -> list[int]:
    """The ids of a text: apply each merge, in the order in which it was learned."""
    ids = []
    for piece in split(text):
        word = byte_ids(piece)
        for new, pair in enumerate(merges, start=256):
            word = merge(word, pair, new)
        ids += word
    return ids


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Sennrich's example is a text with `␣low` 5 times, `␣lower` 2 times, `␣newest` 6
    times and `␣widest` 3 times.

    **Predict.** Which pair is merged first? And the word `␣lowest` never occurs in
    this text: into which tokens will it be split after 10 merges? Move the slider; a
    number is a token's length in bytes.
    """)
    return


@app.cell(hide_code=True)
def _():
    count = mo.ui.slider(
        steps=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        value=0,
        label="merges",
        show_value=True,
    )
    count
    return (count,)


@app.cell
def _(count):
    text = " low" * 5 + " lower" * 2 + " newest" * 6 + " widest" * 3
    small = library_bpe(text, 257 + count.value)  # 256 bytes, end-of-text, the merges
    sample = " low newest lowest"
    sample_ids = small.encode(sample).tolist()
    assert sample_ids == encode(sample, learn_merges(text, count.value))
    pieces = [small.decode([i]) for i in sample_ids]
    if count.value >= 5:
        assert pieces[-2:] == [" low", "est"]
    shown = f"{len(pieces)} tokens after {count.value} merges"
    tokens(pieces, list(map(len, pieces)), title=shown, form=".0f")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The pairs `e s` and `s t` both occur 9 times, more often than any other pair. The
    smaller ids win: `es` is first, then `est`. From 5 merges to 10, `␣lowest` is `␣low`
    and `est`, although this word was not in the text, and counting was the only rule.
    Frequent words become one token, and rare words become familiar pieces. In the
    worst case the pieces are single bytes, so nothing is unknown.

    The same functions now learn 100 merges from 50,000 characters of the Python
    documentation. Then they encode a text that training did not see.
    """)
    return


@app.cell
def _():
    seen, unseen = (part[:50_000] for part in documentation())
    library = library_bpe(seen, 257 + 100)
    ours = encode(unseen[:5_000], learn_merges(seen, 100))
    theirs = library.encode(unseen[:5_000]).tolist()
    differences = sum(a != b for a, b in zip(ours, theirs, strict=True))
    assert differences == 0
    longest = max((library.decode([i]) for i in range(256, 356)), key=len)
    mo.md(f"{differences} of {len(ours)} ids differ. Longest token: `{longest!r}`.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## How large a vocabulary?

    More merges make a text shorter, but every token needs a row of numbers in the
    model (lesson 2), and the model must compute a score for each.

    **Predict.** With 256 ids, a token is 1 byte. A vocabulary of 8,192 is 32 times as
    large. About how many bytes does a token then have: 32, 16, 8 or 4?
    """)
    return


@app.cell
def _():
    train, held_out = documentation()
    sizes = [512, 1024, 2048, 4096, 8192]
    bpes = [library_bpe(train, size) for size in sizes]
    means = [1.0, *(len(held_out) / len(bpe.encode(held_out)) for bpe in bpes)]
    gains = [after - before for before, after in itertools.pairwise(means)]
    assert gains == sorted(gains, reverse=True)
    assert 4 < means[-1] < 5
    curve = {"BPE": ([256, *sizes], means)}
    title_of_sizes = "Mean bytes per token on held-out text"
    lines(curve, title=title_of_sizes, x="vocabulary", log_x=True, points=True)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Between 4 and 5: each doubling adds less than the one before. The first merges join
    the pairs that occur everywhere. Later ones join rare pairs, which shorten few
    texts. (At 8,192 ids, this text of one megabyte also has few pairs left to learn.)

    ## 50,257 and 50,304

    GPT-2 learned 50,000 merges. With 256 bytes and the token `<|endoftext|>`, which
    separates documents, its vocabulary has $256 + 50{,}000 + 1 = 50{,}257$ ids.

    GPUs multiply matrices in *tiles*, for example of 128 columns. $50{,}257 = 29
    \cdot 1{,}733$ has no factor 2: its last tile is partly empty. A row of 50,257
    numbers of 2 bytes also does not fill whole blocks of 16 bytes, which fast loads
    from memory need. So the matrix gets additional rows up to the next multiple of
    128:

    $$\left\lceil \frac{50{,}257}{128} \right\rceil \cdot 128 = 393 \cdot 128 =
    50{,}304$$
    """)
    return


@app.cell
def _():
    padded = -(-50257 // 128) * 128  # // rounds down, so this rounds up
    config = ModelConfig(vocab_size=50257, vocab_multiple=128)
    assert padded == config.padded_vocab_size == 50304
    added = padded - 50257
    assert added == 47
    mo.md(f"{padded:,} rows: {added} more, or {added / 50257:.2%}.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    No text has the 47 additional ids. glassgpt gives them no probability, so the
    model's predictions do not depend on them.

    ## What to remember

    - Character tokenizers refuse unknown characters. Bytes encode anything, but need
      many tokens.
    - BPE merges the most frequent pair, again and again, within words.
    - Encoding applies the merges in the order in which they were learned.
    - A larger vocabulary shortens texts, with less gain at each doubling.

    ## Exercises

    `glassgpt learn 1 --exercises answers.py` writes a file with functions to complete.
    Check your answers with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("1").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
