"""Documents to token shards: a dataset directory that is whole or not there, made anew only where it is missing or stale."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from glassgpt.config.schema import DataConfig, TextConfig
from glassgpt.data.builder import Making
from glassgpt.data.dataset import dataset_manifest, files_of, find_damage, is_dataset, read_manifest, shards_of
from glassgpt.data.formats import foreign_hashes
from glassgpt.data.progress import Log, Ticker
from glassgpt.data.shards import TOKENIZER, index_path
from glassgpt.data.sources import PreparedDataset, Source, resolve
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer, tokenizer_file
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, sha256_of, user_path


def prepare(
    data: DataConfig,
    out: Path | None = None,
    tokenizer: Tokenizer | None = None,
    log: Log | None = None,
    *,
    workers: int | None = None,
) -> Path:
    """The directory of the prepared dataset, which is made now where it is missing or stale.

    It lies in the cache, or at `out`. A `tokenizer` given (a trained model's) replaces the one that `data` names. A source that
    is a prepared dataset already is returned as it is: it has a tokenizer of its own, which must be that of the model or of the
    file that `data` names, but need not be of the kind that it names (see `require_tokenizer`). `log` gets lines about what takes
    time. `workers` processes share the work (left out, as many as there are cores); the result does not depend on it. Interrupted,
    even killed, the next call goes on at the last finished shard. Raises `UserError` for whatever is wrong with the source, and
    for an `out` that holds something else.
    """
    source = resolve(data.source)
    if tokenizer is None and tokenizer_file(data.tokenizer) is not None:
        tokenizer = build_tokenizer(
            data.tokenizer
        )  # now: what is in the file belongs to the request, not what it is called
    if isinstance(source, PreparedDataset):
        return _as_it_is(source.directory, out, tokenizer)
    log = log or (lambda line: None)
    validation = None if data.validation_source is None else _text_source(data.validation_source)
    request = _request(data, source, validation, tokenizer)
    directory = _default_directory(source, request) if out is None else _checked(out)
    sources = [source] if validation is None else [source, validation]
    if _is_fresh(directory, sources, request):
        return directory
    with _locked(directory, source, log):
        if not _is_fresh(directory, sources, request):  # else the other process has made it meanwhile
            if out is not None:
                _announce_replacing(directory, log)
            Making(directory, sources, data, tokenizer, request, log).run(workers)
    return directory


def _text_source(name: str) -> Source:
    source = resolve(name)
    if isinstance(source, PreparedDataset):
        raise UserError(f"{name} is a prepared dataset, which has a validation split of its own: name the text instead")
    return source


def verify(directory: Path, log: Log | None = None) -> int:
    """Compare every file of a dataset with its manifest, and return how many these are. `log` hears how far it is, if it takes long.

    Raises `UserError` that names the first file that differs. Another project's files are compared with what they were when they
    were first read.
    """
    manifest = dataset_manifest(directory)
    names = [shard["name"] for shard in shards_of(manifest)]
    total = sum((directory / name).stat().st_size for name in names)
    tick, files = Ticker(log or (lambda line: None), "checked", total, "bytes"), 0
    for name, expected, found in _hashes(directory, manifest):
        if found != expected:
            raise UserError(
                f"the dataset {directory} is damaged: the content of {name} has changed; remove the directory and prepare it again"
            )
        files += 1
        tick((directory / name).stat().st_size if name in names else 0)
    return files


def _hashes(directory: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each file's name, the sha256 that was recorded of it, and the one that it has."""
    if read_manifest(directory) is None:
        yield from foreign_hashes(directory)
        return
    for shard in shards_of(manifest):
        index = index_path(directory / shard["name"])
        yield shard["name"], shard["sha256"], sha256_of(directory / shard["name"])
        yield index.name, shard["index_sha256"], sha256_of(index)
    yield TOKENIZER, manifest["tokenizer"]["sha256"], sha256_of(directory / TOKENIZER)


@contextmanager
def _locked(directory: Path, source: Source, log: Log) -> Iterator[None]:
    """Keep other processes from preparing the same directory meanwhile."""
    lock = filelock.FileLock(directory.with_name(f".{directory.name}.lock"))
    with explain_os_errors("write", directory):
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"cannot make {directory}: {error.filename} is no directory") from error
        except filelock.Timeout:
            log(f"another process is preparing {source.name}: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_tokenizer(data: DataConfig) -> None:
    """Raise `UserError` where the source is a prepared dataset and its tokenizer is another than the one that `data` names.

    For whoever knows that the user has named it: a config cannot tell that from a default or a recipe's value.
    """
    for source in data.sources:
        directory = user_path(source)
        if not source or not is_dataset(directory):
            continue
        own = dataset_manifest(directory)["tokenizer"]
        if own["kind"] == data.tokenizer:
            continue
        if (
            tokenizer_file(data.tokenizer) is None
            or _sha256(build_tokenizer(data.tokenizer).to_json()) != own["sha256"]
        ):
            raise UserError(
                f"the dataset {source} was made by another tokenizer ({own['kind']}) than {data.tokenizer}; leave the "
                "tokenizer out to take the dataset's, or give its text instead"
            )


def _as_it_is(directory: Path, out: Path | None, tokenizer: Tokenizer | None) -> Path:
    """A dataset given as the source, after a check that its tokens mean what the model takes them for."""
    manifest = dataset_manifest(directory)
    if out is not None and out.expanduser().resolve() != directory:
        raise UserError(f"{directory} is a prepared dataset already: use it where it is, or copy the directory")
    if tokenizer is not None and _sha256(tokenizer.to_json()) != manifest["tokenizer"]["sha256"]:
        kind = manifest["tokenizer"]["kind"]
        raise UserError(
            f"the dataset {directory} was made by another tokenizer ({kind}) than the model's, or than the file that is named; "
            "give its text instead"
        )
    return directory


def _request(
    data: DataConfig, source: Source, validation: Source | None, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """What is asked for, apart from the source's content: a dataset made for another request is stale."""
    # All settings of a text, so that none added later can be forgotten; three by what they stand for rather than by their words.
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(TextConfig)} | {
        "source": source.location,
        "validation_source": None if validation is None else validation.location,
        "tokenizer": data.tokenizer if tokenizer is None else tokenizer.kind,
        "tokenizer_sha256": None if tokenizer is None else _sha256(tokenizer.to_json()),
    }


def _default_directory(source: Source, request: Mapping[str, Any]) -> Path:
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", source.name).strip("-")[:40] or "text"
    short_hash = _sha256(json.dumps(request, sort_keys=True))[:12]
    return cache_directory() / "datasets" / f"{slug}-{request['tokenizer']}-{short_hash}"


def _checked(out: Path) -> Path:
    """The directory that the user named, which must be free or a dataset of ours: whatever is there gets replaced."""
    out = Path(os.path.realpath(user_path(out)))  # of a link the place it leads to, beside which the dataset is made
    if out.is_mount():
        raise UserError(f"{out} is a file system of its own, which cannot be replaced: choose a directory in it")
    with explain_os_errors("write", out):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return out
        if not out.is_dir() or read_manifest(out) is None:
            raise UserError(
                f"{out} exists and is no dataset of glassgpt's: choose another directory, or remove it first"
            )
    return out


def _announce_replacing(directory: Path, log: Log) -> None:
    """Say what is replaced, if anything. Raises `UserError` where files lie in it that are not of the dataset."""
    old = read_manifest(directory)
    if old is None:
        return
    if foreign := sorted({path.name for path in directory.iterdir()} - files_of(old)):
        raise UserError(
            f"{directory} is a dataset that would be replaced, and has {foreign[0]} in it, which is not of it: move that first"
        )
    log(f"replacing the dataset {directory}, which was made of {old['request']['source']}")


def _is_fresh(directory: Path, sources: Sequence[Source], request: Mapping[str, Any]) -> bool:
    manifest = read_manifest(directory)
    return (
        manifest is not None
        and manifest["request"] == request
        and find_damage(directory, manifest) is None
        and all(
            source.is_unchanged(recorded)
            for source, recorded in zip(sources, manifest["source"]["identity"], strict=True)
        )
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
