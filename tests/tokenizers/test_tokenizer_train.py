"""A trained tokenizer: a plain trainer and three encoders as references, the same file always, and its way through a run."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from glassgpt.cli.data import TokenizerTrainOptions
from glassgpt.cli.main import main
from glassgpt.config.schema import TOKENIZERS, DataConfig, TrainConfig
from glassgpt.data.dataset import open_dataset
from glassgpt.data.prepare import prepare
from glassgpt.evaluation import evaluate
from glassgpt.generation.generate import generate
from glassgpt.interop.references import export, load
from glassgpt.tokenizers import builtin as tokenizers
from glassgpt.tokenizers import train as module
from glassgpt.tokenizers.base import byte_symbols
from glassgpt.tokenizers.builtin import BPETokenizer, load_tokenizer
from glassgpt.tokenizers.train import Corpus, pieces, train_bpe, train_tokenizer
from glassgpt.training.loop import resume, train
from glassgpt.utils.errors import UserError
from kill_harness import Quiet, tiny_config
from tokenizers import Tokenizer as Library

# As published with GPT-2 (encoder.py).
GPT2_SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
WORDS = [
    "ab",
    "abab",
    "aaaa",
    "aaaaa",
    "ba",
    "bab",
    " ab",
    "é",
    "日本",
    "\U0001f600",
    "'s",
    " ",
    "  ",
    "\n",
    "1",
    "11",
    ".",
    "...",
]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=25).map("".join), max_size=5)
UNICODE = st.text(st.characters(codec="utf-8"), max_size=40) | st.lists(
    st.sampled_from([*WORDS, "<|endoftext|>"]), max_size=20
).map("".join)


def plain_bpe(texts: Sequence[str], merges: int) -> list[tuple[str, str]]:
    """The merges by the book: count all pairs anew each time, take the most frequent, of equals that with the smallest ids."""
    symbols = byte_symbols()
    tokens = sorted(symbols)
    counts = Counter(word for text in texts for word in GPT2_SPLIT.findall(text))
    words = [([tokens.index(symbols[byte]) for byte in word.encode()], count) for word, count in counts.items()]
    found = []
    for _ in range(merges):
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        found.append((tokens[best[0]], tokens[best[1]]))
        tokens.append("".join(found[-1]))
        words = [(merged(ids, best, len(tokens) - 1), count) for ids, count in words]
    return found


def merged(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Each such pair as one id, from the left."""
    done: list[int] = []
    for i in ids:
        done.append(i)
        if tuple(done[-2:]) == pair:
            done[-2:] = [new]
    return done


def merges_of(tokenizer: BPETokenizer) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ")) for merge in json.loads(tokenizer.to_json())["model"]["merges"]]


# What is learned


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(0, 40))
@example(["aaaaa aaaa aaa"], 5)
@example(["ab cd ef gh ab cd ef gh"], 4)  # nothing but ties
def test_the_merges_are_those_of_a_plain_trainer(texts: list[str], merges: int) -> None:
    tokenizer = train_bpe(texts, 257 + merges)
    expected = plain_bpe(texts, merges)
    assert merges_of(tokenizer) == expected
    assert tokenizer.vocab_size == 257 + len(expected)


def test_the_merges_of_a_real_text_are_those_of_a_plain_trainer(english: str) -> None:
    text = english[:30_000]
    assert merges_of(train_bpe([text], 337)) == plain_bpe([text], 80)


def test_ids_are_in_gpt2s_order() -> None:
    """The bytes as GPT-2 numbers them, then a token a merge, end-of-text last."""
    tokenizer = train_bpe(["low lower lowest " * 3], 300)
    vocab: dict[str, int] = json.loads(tokenizer.to_json())["model"]["vocab"]
    assert list(vocab.values()) == list(range(tokenizer.vocab_size))
    assert list(vocab)[256:-1] == ["".join(merge) for merge in merges_of(tokenizer)]
    assert (list(vocab)[-1], tokenizer.end_of_text, tokenizer.kind) == (
        "<|endoftext|>",
        tokenizer.vocab_size - 1,
        "bpe",
    )
    assert tokenizer.byte_lengths()[-1] == 0
    gpt2 = BPETokenizer.gpt2()
    assert [tokenizer.decode_bytes([i]) for i in range(256)] == [gpt2.decode_bytes([i]) for i in range(256)]


