"""The data of a run: one dataset, or a weighted mixture of several with the same tokenizer."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glassgpt.config.schema import TOKENIZERS, DataConfig
from glassgpt.data.batches import Batches, Order
from glassgpt.data.dataset import Dataset, open_dataset
from glassgpt.data.prepare import find_prepared, prepare
from glassgpt.data.shards import TOKENIZER
from glassgpt.data.sources import PreparedDataset, absolute_source, resolve
from glassgpt.data.work_units import all_texts
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer, tokenizer_file
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import Log, ProgressLine


@dataclass(frozen=True)
class TrainingData:
    """The datasets of a run and the share of each in its batches; the weights add up to 1."""

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.datasets[0].tokenizer

    @property
    def names(self) -> list[str]:
        """A different name for each dataset."""
        names = [str(dataset.manifest["source"]["name"]) for dataset in self.datasets]
        return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]

    @property
    def fingerprint(self) -> str:
        """The dataset's fingerprint; for several, a hash of their fingerprints and weights."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        content = [[dataset.fingerprint, weight] for dataset, weight in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def batches(self, context_length: int, batch_size: int, seed: int, order: Order) -> Batches:
        """The batches of the training splits. Raises `UserError` for a text that is too short."""
        streams = [dataset.train for dataset in self.datasets]
        return Batches(streams, context_length, batch_size, seed, order, self.weights)


def open_training_data(
    data: DataConfig, tokenizer: Tokenizer | None, log: Log, *, fingerprint: str | None = None, check: bool = True
) -> TrainingData:
    """Open the data that a config names, and prepare what is missing. A model's `tokenizer` replaces the config's.

    `fingerprint`: of the data that a run began with. It is used as it was prepared then, if it is still there, although
    the text may have changed since. Without `check` files are not verified, as another process does (`open_dataset`).
    """
    if data.mixture:
        tokenizer = tokenizer or _common_tokenizer(data, log)
    parts = _parts(data)
    if fingerprint is not None:
        found = [find_prepared(part, tokenizer) for part in parts]
        if former := _open_former(data, [directory for directory, _ in found], fingerprint, log, check):
            for name in (part.source for part, (_, is_current) in zip(parts, found, strict=True) if not is_current):
                log(f"{name} has changed since the run began; the run uses the dataset that it began with")
            return former
    return _open(data, (prepare(part, tokenizer=tokenizer, log=log, check=check) for part in parts), log, check)


def find_training_data(data: DataConfig, tokenizer: Tokenizer | None, fingerprint: str) -> TrainingData | None:
    """The data that a run began with if its datasets are still there. Nothing is prepared, downloaded or verified.

    tokenizer: the model's, for data that was prepared with it; None: the config's.
    """
    with suppress(UserError):  # a source does not exist
        directories = [find_prepared(part, tokenizer)[0] for part in _parts(data)]
        return _open_former(data, directories, fingerprint, lambda line: None, check=False)
    return None


def _parts(data: DataConfig) -> list[DataConfig]:
    """The config of each dataset."""
    return [dataclasses.replace(data, source=source, mixture={}) for source in data.mixture] or [data]


def _open(data: DataConfig, directories: Iterable[Path], log: Log, check: bool) -> TrainingData:
    weights = [weight / sum(data.mixture.values()) for weight in data.mixture.values()] or [1.0]
    return TrainingData(tuple(open_dataset(each, log, check=check) for each in directories), tuple(weights))


def _open_former(
    data: DataConfig, directories: Iterable[Path], fingerprint: str, log: Log, check: bool
) -> TrainingData | None:
    """The datasets in these directories, or None if they are not there, damaged, or not those of the fingerprint."""
    with suppress(UserError):
        former = _open(data, directories, log, check)
        return former if former.fingerprint == fingerprint else None
    return None


def _common_tokenizer(data: DataConfig, log: Log) -> Tokenizer:
    """The tokenizer for all texts of a mixture: a prepared dataset's if there is one, otherwise the config's."""
    if tokenizer_file(data.tokenizer) is not None:
        return build_tokenizer(data.tokenizer)  # `prepare` refuses a dataset with another one
    sources = []
    for source in map(resolve, data.mixture):
        if isinstance(source, PreparedDataset):
            return open_dataset(source.directory, check=False).tokenizer
        sources.append(source)
    return build_tokenizer(data.tokenizer, all_texts(sources, data, ProgressLine(log)))


def pinned(data: DataConfig) -> DataConfig:
    """The same config with absolute paths. Raises `UserError` for a source that does not exist."""
    mixture: dict[str, float] = {}
    for name, weight in data.mixture.items():
        if (source := absolute_source(name)) in mixture:
            raise UserError(f"data.mixture has {source} twice; give its weight once")
        mixture[source] = weight
    source = data.source if mixture else absolute_source(data.source)
    validation = None if data.validation_source is None else absolute_source(data.validation_source)
    file = tokenizer_file(data.tokenizer)
    tokenizer = data.tokenizer if file is None else str(file.resolve())
    return dataclasses.replace(data, source=source, mixture=mixture, validation_source=validation, tokenizer=tokenizer)


def with_own_tokenizer(data: DataConfig, opened: TrainingData, log: Log) -> DataConfig:
    """The config with the tokenizer of the prepared datasets that it names, in place of a recipe's."""
    prepared = [dataset.directory for dataset in opened.datasets if str(dataset.directory) in data.sources]
    kind = opened.tokenizer.kind
    # A tokenizer's file was compared with the dataset's when the dataset was opened.
    if not prepared or data.tokenizer == kind or tokenizer_file(data.tokenizer) is not None:
        return data
    own = f"({kind}, {opened.tokenizer.vocab_size:,} ids)"
    log(f"using the dataset's own tokenizer {own} instead of data.tokenizer = {data.tokenizer!r}")
    return dataclasses.replace(data, tokenizer=kind if kind in TOKENIZERS else str(Path(prepared[0]) / TOKENIZER))
