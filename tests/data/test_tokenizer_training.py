"""Training a tokenizer on a source: samples, reproducible files, errors, and its use in a run."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from glassgpt.cli.data import TrainTokenizer
from glassgpt.cli.main import main
from glassgpt.config.schema import TOKENIZERS, DataConfig, TrainConfig
from glassgpt.data import tokenizer_training as module
from glassgpt.data.dataset import open_dataset
from glassgpt.data.prepare import prepare
from glassgpt.data.tokenizer_training import Corpus, train_bpe, train_tokenizer
from glassgpt.evaluation.perplexity import evaluate
from glassgpt.generation.generate import generate
from glassgpt.interop.references import export, load
from glassgpt.tokenizers.builtin import BPETokenizer, build_tokenizer, load_tokenizer
from glassgpt.training.run import resume, train
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import format_bytes
from kill_harness import Quiet, fast_training, tiny_config

TIES = " ".join(f"{a}{b}{a}" for a in "abcdefghijklmnopqrstuvwxyzéß日" for b in "0aZ_'") * 2


@pytest.mark.slow
def test_the_result_does_not_depend_on_threads_or_process(tmp_path: Path) -> None:
    """Thousands of pairs are equally frequent; a randomly seeded hash map gives each process another order of them."""
    (tmp_path / "ties.txt").write_text("\n".join([TIES] * 300), encoding="utf-8")
    code = (
        "import sys; from glassgpt.data.tokenizer_training import Corpus, train_tokenizer; "
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
    assert len(BPETokenizer(files[0].decode()).merges()) > 100


def corpus_of(folder: Path, texts: Sequence[str]) -> Corpus:
    """Write each text to a file in `folder`, and return the corpus of the folder."""
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    return Corpus(str(folder))


def test_a_sample_is_uniform_and_reproducible(tmp_path: Path) -> None:
    texts = [f"text {number:04d}" for number in range(2000)]
    corpus = corpus_of(tmp_path / "texts", [*texts, " \n"])
    assert corpus.size == 18_000
    tenth = list(corpus.sample(1800))
    assert tenth == list(corpus.sample(1800)) == sorted(tenth)
    # Binomial(2000, 0.1) has mean 200 and deviation 13.4, each quarter 50 and 6.7; the bounds are 4.5 deviations away.
    assert 140 <= len(tenth) <= 260
    quarters = Counter(int(text.split()[1]) // 500 for text in tenth)
    assert all(20 <= quarters[quarter] <= 80 for quarter in range(4))
    assert set(tenth) <= set(corpus.sample(5400))
    assert list(corpus.sample(18_000)) == list(corpus.sample(10**9)) == texts


def test_sampling_is_logged(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "texts", [f"text {number} of the books " * 3 for number in range(200)])
    lines: list[str] = []
    tokenizer = train_tokenizer(corpus, 300, tmp_path / "t.json", max_bytes=2000, log=lines.append)
    assert len(lines) == 1
    assert all(fact in lines[0] for fact in ("2.0 kB of texts", format_bytes(corpus.size), "--max-bytes"))
    assert (
        load_tokenizer(tmp_path / "t.json").to_json()
        == tokenizer.to_json()
        == train_bpe(corpus.sample(2000), 300).to_json()
    )


@pytest.mark.parametrize(("unit", "is_warned"), [("acgt", True), ("acgt ", False), ("你好。", False)])
def test_words_that_are_cut_are_logged_once(unit: str, is_warned: bool, tmp_path: Path) -> None:
    lines: list[str] = []
    train_tokenizer(corpus_of(tmp_path / "texts", [unit * 20_000]), 260, tmp_path / "t.json", log=lines.append)
    assert sum(f"{module._LONG_WORD:,} characters" in line for line in lines) == is_warned


def test_the_command_and_the_function_have_the_same_default_for_max_bytes() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(TrainTokenizer)}
    assert fields["max_bytes"] == module.MAX_BYTES


def test_a_text_with_too_few_pairs_gives_fewer_tokens(tmp_path: Path) -> None:
    lines: list[str] = []
    tokenizer = train_tokenizer(
        corpus_of(tmp_path / "texts", ["abc abc xyz"]), 4096, tmp_path / "t.json", log=lines.append
    )
    # Two merges: "ab" and "abc". The pair of " " and "abc" occurs only once.
    assert tokenizer.vocab_size == 259
    assert "259 tokens" in lines[-1]
    assert "4,096" in lines[-1]


def test_errors_are_reported_before_training_starts(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "texts", ["some text"])
    (tmp_path / "text.json").write_text('{"a": 1}')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "manifest.json").touch()
    (tmp_path / "dataset" / "tokenizer.json").write_text(train_bpe([], 257).to_json(), encoding="utf-8")
    refusals = {
        "x.txt": "must end in",
        "text.json": "not a tokenizer",
        "folder.json": "a directory",
        "dataset/tokenizer.json": "manifest.json",
    }
    for name, reason in refusals.items():
        with pytest.raises(UserError, match=reason):
            train_tokenizer(corpus, 300, tmp_path / name)
    for vocab_size in (-1, 0, 256, (1 << 20) + 1, 10**15):
        with pytest.raises(UserError, match=r"--vocab-size .*257 .* 1,048,576"):
            train_tokenizer(corpus, vocab_size, tmp_path / "x.json")
    with pytest.raises(UserError, match=r"--max-bytes must be from 1 to 2,147,483,647, got"):
        train_tokenizer(corpus, 300, tmp_path / "x.json", max_bytes=1 << 31)
    with pytest.raises(UserError, match="blank has no text"):
        train_tokenizer(corpus_of(tmp_path / "blank", ["", " \n"]), 300, tmp_path / "x.json")
    with pytest.raises(UserError, match="there is no file"):
        Corpus(str(tmp_path / "missing"))
    assert (tmp_path / "text.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "x.json").exists()
    for overwrite in (False, True):
        train_tokenizer(corpus, 300, tmp_path / "new" / "x.json", overwrite=overwrite)
    written = (tmp_path / "new" / "x.json").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        train_tokenizer(corpus, 257, tmp_path / "new" / "x.json")
    assert (tmp_path / "new" / "x.json").read_bytes() == written


# Use in a run


@pytest.fixture(scope="module")
def trained(english: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write 100,000 characters to text.txt, and a tokenizer with 700 ids trained on them to my.json."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(english[:100_000], encoding="utf-8", newline="")
    train_tokenizer(Corpus(str(folder / "text.txt")), 700, folder / "my.json")
    with fast_training():
        yield folder


def config_on(source: Path, tokenizer: str) -> TrainConfig:
    config = tiny_config(source, steps=2, eval_every=0, checkpoint_every=1, eval_tokens=200, sample={"prompt": None})
    return config.override(data={"tokenizer": tokenizer})


def test_a_run_uses_a_trained_tokenizer(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, delete the file, then evaluate, resume and export from another folder; transformers has the same ids."""
    auto = pytest.importorskip("transformers", reason="transformers is not installed").AutoTokenizer
    mine = load_tokenizer(trained / "my.json")
    shutil.copy(trained / "my.json", tmp_path / "my.json")
    monkeypatch.chdir(tmp_path)
    run = train(config_on(trained / "text.txt", "my.json"), tmp_path / "run", progress=Quiet())
    kept = TrainConfig.from_toml((run / "config.toml").read_text(encoding="utf-8"))
    assert kept.data.tokenizer == str(tmp_path / "my.json")  # a run without a checkpoint looks there
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