def test_three_encoders_give_the_same_ids(english: str) -> None:
    many = [" ".join([word] * 400) for word in WORDS]
    tokenizer = train_bpe([english[:300_000], *many], 2000)
    library = Library.from_str(tokenizer.to_json())
    library.encode_special_tokens = True
    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size - 1)}
    special = {"<|endoftext|>": tokenizer.vocab_size - 1}
    theirs = tiktoken.Encoding("trained", pat_str=GPT2_SPLIT.pattern, mergeable_ranks=ranks, special_tokens=special)

    @settings(max_examples=300, deadline=None)
    @given(UNICODE)
    @example("KING HENRY's  horse,\n\n\tnaïve  日本語 <|endoftext|> \r\n")
    def same(text: str) -> None:
        ids = tokenizer.encode(text).tolist()
        assert ids == library.encode(text).ids == theirs.encode_ordinary(text)
        assert tokenizer.decode(ids) == text

    same()


# The same file always


TIES = " ".join(f"{a}{b}{a}" for a in "abcdefghijklmnopqrstuvwxyzéß日" for b in "0aZ_'") * 2


def test_threads_and_runs_make_no_difference(tmp_path: Path) -> None:
    """Words in thousands of ties, in an order of their own in every process (its hash map is seeded at random)."""
    (tmp_path / "ties.txt").write_text("\n".join([TIES] * 300), encoding="utf-8")
    code = (
        "import sys; from glassgpt.tokenizer_training import Corpus, train_tokenizer; "
        "train_tokenizer(Corpus(sys.argv[1]), 600, sys.argv[2])"
    )
    files = []
    for number, threads in enumerate(["1", "2", "2"]):
        out = tmp_path / f"{number}.json"
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "ties.txt"), str(out)], check=True, env=environment, timeout=60
        )
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
    assert len(merges_of(BPETokenizer(files[0].decode()))) > 100


@settings(max_examples=20, deadline=None)
@given(TEXTS, st.randoms())
def test_the_order_of_the_texts_makes_no_difference(texts: list[str], random: Any) -> None:
    shuffled = random.sample(texts, len(texts))
    assert train_bpe(iter(shuffled), 280).to_json() == train_bpe(texts, 280).to_json()


SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "a", "'s", "12", "!", "日"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(SPACES), max_size=40).map("".join), max_size=3), st.integers(1, 6))
def test_a_long_text_is_cut_between_words(texts: list[str], piece: int) -> None:
    """Of the library's splitting, which has no reason to know of ours."""
    split = ByteLevel(add_prefix_space=False).pre_tokenize_str

    def words(parts: Sequence[str]) -> list[str]:
        return [word for part in parts for word, _ in split(part)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        cut = list(pieces(texts))
    assert "".join(cut) == "".join(texts)
    assert words(cut) == words(texts)


def test_a_long_text_comes_in_small_pieces() -> None:
    sizes = [len(piece) for piece in pieces(["word " * 100_000])]
    assert sum(sizes) == 500_000
    assert max(sizes) <= module._PIECE + 5


# A part of a large text


def corpus_of(folder: Path, texts: Sequence[str]) -> Corpus:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    return Corpus(str(folder))


def test_a_sample_is_a_fair_share_and_always_the_same(tmp_path: Path) -> None:
    texts = [f"text {number:04d}" for number in range(2000)]
    corpus = corpus_of(tmp_path / "texts", [*texts, " \n"])
    assert corpus.size == 18_000
    tenth = list(corpus.sample(1800))
    assert tenth == list(corpus.sample(1800)) == sorted(tenth)
    # Binomial(2000, 0.1) is 200 with a deviation of 13.4, each quarter 50 with 6.7: both bounds are beyond four of these.
    assert 140 <= len(tenth) <= 260
    quarters = Counter(int(text.split()[1]) // 500 for text in tenth)
    assert all(20 <= quarters[quarter] <= 80 for quarter in range(4))
    assert set(tenth) <= set(corpus.sample(5400))
    assert list(corpus.sample(18_000)) == list(corpus.sample(10**9)) == texts


def test_training_on_a_part_says_so(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "texts", [f"text {number} of the books " * 3 for number in range(200)])
    said: list[str] = []
    tokenizer = train_tokenizer(corpus, 300, tmp_path / "t.json", max_bytes=2000, log=said.append)
    assert said == [f"training on 2,000 bytes of texts, a sample of its {corpus.size:,} bytes (--max-bytes)"]
    assert (
        load_tokenizer(tmp_path / "t.json").to_json()
        == tokenizer.to_json()
        == train_bpe(corpus.sample(2000), 300).to_json()
    )


def test_the_command_lines_default_is_the_modules() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(TokenizerTrainOptions)}
    assert fields["max_bytes"] == module.MAX_BYTES


# Mistakes, and how it ends


def test_a_text_that_gives_fewer_tokens_says_how_many(tmp_path: Path) -> None:
    said: list[str] = []
    tokenizer = train_tokenizer(
        corpus_of(tmp_path / "texts", ["abc abc xyz"]), 4096, tmp_path / "t.json", log=said.append
    )
    # "ab", "abc", " " before "abc" comes up once only
    assert tokenizer.vocab_size == 259
    assert said[-1] == "the text gives 259 tokens, not 4,096: no other pair of tokens comes up twice in it"


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, (1 << 20) + 1, 10**15])
def test_sizes_that_cannot_be_are_refused(vocab_size: int) -> None:
    with pytest.raises(UserError, match=r"--vocab-size must be from 257 .* to 1,048,576, got"):
        train_bpe(["text"], vocab_size)


