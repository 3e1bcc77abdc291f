"""Prepare a text as a dataset of token shards, unless an up-to-date one exists.

A dataset is built in a hidden directory: it is planned once, its work units are prepared in any order by several
processes, and then it is moved into place.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np

from glassgpt.config.schema import DataConfig, TextConfig
from glassgpt.data import dataset, work_units
from glassgpt.data.dataset import MANIFEST, files_of, find_damage, is_dataset, load_manifest, read_manifest
from glassgpt.data.shards import SPLITS, TOKENIZER, finished_shards, index_path, read_index
from glassgpt.data.source_files import fetch_all
from glassgpt.data.sources import PreparedDataset, Source, resolve
from glassgpt.data.work_units import Plan, WorkUnit, counts_path
from glassgpt.data.workers import run_tasks
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer, load_tokenizer, tokenizer_file
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import PARTIAL_PREFIX, explain_os_errors, flush_to_disk, user_path, write_atomic
from glassgpt.utils.formatting import Log, ProgressLine, format_bytes

R = TypeVar("R")
Shards = dict[str, list[dict[str, Any]]]

# The beginning of the manifest, while the dataset is built: a build resumes only for the same request and text.
_PURPOSE = "build.json"
_DUPLICATES = "duplicates.npz"
_KEPT = ("train-*.json", "validation-*.json", _DUPLICATES)  # files worth keeping if a build stops
# Keys of the manifest, and the counts that they sum.
_COUNTS = {"documents": "documents", "blank_documents": "blank", "bad_rows": "bad", "duplicates_removed": "duplicates"}
_SUMS = ("characters", "bytes", "tokens", "documents")  # of a split, in the manifest
_SMALL = 1 << 24  # bytes of files up to which starting a second process costs more than it saves


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
    that it names (see `require_tokenizer`). The result does not depend on the number of `workers` (default: one per
    core). A call resumes an interrupted one. Raises `UserError` for a bad source, or an `out` with other content.
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
    if _is_up_to_date(directory, sources, request):
        return directory
    if out is not None:
        _require_replaceable(directory)  # before the lock, whose file is created next to it
    with _locked(directory, source, log):
        if not _is_up_to_date(directory, sources, request):  # another process may have prepared it meanwhile
            if out is not None and (replaced := _require_replaceable(directory)) is not None:
                log(f"replacing the dataset {directory}, prepared from {replaced['request']['source']}")
            DatasetBuilder(directory, sources, data, tokenizer, request, log).build(workers)
    return directory


def require_tokenizer(data: DataConfig) -> None:
    """Raise `UserError` if a source is a prepared dataset with another tokenizer than the one that `data` names.

    For callers who know that the user named it; a config cannot distinguish that from a default or a recipe's value.
    """
    for directory in (user_path(source) for source in data.sources if source):
        if not is_dataset(directory):
            continue
        own, is_file = load_manifest(directory)["tokenizer"], tokenizer_file(data.tokenizer) is not None
        is_same = build_tokenizer(data.tokenizer).sha256 == own["sha256"] if is_file else own["kind"] == data.tokenizer
        if not is_same:
            advice = "leave the tokenizer out to use the dataset's, or name the text instead"
            other = f"another tokenizer ({own['kind']}) than {data.tokenizer}"
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


def _is_up_to_date(directory: Path, sources: Sequence[Source], request: Mapping[str, Any]) -> bool:
    manifest = read_manifest(directory)
    if manifest is None or manifest["request"] != request or find_damage(directory, manifest) is not None:
        return False
    identities = manifest["source"]["identity"]
    return all(source.is_unchanged(identity) for source, identity in zip(sources, identities, strict=True))


def _require_replaceable(out: Path) -> dict[str, Any] | None:
    """Raise `UserError` unless the directory is free, or a dataset without other files. Return that one's manifest."""
    with explain_os_errors("write", out):
        if out.is_mount():
            raise UserError(f"{out} is the root of a file system and cannot be replaced: choose a directory in it")
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if not names and (out.is_dir() or not out.exists()):
            return None
    old = read_manifest(out)
    if old is None:
        raise UserError(f"{out} exists and is not a prepared dataset: choose another directory, or remove it")
    if others := sorted(names - {MANIFEST, *files_of(old)}):
        raise UserError(f"dataset {out} would be replaced, but {others[0]} in it is not part of it: move that first")
    return old


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