def test_a_dataset_keeps_its_tokenizer(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After `prepare --tokenizer FILE --out DIR`, `train RECIPE --data DIR` uses FILE, not the recipe's tokenizer."""
    directory = tmp_path / "dataset"
    prepare(DataConfig(source=str(trained / "text.txt"), tokenizer=str(trained / "my.json")), directory)
    progress = Quiet()
    run = train(config_on(directory, "gpt2"), tmp_path / "run", progress=progress)
    assert any("(bpe, 700 ids)" in message and "'gpt2'" in message for message in progress.messages)
    config = TrainConfig.from_toml((run / "config.toml").read_text(encoding="utf-8"))
    assert (config.data.tokenizer, config.model.vocab_size) == (str(directory / "tokenizer.json"), 700)
    resume(run, steps=3, progress=Quiet())
    for named in ("gpt2", "characters", str(tmp_path / "other.json")):
        train_tokenizer(Corpus(str(trained / "text.txt")), 300, tmp_path / "other.json", overwrite=True)
        assert main(["train", "demo", "--data", str(directory), "--data.tokenizer", named]) == 2
        assert main(["prepare", str(directory), "--tokenizer", named]) == 2
    assert "another tokenizer (bpe)" in capsys.readouterr().err
    assert main(["prepare", str(directory), "--tokenizer", str(trained / "my.json")]) == 0
    assert main(["prepare", str(directory)]) == 0


def test_a_changed_tokenizer_file_rebuilds_the_dataset(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    config = DataConfig(source=str(trained / "text.txt"), tokenizer=str(path))
    corpus = Corpus(config.source)
    datasets = []
    for vocab_size in (300, 301, 300):
        train_tokenizer(corpus, vocab_size, path, overwrite=True)
        datasets.append(open_dataset(prepare(config)))
    assert [dataset.tokenizer.vocab_size for dataset in datasets] == [300, 301, 300]
    assert datasets[0].directory == datasets[2].directory != datasets[1].directory
    moved = path.rename(tmp_path / "moved.json")
    assert prepare(config_with(config, moved)) == datasets[0].directory
    out = prepare(config_with(config, moved), tmp_path / "out")
    train_tokenizer(corpus, 301, moved, overwrite=True)
    assert open_dataset(prepare(config_with(config, moved), out, overwrite=True)).tokenizer.vocab_size == 301


def config_with(config: DataConfig, tokenizer: Path) -> DataConfig:
    return dataclasses.replace(config, tokenizer=str(tokenizer))


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(UserError, match=r"cannot read .*gone\.json"):
        prepare(DataConfig(source=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "gone.json")))


@pytest.mark.parametrize(
    ("named", "expected"),
    [("byte", "did you mean 'bytes'"), ("", "'characters'"), ("my.txt", "a tokenizer's .json file")],
)
def test_unknown_tokenizer_names_are_refused(named: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"data.tokenizer must be .*{expected}"):
        DataConfig(tokenizer=named)


def test_every_tokenizer_kind_of_the_config_can_be_built() -> None:
    assert [build_tokenizer(kind, ["a"]).kind for kind in TOKENIZERS] == list(TOKENIZERS)
