"""Prepare a text as a dataset of token shards, unless an up-to-date one exists."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from glassgpt.config.schema import DataConfig, TextConfig
from glassgpt.data.builder import DatasetBuilder, Request
from glassgpt.data.dataset import (
    MANIFEST,
    DamagedDatasetError,
    is_dataset,
    load_manifest,
    read_manifest,
    verify_files,
    was_prepared,
)
from glassgpt.data.shards import TOKENIZER, is_shard_name
from glassgpt.data.sources import PreparedDataset, Source, resolve
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer, tokenizer_file
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError, shown
from glassgpt.utils.files import explain_os_errors, user_path
from glassgpt.utils.formatting import Log


def prepare(
    data: DataConfig,
    out: Path | None = None,
    tokenizer: Tokenizer | None = None,
    log: Log = lambda line: None,
    *,
    workers: int | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> Path:
    """Prepare the dataset, unless it is up to date, and return its directory: `out`, or one in the cache.

    A `tokenizer` (of a trained model) replaces the one that `data` names. A source that is a prepared dataset is
    returned as it is; its own tokenizer must be `tokenizer` or the file that `data` names, but may differ from the kind
    that it names (see `require_tokenizer`). The result does not depend on the number of `workers` (default: one per
    core). A call resumes an interrupted one. Without `check` an existing dataset is not verified: another process did.
    Raises `UserError` for a bad source, or an `out` with other content; `overwrite` replaces a dataset of another text
    or other settings.
    """
    wanted = _request(data, out, tokenizer)
    if isinstance(wanted, Path):
        return wanted
    if (outdated := _why_outdated(wanted, check, log)) is None:
        return wanted.directory
    if out is not None:
        _require_replaceable(wanted.directory, outdated, overwrite)  # before the lock, whose file is created next to it
    with _locked(wanted.directory, wanted.sources[0], log):
        if (outdated := _why_outdated(wanted, check)) is not None:  # another process may have prepared it meanwhile
            if out is not None and (former := _require_replaceable(wanted.directory, outdated, overwrite)) is not None:
                log(f"replacing the dataset {wanted.directory}, prepared from {former}")
            DatasetBuilder(wanted, data, log).build(workers)
    return wanted.directory


def find_prepared(data: DataConfig, tokenizer: Tokenizer | None) -> tuple[Path, bool]:
    """The directory that `prepare` returns without `out`, and whether a dataset in it is of the text as it is now.

    The dataset is not verified. Raises `UserError` for a source that does not exist.
    """
    wanted = _request(data, None, tokenizer)
    if isinstance(wanted, Path):
        return wanted, True
    with suppress(UserError):  # of a folder without text
        return wanted.directory, _why_outdated(wanted, check=False) is None
    return wanted.directory, False


def _request(data: DataConfig, out: Path | None, tokenizer: Tokenizer | None) -> Request | Path:
    """What `prepare` is asked for; the directory if the source is a prepared dataset."""
    source = resolve(data.source)
    if tokenizer is None and tokenizer_file(data.tokenizer) is not None:
        tokenizer = build_tokenizer(data.tokenizer)  # so that the request has the file's content instead of its name
    if isinstance(source, PreparedDataset):
        return _use_dataset(source.directory, out, tokenizer)
    sources = [source]
    if data.validation_source is not None:
        validation = resolve(data.validation_source)
        if isinstance(validation, PreparedDataset):
            raise UserError(f"validation source {data.validation_source} is a prepared dataset; name its text instead")
        sources.append(validation)
    # All settings of a text, so that none added later is forgotten, except those that are not set: datasets of earlier
    # versions stay up to date. Three are replaced by what they refer to.
    names = (field.name for field in dataclasses.fields(TextConfig) if getattr(data, field.name) is not None)
    settings = {name: getattr(data, name) for name in names} | {
        "source": source.location,
        "validation_source": sources[1].location if len(sources) > 1 else None,
        "tokenizer": data.tokenizer if tokenizer is None else tokenizer.kind,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
    }
    if out is None:
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", source.name).strip("-")[:40] or "text"
        short_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        directory = cache_directory() / "datasets" / f"{slug}-{settings['tokenizer']}-{short_hash}"
    else:
        directory = Path(os.path.realpath(user_path(out)))  # a link's target, next to which the dataset is built
    return Request(directory, sources, settings, tokenizer)


def require_tokenizer(data: DataConfig) -> None:
    """Raise `UserError` if a source is a prepared dataset with another tokenizer than the one that `data` names.

    For callers who know that the user named it; a config cannot distinguish that from a default or a recipe's value.
    """
    for directory in (user_path(source) for source in data.sources if source):
        if tokenizer_file(data.tokenizer) is not None or not is_dataset(directory):
            continue  # `prepare` compares a file's content
        if (own := load_manifest(directory)["tokenizer"]["kind"]) != data.tokenizer:
            advice = "leave the tokenizer out to use the dataset's, or name the text instead"
            other = f"another tokenizer ({own}) than {data.tokenizer}"
            raise UserError(f"dataset {directory} was prepared with {other}; {advice}")


def _use_dataset(directory: Path, out: Path | None, tokenizer: Tokenizer | None) -> Path:
    """A dataset as the source, after a check that the model's tokenizer is its own."""
    own = load_manifest(directory)["tokenizer"]
    if out is not None and out.expanduser().resolve() != directory:
        raise UserError(f"{directory} is already a prepared dataset: use it there, or copy the directory")
    if tokenizer is not None and tokenizer.sha256 != own["sha256"]:
        other = f"another tokenizer ({own['kind']}) than the model's, or than the named file"
        raise UserError(f"dataset {directory} was prepared with {other}; name its text instead")
    return directory


