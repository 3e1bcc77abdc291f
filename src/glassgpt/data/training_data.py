"""What a run learns from: one dataset, or several in shares, all of one tokenizer."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glassgpt.config.schema import TOKENIZERS, DataConfig
from glassgpt.data.batches import Batches
from glassgpt.data.dataset import Dataset, open_dataset
from glassgpt.data.plan import SEPARATOR
from glassgpt.data.prepare import prepare, verify
from glassgpt.data.readers import reading_of
from glassgpt.data.shards import TOKENIZER
from glassgpt.data.sources import PreparedDataset, absolute_source, read_source, resolve
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer, portable_kind, tokenizer_file
from glassgpt.utils.errors import UserError


@dataclass(frozen=True)
class TrainingData:
    """The datasets of a run and the share of each in its batches; the weights add up to 1."""

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all of them."""
        return self.datasets[0].tokenizer

    @property
    def names(self) -> list[str]:
        """What each text is called, all different."""
        names = [str(dataset.manifest["source"]["name"]) for dataset in self.datasets]
        return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]

    @property
    def fingerprint(self) -> str:
        """That of the dataset; of several, a hash of theirs and their weights."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        content = [[dataset.fingerprint, weight] for dataset, weight in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def batches(self, context_length: int, batch_size: int, seed: int, order: str) -> Batches:
        """The batches of the training splits. Raises `UserError` for a text that is too short."""
        streams = [dataset.train for dataset in self.datasets]
        return Batches(streams, context_length, batch_size, seed, order, self.weights)  # type: ignore[arg-type]

    def verify(self) -> None:
        """Compare all files with their hashes. Raises `UserError` that names the first that has changed."""
        for dataset in self.datasets:
            verify(dataset.directory)


def open_training_data(data: DataConfig, tokenizer: Tokenizer | None, log: Callable[[str], None]) -> TrainingData:
    """What `data` names, prepared where it is not yet. `tokenizer`, a trained model's, replaces the one that it names.

    Raises `UserError` for whatever is wrong with a source, and for datasets of different tokenizers.
    """
    if not data.mixture:
        return TrainingData((open_dataset(prepare(data, tokenizer=tokenizer, log=log)),), (1.0,))
    tokenizer = tokenizer or _common_tokenizer(data)
    parts = [dataclasses.replace(data, source=source, mixture={}) for source in data.mixture]
    datasets = tuple(open_dataset(prepare(part, tokenizer=tokenizer, log=log)) for part in parts)
    total = sum(data.mixture.values())
    return TrainingData(datasets, tuple(weight / total for weight in data.mixture.values()))


def _common_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that `data` names, for all texts of a mixture; where one of them is prepared already, that one's."""
    if tokenizer_file(data.tokenizer) is not None:
        return build_tokenizer(data.tokenizer)  # a prepared dataset of another one is then refused
    sources = [resolve(source) for source in data.mixture]
    for source in sources:
        if isinstance(source, PreparedDataset):
            return open_dataset(source.directory).tokenizer
    options = reading_of(data)

    def texts() -> Iterator[str]:
        for source in sources:
            assert not isinstance(source, PreparedDataset)
            yield from (part.text for part in read_source(source, options))

    return build_tokenizer(data.tokenizer, itertools.chain(texts(), [SEPARATOR]))


def pinned(data: DataConfig) -> DataConfig:
    """The same sources and tokenizer by names that hold from any working directory. Raises `UserError` for what is not there."""
    mixture: dict[str, float] = {}
    for name, weight in data.mixture.items():
        if (source := absolute_source(name)) in mixture:
            raise UserError(f"data.mixture names {source} twice: give its weight once")
        mixture[source] = weight
    source = data.source if mixture else absolute_source(data.source)
    validation = None if data.validation_source is None else absolute_source(data.validation_source)
    return dataclasses.replace(
        data, source=source, mixture=mixture, validation_source=validation, tokenizer=portable_kind(data.tokenizer)
    )


def with_own_tokenizer(data: DataConfig, found: TrainingData, log: Callable[[str], None]) -> DataConfig:
    """The config that names the tokenizer of the prepared datasets that it trains on, whatever a recipe says."""
    prepared = [dataset.directory for dataset in found.datasets if str(dataset.directory) in data.sources]
    kind = found.tokenizer.kind
    if (
        not prepared or data.tokenizer == kind or tokenizer_file(data.tokenizer) is not None
    ):  # a file's has been compared
        return data
    log(
        f"the dataset's own tokenizer ({kind}, {found.tokenizer.vocab_size:,} ids) stands in for data.tokenizer = {data.tokenizer!r}"
    )
    return dataclasses.replace(data, tokenizer=kind if kind in TOKENIZERS else str(Path(prepared[0]) / TOKENIZER))


def require_validation(found: TrainingData) -> None:
    """Raise `UserError` where a validation split is too short to be evaluated."""
    for dataset in found.datasets:
        if len(dataset.validation) < 2:
            hint = "raise data.validation_fraction, or give more text"
            raise UserError(f"the {dataset.validation.name} has too little text to evaluate; {hint}")