@dataclasses.dataclass
class DatasetBuilder:
    """Builds a dataset in a hidden directory next to its final one. A later builder resumes what a killed one left."""

    directory: Path
    sources: Sequence[Source]  # the text and, if validation has a source of its own, that
    data: DataConfig
    tokenizer: Tokenizer | None
    request: Mapping[str, Any]
    log: Log

    def __post_init__(self) -> None:
        self._work = self.directory.with_name(f"{PARTIAL_PREFIX}{self.directory.name}")

    def build(self, workers: int | None) -> None:
        """Build the dataset with this many processes (default: one per core, if it is large) and move it into place."""
        # The sources' identity before reading, so that a file that changes meanwhile is noticed.
        source = {"name": self.sources[0].name, "identity": [source.identity() for source in self.sources]}
        purpose = {"format": dataset.FORMAT, "version": dataset.VERSION, "source": source, "request": self.request}
        try:
            manifest = read_manifest(self._work)  # if an earlier build was killed while it moved it into place
            earlier = manifest or read_manifest(self._work, _PURPOSE)
            is_resumed = earlier is not None and _made_from(earlier) == _made_from(purpose)
            if not is_resumed or manifest is None:
                self._prepare(purpose, is_resumed, workers)
            self._publish()
            if not is_resumed:  # nothing is known about files that lay on the disk meanwhile
                dataset.remember_hashes(self.directory)
        except BaseException:
            if any(path for pattern in _KEPT for path in self._work.glob(pattern)):
                self.log("finished files are kept: the same command resumes while the text is unchanged")
            else:
                shutil.rmtree(self._work, ignore_errors=True)
            raise

    def _prepare(self, purpose: Mapping[str, Any], is_resumed: bool, workers: int | None) -> None:
        """Write all files of the dataset, the manifest last."""
        self.log(f"preparing {self.sources[0].name}{': resuming' if is_resumed else ''}")
        plan, units, tokenizer = self._plan(purpose, is_resumed)
        size = sum(file.bytes for source in self.sources for file in source.files())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = workers or (1 if size <= _SMALL else cores)
        if self.data.deduplicate:
            units = self._with_duplicates(plan, units, workers)
        unfinished = [unit for unit in units if not counts_path(self._work, unit.number).is_file()]
        self._run(work_units.prepare_unit, plan, unfinished, workers)
        shards: Shards = {
            split: [each for unit in units for each in finished_shards(self._work, f"{split}-{unit.number:05d}")]
            for split in SPLITS
        }
        if self.data.validation == "first_shard":
            shards["validation"], shards["train"] = shards["train"][:1], shards["train"][1:]
        if problem := self._find_problem(shards, purpose["source"]["identity"]):
            shutil.rmtree(self._work)
            raise UserError(problem)
        manifest = {**purpose, **self._content(plan, units, tokenizer, shards)}
        write_atomic(self._work / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self.log(_summary(manifest))

    def _plan(self, purpose: Mapping[str, Any], is_resumed: bool) -> tuple[Plan, list[WorkUnit], Tokenizer]:
        """Plan the build. Unless it is resumed, clear its directory and write what a later call needs to resume it."""
        if is_resumed:
            return work_units.make_plan(self._work, self.sources, self.data, load_tokenizer(self._work / TOKENIZER))
        for names in (source.left_out for source in self.sources if source.left_out):
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            self.log(f"left out: {', '.join(names[:3])}{more}")
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        plan, units, tokenizer = work_units.make_plan(self._work, self.sources, self.data, self.tokenizer)
        write_atomic(self._work / TOKENIZER, tokenizer.to_json())
        write_atomic(self._work / _PURPOSE, json.dumps(purpose))
        return plan, units, tokenizer

    def _with_duplicates(self, plan: Plan, units: Sequence[WorkUnit], workers: int) -> list[WorkUnit]:
        """The units with their duplicates: documents with the text of an earlier one of any unit."""
        path = self._work / _DUPLICATES
        if not path.is_file():
            hashes = self._run(work_units.hash_unit, plan, units, workers)
            ends = np.cumsum([len(part) for part in hashes])
            repeated = np.split(work_units.repeats(np.concatenate(hashes)), ends[:-1])
            np.savez(content := io.BytesIO(), *repeated)
            write_atomic(path, content.getvalue())
        with np.load(path) as saved:
            return [dataclasses.replace(unit, duplicates=saved[f"arr_{unit.number}"]) for unit in units]

    def _run(self, task: Callable[..., R], plan: Plan, units: Sequence[WorkUnit], workers: int) -> list[R]:
        """Call a task for each unit with its files, as soon as they are present."""
        files = [file for source in self.sources for file in source.files()]
        wanted = [file for unit in units for file in files[unit.first_file : unit.first_file + len(unit.files)]]
        progress, before = ProgressLine(self.log), self._bytes_written()

        def message(seconds: float) -> str:
            if task is work_units.hash_unit:
                return "looking for duplicates"
            written = self._bytes_written()
            return f"{format_bytes(written)} of tokens written ({format_bytes((written - before) / seconds)}/s)"

        with closing(fetch_all(wanted, log=self.log)) as fetched:
            paths = (path for _, path in fetched)
            arguments = ((plan, unit, list(itertools.islice(paths, len(unit.files)))) for unit in units)
            return run_tasks(task, arguments, max(1, min(workers, len(units))), lambda: progress.update(message))

    def _bytes_written(self) -> int:
        return sum(path.stat().st_size for split in SPLITS for path in self._work.glob(f"{split}-*.bin"))

    def _find_problem(self, shards: Shards, identity: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the first problem of the shards (the text changed meanwhile, or a split is empty), or None."""
        for source, recorded in zip(self.sources, identity, strict=True):
            if not source.is_unchanged(recorded):  # the shards may mix two versions of it
                return f"{source.location} changed while it was prepared; run the command again"
        is_first_shard, name = self.data.validation == "first_shard", self.sources[0].location
        if not shards["train"]:
            hint = "lower data.shard_tokens, or set data.validation = fraction" if is_first_shard else "use more text"
            return f"{name} has no text left for training after the validation split; {hint}"
        if not shards["validation"]:
            hint = "raise data.validation_fraction, or set data.validation_source"
            return f"{self.sources[-1].location} has no document left for validation; {hint}"
        if is_first_shard and shards["validation"][0]["is_split"]:
            return f"the first document of {name} is larger than a shard; raise data.shard_tokens"
        return None

    def _content(self, plan: Plan, units: Sequence[WorkUnit], tokenizer: Tokenizer, shards: Shards) -> dict[str, Any]:
        """Return the part of the manifest that describes the files."""
        counts = [json.loads(counts_path(self._work, unit.number).read_bytes()) for unit in units]
        train, validation = (
            np.concatenate([read_index(index_path(self._work / shard["name"]))["hash"] for shard in shards[split]])
            for split in SPLITS
        )
        if self.data.validation == "first_shard":
            # The file is renamed when the dataset is complete.
            shards["validation"][0]["name"] = shards["validation"][0]["name"].replace("train-", "validation-", 1)
        splits: dict[str, Any] = {}
        for split in SPLITS:
            sums = {name: sum(each[name] for each in shards[split]) for name in _SUMS}
            entries = [{key: value for key, value in each.items() if key != "is_split"} for each in shards[split]]
            splits[split] = {**sums, "shards": entries}
        return {
            "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
            "dtype": plan.dtype,
            **{key: sum(count[name] for count in counts) for key, name in _COUNTS.items()},
            "duplicates": int(work_units.repeats(np.concatenate([train, validation])).sum()),
            "validation_documents_in_train": int(np.isin(validation, train).sum()),
            "splits": splits,
        }

    def _publish(self) -> None:
        """Remove the files that are not part of the dataset, and rename the directory. Repeatable after a kill."""
        kept = {MANIFEST, *files_of(json.loads((self._work / MANIFEST).read_bytes()))}
        for name in kept:
            if not (self._work / name).exists():
                os.replace(self._work / name.replace("validation-", "train-", 1), self._work / name)
        for path in self._work.iterdir():
            if path.name not in kept:
                path.unlink()
        flush_to_disk(self._work)
        if self.directory.exists():
            # The manifest last: what a kill leaves is still recognised as a dataset and may be replaced.
            for path in self.directory.iterdir():
                if path.is_file() and path.name != MANIFEST:
                    path.unlink()
            shutil.rmtree(self.directory)
        os.replace(self._work, self.directory)
        flush_to_disk(self.directory.parent)


def _made_from(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    """The request and the texts of a dataset."""
    return manifest["request"], *(text_identity(each) for each in manifest["source"]["identity"])


def text_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what does not change the text: files' times, and the commit, as most change other files."""
    files = [{**file, "mtime_ns": None} for file in identity.get("files", [])]
    return {**identity, "commit": None, "files": files}


def _summary(manifest: Mapping[str, Any]) -> str:
    """What was prepared and left out, in a few lines."""
    splits = manifest["splits"]
    characters = sum(splits[split]["characters"] for split in SPLITS)
    tokens = ", ".join(f"{splits[split]['tokens']:,} tokens for {split}" for split in SPLITS)
    name, documents = manifest["source"]["name"], manifest["documents"]
    lines = [
        f"prepared {name}: {documents:,} documents, {characters:,} characters, {tokens}",
        *(f"{manifest[key]:,} {dataset.SOURCE_COUNTS[key]}" for key in _COUNTS if key != "documents" and manifest[key]),
    ]
    if manifest["duplicates"] and not manifest["duplicates_removed"]:
        lines.append(
            f"{manifest['duplicates']:,} documents are duplicates (--deduplicate removes them); "
            f"{manifest['validation_documents_in_train']:,} validation documents are also in the training split"
        )
    return "\n".join(lines)