def test_mistakes_are_told_before_the_work(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "texts", ["some text"])
    (tmp_path / "text.json").write_text('{"a": 1}')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "manifest.json").touch()
    (tmp_path / "dataset" / "tokenizer.json").write_text(train_bpe([], 257).to_json(), encoding="utf-8")
    refusals = {
        "x.txt": "must end in",
        "text.json": "is no tokenizer",
        "folder.json": "a directory",
        "dataset/tokenizer.json": "beside it",
    }
    for name, reason in refusals.items():
        with pytest.raises(UserError, match=reason):
            train_tokenizer(corpus, 300, tmp_path / name)
    with pytest.raises(UserError, match=r"--max-bytes must be from 1 to 2,147,483,647, got"):
        train_tokenizer(corpus, 300, tmp_path / "x.json", max_bytes=1 << 31)
    with pytest.raises(UserError, match="has no text in it"):
        train_tokenizer(corpus_of(tmp_path / "blank", ["", " \n"]), 300, tmp_path / "x.json")
    with pytest.raises(UserError, match="there is no file"):
        Corpus(str(tmp_path / "missing"))
    assert (tmp_path / "text.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "x.json").exists()
    for _ in range(2):  # an earlier tokenizer is replaced
        train_tokenizer(corpus, 300, tmp_path / "new" / "x.json")


def test_what_the_texts_raise_comes_through() -> None:
    def broken() -> Iterator[str]:
        yield "text"
        raise UserError("the third file is damaged")

    with pytest.raises(UserError, match="the third file is damaged"):
        train_bpe(broken(), 300)
    with pytest.raises(UserError, match=r"U\+D800.*offset 1 "):
        train_bpe(["a\ud800"], 300)


def test_an_interrupt_ends_it_soon() -> None:
    def endless() -> Iterator[str]:
        # Later than the main thread begins to wait: Python loses a signal that comes just before that.
        ends = time.monotonic() + 20
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        while time.monotonic() < ends:
            yield "text"

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_bpe(endless(), 300)
    assert time.monotonic() - begin < 10


# Its way through a run


@pytest.fixture(scope="module")
def trained(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 characters in text.txt, and a tokenizer of 700 ids trained on them in my.json."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(english[:100_000], encoding="utf-8", newline="")
    train_tokenizer(Corpus(str(folder / "text.txt")), 700, folder / "my.json")
    return folder


def config_on(source: Path, tokenizer: str) -> TrainConfig:
    config = tiny_config(source, steps=2, eval_every=0, checkpoint_every=1, eval_tokens=200, sample={"prompt": None})
    return config.override(data={"tokenizer": tokenizer})


def test_a_run_reads_and_writes_with_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared, trained, resumed from another folder without the file, evaluated, exported."""
    auto = pytest.importorskip(
        "transformers", reason="transformers, which reads what is exported, is not installed"
    ).AutoTokenizer
    mine = load_tokenizer(trained / "my.json")
    shutil.copy(trained / "my.json", tmp_path / "my.json")
    monkeypatch.chdir(tmp_path)
    run = train(config_on(trained / "text.txt", "my.json"), tmp_path / "run", progress=Quiet())
    kept = TrainConfig.from_toml((run / "config.toml").read_text(encoding="utf-8"))
    assert kept.data.tokenizer == str(tmp_path / "my.json")  # where a run without a checkpoint looks for it
    model, tokenizer = load(run)
    assert tokenizer is not None
    assert (tokenizer.to_json(), model.config.vocab_size) == (mine.to_json(), 700)
    (tmp_path / "my.json").unlink()
    monkeypatch.chdir("/")
    assert evaluate(run, device="cpu")["tokens"] > 1000
    resume(run, steps=3, progress=Quiet())
    text = "".join(map(str, generate(model, tokenizer, "KING", max_new_tokens=5)))
    assert tokenizer.encode(text) is not None
    export(run, tmp_path / "hf")
    exported = auto.from_pretrained(tmp_path / "hf")
    sample = "KING HENRY's  horse,\n\n\tnaïve 日本語 \r\n"
    assert exported.encode(sample) == mine.encode(sample).tolist()
    assert (exported.decode(exported.encode(sample)), exported.eos_token_id) == (sample, 699)


def test_a_dataset_brings_its_tokenizer_along(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`prepare --tokenizer FILE --out DIR`, then `train RECIPE --data DIR`, whose recipe names another tokenizer."""
    directory = tmp_path / "dataset"
    prepare(DataConfig(source=str(trained / "text.txt"), tokenizer=str(trained / "my.json")), directory)
    progress = Quiet()
    run = train(config_on(directory, "gpt2"), tmp_path / "run", progress=progress)
    assert any(
        "own tokenizer (bpe, 700 ids) stands in for data.tokenizer = 'gpt2'" in message for message in progress.messages
    )
    config = TrainConfig.from_toml((run / "config.toml").read_text(encoding="utf-8"))
    assert (config.data.tokenizer, config.model.vocab_size) == (str(directory / "tokenizer.json"), 700)
    resume(run, steps=3, progress=Quiet())
    for named in ("gpt2", "characters", str(tmp_path / "other.json")):
        train_tokenizer(Corpus(str(trained / "text.txt")), 300, tmp_path / "other.json")
        assert main(["train", "demo", "--data", str(directory), "--data.tokenizer", named]) == 2
        assert main(["prepare", str(directory), "--tokenizer", named]) == 2
    assert "made by another tokenizer (bpe)" in capsys.readouterr().err
    assert main(["prepare", str(directory), "--tokenizer", str(trained / "my.json")]) == 0
    assert main(["prepare", str(directory)]) == 0


def test_a_changed_tokenizer_makes_a_dataset_stale(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    config = DataConfig(source=str(trained / "text.txt"), tokenizer=str(path))
    corpus = Corpus(config.source)
    made = []
    for vocab_size in (300, 301, 300):
        train_tokenizer(corpus, vocab_size, path)
        made.append(open_dataset(prepare(config)))
    assert [dataset.tokenizer.vocab_size for dataset in made] == [300, 301, 300]
    assert made[0].directory == made[2].directory != made[1].directory
    moved = path.rename(tmp_path / "moved.json")
    assert prepare(config_with(config, moved)) == made[0].directory
    out = prepare(config_with(config, moved), tmp_path / "out")
    train_tokenizer(corpus, 301, moved)
    assert open_dataset(prepare(config_with(config, moved), out)).tokenizer.vocab_size == 301


def config_with(config: DataConfig, tokenizer: Path) -> DataConfig:
    return dataclasses.replace(config, tokenizer=str(tokenizer))


def test_a_tokenizers_file_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*gone\.json"):
        prepare(DataConfig(source=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "gone.json")))


@pytest.mark.parametrize(
    ("named", "expected"),
    [("byte", "did you mean 'bytes'"), ("", "'characters'"), ("my.txt", "a tokenizer's .json file")],
)
def test_no_other_names_are_tokenizers(named: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"data.tokenizer must be .*{expected}"):
        DataConfig(tokenizer=named)


def test_the_config_knows_the_kinds_that_can_be_built() -> None:
    assert set(TOKENIZERS) == set(tokenizers._BUILDERS)
