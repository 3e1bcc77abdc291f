"""Prepare a text as a dataset of token shards, unless an up-to-date one exists."""

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
from glassgpt.data.builder import DatasetBuilder
from glassgpt.data.dataset import MANIFEST, files_of, find_damage, is_dataset, load_manifest, read_manifest
from glassgpt.data.progress import Log
from glassgpt.data.sources import PreparedDataset, Source, resolve
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer, tokenizer_file
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, user_path


def prepare(
    data: DataConfig,
    out: Path | None = None,
    tokenizer: Tokenizer | None = None,
    log: Log = lambda line: None,
    *,
    workers: int | None = None,
) -> Path:
    """Prepare the dataset, unless it is up to date, and return its directory: `out`, or one in the cache.

    A `tokenizer` (of a trained model) replaces the one that `data` names. A source that is a prepared dataset is
    returned as it is; its own tokenizer must be `tokenizer` or the file that `data` names, but may differ from the kind
    that it names (see `require_tokenizer`). `log` receives lines about long tasks. `workers` processes share the work
    (default: one per core), and the result does not depend on their number. After an interrupt or a kill, the next call
    resumes. Raises `UserError` for a bad source, and for an `out` that holds something else.
    """
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
    # All settings of a text, so that none added later is forgotten. Three are replaced by what they refer to.
    request = {field.name: getattr(data, field.name) for field in dataclasses.fields(TextConfig)} | {
        "source": source.location,
        "validation_source": sources[1].location if len(sources) > 1 else None,
        "tokenizer": data.tokenizer if tokenizer is None else tokenizer.kind,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
    }
    if out is None:
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", source.name).strip("-")[:40] or "text"
        short_hash = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]
        directory = cache_directory() / "datasets" / f"{slug}-{request['tokenizer']}-{short_hash}"
    else:
        directory = Path(os.path.realpath(user_path(out)))  # a link's target, next to which the dataset is built
    if not _is_up_to_date(directory, sources, request):
        with _locked(directory, source, log):
            if not _is_up_to_date(directory, sources, request):  # another process may have prepared it meanwhile
                if out is not None:
                    _require_replaceable(directory, log)
                DatasetBuilder(directory, sources, data, tokenizer, request, log).build(workers)
    return directory


def require_tokenizer(data: DataConfig) -> None:
    """Raise `UserError` if a source is a prepared dataset with another tokenizer than the one that `data` names.

    For callers who know that the user named it; a config cannot distinguish that from a default or a recipe's value.
    """
    for source in data.sources:
        directory = user_path(source)
        if not source or not is_dataset(directory):
            continue
        own, is_file = load_manifest(directory)["tokenizer"], tokenizer_file(data.tokenizer) is not None
        is_same = build_tokenizer(data.tokenizer).sha256 == own["sha256"] if is_file else own["kind"] == data.tokenizer
        if not is_same:
            raise UserError(
                f"dataset {source} was prepared with another tokenizer ({own['kind']}) than {data.tokenizer}; "
                "leave the tokenizer out to use the dataset's, or name the text instead"
            )


def _use_dataset(directory: Path, out: Path | None, tokenizer: Tokenizer | None) -> Path:
    """A dataset as the source, after a check that the model's tokenizer is its own."""
    own = load_manifest(directory)["tokenizer"]
    if out is not None and out.expanduser().resolve() != directory:
        raise UserError(f"{directory} is already a prepared dataset: use it there, or copy the directory")
    if tokenizer is not None and tokenizer.sha256 != own["sha256"]:
        raise UserError(
            f"dataset {directory} was prepared with another tokenizer ({own['kind']}) than the model's, or than the "
            "named file; name its text instead"
        )
    return directory


def _is_up_to_date(directory: Path, sources: Sequence[Source], request: Mapping[str, Any]) -> bool:
    manifest = read_manifest(directory)
    if manifest is None or manifest["request"] != request or find_damage(directory, manifest) is not None:
        return False
    identities = manifest["source"]["identity"]
    return all(source.is_unchanged(identity) for source, identity in zip(sources, identities, strict=True))


def _require_replaceable(out: Path, log: Log) -> None:
    """Raise `UserError` unless the directory that the user named is free, or has a prepared dataset and no other file.

    Its content is replaced.
    """
    if out.is_mount():
        raise UserError(f"{out} is the root of a file system and cannot be replaced: choose a directory in it")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not names and (out.is_dir() or not out.exists()):
        return
    old = read_manifest(out)
    if old is None:
        raise UserError(f"{out} exists and is not a prepared dataset: choose another directory, or remove it")
    if others := sorted(names - {MANIFEST, *files_of(old)}):
        raise UserError(f"dataset {out} would be replaced, but {others[0]} in it is not part of it: move that first")
    log(f"replacing the dataset {out}, prepared from {old['request']['source']}")


@contextmanager
def _locked(directory: Path, source: Source, log: Log) -> Iterator[None]:
    """Keep other processes from preparing the same directory at the same time."""
    lock = filelock.FileLock(directory.with_name(f".{directory.name}.lock"))
    with explain_os_errors("write", directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(blocking=False)
        except filelock.Timeout:
            log(f"waiting for another process that prepares {source.name}")
            held = lock.acquire()
        with held:
            yield
