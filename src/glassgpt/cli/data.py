"""prepare, tokenizer train, tokenizer show and data info: from text to what a model reads."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg, configure

from glassgpt.cli.options import decoded, gives, parse, require_json, say, say_aside, write_json
from glassgpt.config.schema import DataConfig, ReadingConfig, TextConfig
from glassgpt.utils.errors import UserError, program


@configure(FlagCreatePairsOff)
@dataclass(frozen=True, kw_only=True)
class PrepareOptions(TextConfig):
    """Options of `glassgpt prepare`."""

    source: Positional[str]
    """A registered name (python-docs, shakespeare, fineweb-edu, ...), a file, a folder, a pattern of files in quotes
    ('books/*.parquet'), or a dataset of the Hugging Face hub (owner/name:subset)."""
    tokenizer: Annotated[str, arg(metavar="KIND|FILE")] = TextConfig.tokenizer
    out: Annotated[Path | None, arg(help_behavior_hint="(default: in the cache)")] = None
    """Directory of the prepared dataset."""
    workers: Annotated[int | None, arg(help_behavior_hint="(default: one per core)")] = None
    """Processes that share the work; the result does not depend on it."""


def prepare(arguments: Sequence[str]) -> None:
    """Turn text into token files for training.

    `train` does this automatically if they are missing or out of date. If it is interrupted, even killed, the same
    command resumes after the last finished file.
    """
    options = parse(PrepareOptions, "prepare", prepare, arguments)
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be at least 1, got {options.workers}")
    from glassgpt.data.dataset import open_dataset
    from glassgpt.data.prepare import prepare as prepare_data
    from glassgpt.data.prepare import require_tokenizer

    data = DataConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(TextConfig)})
    if gives(arguments, "--tokenizer"):
        require_tokenizer(data)
    directory = prepare_data(data, out=options.out, log=say, workers=options.workers)
    dataset = open_dataset(directory)
    print(directory)
    for name, stream in (("train", dataset.train), ("validation", dataset.validation)):
        print(f"  {name:<12}{len(stream):>14,} tokens")


Reading = Annotated[ReadingConfig, FlagCreatePairsOff, arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainOptions:
    """Options of `glassgpt tokenizer train`."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A registered name (python-docs, shakespeare), a text file, or a folder of them."""
    vocab_size: int
    """Number of token ids: the 256 bytes, the merges, and <|endoftext|>. Above 65,536 a token takes 4 bytes instead of 2."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("tokenizer.json")
    """File to write, which --data.tokenizer takes, and Hugging Face's tokenizers library."""
    max_bytes: int = 200_000_000
    """Train on about as much of the text, taken from everywhere in it: more takes longer, and the tokenizer is no better."""
    reading: Reading = field(default_factory=ReadingConfig)


# Of the text, to count the tokens that it takes.
COMPARED_BYTES = 10_000_000


def train_tokenizer(arguments: Sequence[str]) -> None:
    """Make a tokenizer from a text: byte-level BPE, split as GPT-2 does.

    It encodes any text; the more a text is like the one that it was made from, the fewer tokens it takes.
    """
    options = parse(TokenizerTrainOptions, "tokenizer train", train_tokenizer, arguments)
    from glassgpt.tokenizers import train as tokenizer_training
    from glassgpt.tokenizers.inspect import compare_with_gpt2

    DataConfig(encoding=options.reading.encoding)  # which says what is wrong with one that is unknown
    corpus = tokenizer_training.Corpus(options.source, options.reading)
    made = tokenizer_training.train_tokenizer(
        corpus, options.vocab_size, options.out, max_bytes=options.max_bytes, log=print
    )
    print(f"{options.out}: {made.vocab_size:,} tokens")
    print(f"bytes a token on {corpus.name}: {compare_with_gpt2(made, corpus.sample(COMPARED_BYTES))}")
    file = shlex.quote(str(options.out))
    print(f"next:\n  {program()} tokenizer show {file}")
    print(f"  {program()} train RECIPE --data {shlex.quote(options.source)} --data.tokenizer {file}")


@dataclass(frozen=True, kw_only=True)
class TokenizerShowOptions:
    """Options of `glassgpt tokenizer show`."""

    tokenizer: Annotated[Positional[str], arg(metavar="FILE|REF|gpt2")]
    """A tokenizer's .json file, gpt2 or bytes; the tokenizer of a prepared dataset, a run or a checkpoint, a Hugging Face directory
    or hub id."""
    text: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="(default: a line with some of everything)")] = (
        None
    )
    """Text to cut into pieces."""
    data: Annotated[str | None, arg(metavar="SRC", help_behavior_hint="(default: none)")] = None
    """Text on which to count bytes a token, beside GPT-2's: a registered name, a text file, or a folder of them."""
    reading: Reading = field(default_factory=ReadingConfig)


def show_tokenizer(arguments: Sequence[str]) -> None:
    """Show what a tokenizer is and how it cuts text.

    A │ stands between tokens, ␣ for a space, ⏎ for a new line, → for a tab, <e2> for a byte that is part of a character only.
    """
    options = parse(TokenizerShowOptions, "tokenizer show", show_tokenizer, arguments)
    from glassgpt.tokenizers.inspect import compare_with_gpt2, describe, find_tokenizer
    from glassgpt.tokenizers.train import Corpus

    DataConfig(encoding=options.reading.encoding)
    text = None if options.text is None else decoded(os.fsencode(options.text), "--text")
    corpus = None if options.data is None else Corpus(options.data, options.reading)
    found = find_tokenizer(options.tokenizer)
    print(describe(found, text))
    if corpus is not None:
        print(f"{'bytes a token':<22}on {corpus.name}: {compare_with_gpt2(found, corpus.texts())}")


@dataclass(frozen=True, kw_only=True)
class DataInfoOptions:
    """Options of `glassgpt data info`."""

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """A dataset written by `glassgpt prepare`, or token files of nanoGPT, build-nanogpt or llm.c."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the facts to this file."""
    skip_check: FlagCreatePairsOff[bool] = False
    """Do not compare every file with its sha256, which reads all of them again."""


def data_info(arguments: Sequence[str]) -> None:
    """Show a dataset's tokens, document lengths, most frequent tokens and samples.

    Then compare every file with its sha256, and name a damaged one.
    """
    options = parse(DataInfoOptions, "data info", data_info, arguments)
    from glassgpt.data.dataset import verify
    from glassgpt.data.inspect import dataset_facts, facts_text
    from glassgpt.utils.files import user_path

    directory = user_path(options.directory)
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a folder; name a dataset, such as one of {program()} prepare SOURCE --out DIR"
        )
    if options.json is not None:
        require_json(options.json)
    facts = dataset_facts(directory, say_aside)
    print(facts_text(facts), flush=True)
    if options.json is not None:
        write_json(options.json, dataclasses.asdict(facts))
    if not options.skip_check:
        files = verify(directory, say_aside, force=True)
        since = "" if facts.made_by == "glassgpt" else " of when it was first opened"
        print(f"\nverified {files:,} files: each has its sha256{since}")
