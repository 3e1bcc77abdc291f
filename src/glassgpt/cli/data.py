"""prepare, tokenizer train, tokenizer show and data info: from text to what a model reads."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from tyro.conf import FlagCreatePairsOff, Positional, arg, configure

from glassgpt.cli.options import Command, File, Flag, default, gives, require_json, say, say_aside, write_json
from glassgpt.config.schema import DataConfig, ReadingConfig, TextConfig
from glassgpt.config.validation import Length, PositiveCount, between
from glassgpt.utils.errors import UserError, program
from glassgpt.utils.files import decoded, user_path

if TYPE_CHECKING:
    from glassgpt.tokenizers.base import Tokenizer


@configure(FlagCreatePairsOff)
class Prepare(TextConfig, Command):
    """Turn text into token files for training.

    `train` does this automatically if they are missing or out of date. If it is interrupted, even killed, the same
    command resumes after the last finished file.
    """

    # A registered name (python-docs, shakespeare, fineweb-edu, ...), a file, a folder, a pattern of files in quotes
    # ('books/*.parquet'), or a dataset of the Hugging Face hub (owner/name:subset).
    source: Positional[str]
    tokenizer: Annotated[str, arg(metavar="KIND|FILE")] = TextConfig.tokenizer
    out: Annotated[Path | None, default("in the cache")] = None  # Directory of the prepared dataset.
    overwrite: Flag = False  # Replace a dataset of another text or other settings in that directory.
    # Processes that share the work; the result does not depend on it.
    workers: Annotated[int | None, between(1, 4096), default("one per core")] = None

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        command = super().parse(name, arguments)
        if gives(arguments, "--tokenizer"):
            from glassgpt.data.prepare import require_tokenizer

            require_tokenizer(command.data)
        return command

    @property
    def data(self) -> DataConfig:
        """What to prepare."""
        return DataConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TextConfig)})

    def run(self) -> None:
        from glassgpt.data.dataset import open_dataset
        from glassgpt.data.prepare import prepare

        directory = prepare(self.data, out=self.out, log=say, workers=self.workers, overwrite=self.overwrite)
        dataset = open_dataset(directory)
        print(directory)
        for name, stream in (("train", dataset.train), ("validation", dataset.validation)):
            print(f"  {name:<12}{len(stream):>14,} tokens")


Reading = Annotated[ReadingConfig, FlagCreatePairsOff, arg(name="")]
# Bytes of the text on which a trained tokenizer is compared with GPT-2's.
COMPARED_BYTES = 10_000_000


class TrainTokenizer(Command):
    """Train a tokenizer on a text: byte-level BPE with GPT-2's splitting.

    It encodes any text. Text that resembles the training text takes the fewest tokens.
    """

    # A registered name (python-docs, shakespeare), a text file, or a folder of them.
    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    # Vocabulary size: 256 bytes, the merges, and <|endoftext|>. Above 65,536 a token takes 4 bytes instead of 2.
    vocab_size: Length[int]
    # File to write, for --data.tokenizer and for Hugging Face's tokenizers library.
    out: Annotated[Path, arg(metavar="FILE")] = Path("tokenizer.json")
    overwrite: Flag = False  # Replace the tokenizer in that file.
    # Bytes of text to train on, sampled from everywhere in it. More takes longer without a better tokenizer.
    max_bytes: PositiveCount[int] = 200_000_000
    reading: Reading = field(default_factory=ReadingConfig)

    def run(self) -> None:
        from glassgpt.data.tokenizer_training import Corpus, train_tokenizer
        from glassgpt.tokenizers.inspect import compare_with_gpt2

        corpus = Corpus(self.source, self.reading)
        trained = train_tokenizer(
            corpus, self.vocab_size, self.out, max_bytes=self.max_bytes, overwrite=self.overwrite, log=print
        )
        print(f"{self.out}: {trained.vocab_size:,} tokens")
        print(f"bytes per token on {corpus.name}: {compare_with_gpt2(trained, corpus.sample(COMPARED_BYTES))}")
        file = shlex.quote(str(self.out))
        print(f"next:\n  {program()} tokenizer show {file}")
        print(f"  {program()} train RECIPE --data {shlex.quote(self.source)} --data.tokenizer {file}")


class ShowTokenizer(Command):
    """Show what a tokenizer is and how it splits text.

    │ separates tokens; ␣ is a space, ⏎ a new line, → a tab, and <e2> a byte that is only a part of a character.
    """

    # A tokenizer's .json file, gpt2, bytes; a prepared dataset, run, checkpoint, Hugging Face directory or hub id.
    tokenizer: Annotated[Positional[str], arg(metavar="FILE|REF|gpt2")]
    text: Annotated[str | None, default("a varied sample", "TEXT")] = None  # Text to show in tokens.
    # Text on which to compare bytes per token with GPT-2's: a registered name, a text file, or a folder of them.
    data: Annotated[str | None, default("none", "SRC")] = None
    reading: Reading = field(default_factory=ReadingConfig)

    def run(self) -> None:
        from glassgpt.data.tokenizer_training import Corpus
        from glassgpt.tokenizers.inspect import compare_with_gpt2, describe

        text = None if self.text is None else decoded(os.fsencode(self.text), "--text")
        corpus = None if self.data is None else Corpus(self.data, self.reading)
        tokenizer = find_tokenizer(self.tokenizer)
        print(describe(tokenizer, text))
        if corpus is not None:
            print(f"{'bytes per token':<22}on {corpus.name}: {compare_with_gpt2(tokenizer, corpus.texts())}")


def find_tokenizer(name: str) -> "Tokenizer":
    """Find `gpt2`, `bytes`, a tokenizer's file, or a dataset's or model's tokenizer. Raises `UserError` otherwise."""
    from glassgpt.tokenizers.builtin import build_tokenizer, load_tokenizer, tokenizer_file

    if name == "characters":
        raise UserError("a character tokenizer depends on a text; name a run or dataset that has one")
    if name in ("gpt2", "bytes") or tokenizer_file(name) is not None:
        return build_tokenizer(name)
    path = user_path(name) / "tokenizer.json"
    if path.is_file():
        return load_tokenizer(path)
    from glassgpt.interop import references

    tokenizer = references.read_reference(name, references.tokenizer_of)
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer")
    return tokenizer


class DataInfo(Command):
    """Show a dataset's tokens, document lengths, most frequent tokens and samples.

    Then compare every file with its sha256, and name a damaged one.
    """

    # A dataset written by `glassgpt prepare`, or token files of nanoGPT, build-nanogpt or llm.c.
    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    json: File = None  # Also write the facts to this file.
    skip_check: Flag = False  # Do not compare every file with its sha256, which reads all of them again.

    def run(self) -> None:
        from glassgpt.data.dataset import verify
        from glassgpt.data.inspect import dataset_facts, facts_text

        directory = user_path(self.directory)
        if not directory.is_dir():
            raise UserError(f"{directory} is not a folder; pass a dataset that {program()} prepare wrote")
        require_json(self.json)
        facts = dataset_facts(directory, say_aside)
        print(facts_text(facts), flush=True)
        write_json(self.json, facts)
        if not self.skip_check:
            files = verify(directory, say_aside, force=True)
            since = "" if facts["made_by"] == "glassgpt" else " of when it was first opened"
            print(f"\nverified {files:,} files: each has its sha256{since}")