def _why_outdated(wanted: Request, check: bool, log: Log = lambda line: None) -> str | None:
    """None if an undamaged dataset of the text as it is now lies in the directory. Otherwise how the one there differs.

    That is an empty text if there is none, or the same one, damaged.
    """
    try:
        manifest = read_manifest(wanted.directory)
        if manifest is None:
            return ""
        if (former := manifest["request"]) != wanted.settings:
            names = [name for name in {**former, **wanted.settings} if former.get(name) != wanted.settings.get(name)]
            changes = ((name, shown(former.get(name)), shown(wanted.settings.get(name))) for name in names)
            return ", ".join(f"{name} is {old}, not {new}" for name, old, new in changes)
        identities = manifest["source"]["identity"]
        pairs = zip(wanted.sources, identities, strict=True)
        if len(identities) != len(wanted.sources) or not all(source.is_unchanged(each) for source, each in pairs):
            return "its text has changed since"
        if check:
            verify_files(wanted.directory, manifest, log)
    except DamagedDatasetError as error:
        log(f"{str(error).splitlines()[0]}; it is prepared again")
        return ""
    return None


def _require_replaceable(out: Path, outdated: str, overwrite: bool) -> str | None:
    """Raise `UserError` unless the directory is free, or a dataset without other files. Return that one's source.

    `outdated`: how the dataset differs, for which `overwrite` is needed.
    """
    with explain_os_errors("write", out):
        if out.is_mount():
            raise UserError(f"{out} is the root of a file system and cannot be replaced: choose a directory in it")
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if not names and (out.is_dir() or not out.exists()):
            return None
    if not was_prepared(out):
        raise UserError(f"{out} exists and is not a prepared dataset: choose another directory, or remove it")
    others = sorted(name for name in names if name not in (MANIFEST, TOKENIZER) and not is_shard_name(name))
    if others:
        raise UserError(f"dataset {out} would be replaced, but {others[0]} in it is not part of it: move that first")
    if outdated and not overwrite:
        advice = "choose another --out, or replace it with --overwrite"
        raise UserError(f"{out} holds another dataset: {outdated}; {advice}")
    with suppress(UserError):
        return str((read_manifest(out) or {})["request"]["source"])
    return "a text that its damaged manifest does not name"


@contextmanager
def _locked(directory: Path, source: Source, log: Log) -> Iterator[None]:
    """Keep other processes from preparing the same directory at the same time."""
    path = directory.with_name(f".{directory.name}.lock")
    lock = filelock.FileLock(path)
    with explain_os_errors("write", directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()  # filelock would wait without end where no file can be created, as in /proc
        try:
            held = lock.acquire(blocking=False)
        except filelock.Timeout:
            log(f"waiting for another process that prepares {source.name}")
            held = lock.acquire()
        with held:
            yield
