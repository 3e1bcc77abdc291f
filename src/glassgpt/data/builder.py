"""Builds a dataset in a hidden directory: it is planned once, its work units are prepared in any order by several
processes, and then it is moved into place.
"""

import dataclasses
import io
import itertools
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from glassgpt.config.schema import DataConfig
from glassgpt.data import dataset, work_units
from glassgpt.data.dataset import MANIFEST, files_of, read_manifest
from glassgpt.data.shards import COUNTS, SPLITS, TOKENIZER, count_repeats, finished_shards, index_path, is_intact
from glassgpt.data.source_files import fetch_all
from glassgpt.data.sources import LocalFiles, Source, require_texts
from glassgpt.data.work_units import Plan, WorkUnit, counts_path
from glassgpt.data.workers import run_tasks
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import PARTIAL_PREFIX, flush_to_disk, read_sealed, sealed_json, write_atomic
from glassgpt.utils.formatting import Log, ProgressLine, format_bytes

R = TypeVar("R")
Shards = dict[str, list[dict[str, Any]]]

# The beginning of the manifest, while the dataset is built: a build resumes only for the same request and text.
_PURPOSE = "build.json"
_DUPLICATES = "duplicates.npz"
_KEPT = ("train-*.json", "validation-*.json", _DUPLICATES)  # files worth keeping if a build stops
# Keys of the manifest, and the counts that they sum.
_COUNTS = {"documents": "documents", "blank_documents": "blank", "bad_rows": "bad", "duplicates_removed": "duplicates"}
_COUNTS |= {name: name for name in ("special_tokens", "web_pages")}
_SMALL = 1 << 24  # bytes of files up to which starting a second process costs more than it saves


@dataclasses.dataclass(frozen=True)
class Request:
    """A dataset to prepare."""

    directory: Path
    sources: Sequence[Source]  # the text and, if validation has a source of its own, that
    settings: Mapping[str, Any]  # recorded in the manifest
    tokenizer: Tokenizer | None


@dataclasses.dataclass
class DatasetBuilder:
    """Builds a dataset in a hidden directory next to its final one. A later builder resumes what a killed one left."""

    wanted: Request
    data: DataConfig
    log: Log

    def __post_init__(self) -> None:
        self.directory, self.sources = self.wanted.directory, self.wanted.sources
        self._work = self.directory.with_name(f"{PARTIAL_PREFIX}{self.directory.name}")

    def build(self, workers: int | None) -> None:
        """Build the dataset with this many processes (default: one per core, if it is large) and move it into place."""
        for local in (source for source in self.sources if isinstance(source, LocalFiles)):
            require_texts(local, self.data)  # before hashing gigabytes
        # The sources' identity before reading, so that a file that changes meanwhile is noticed.
        source = {"name": self.sources[0].name, "identity": [source.identity() for source in self.sources]}
        settings = self.wanted.settings
        purpose = {"format": dataset.FORMAT, "version": dataset.VERSION, "source": source, "request": settings}
        try:
            manifest = earlier = None
            with suppress(UserError):  # complete, if an earlier build was killed while it moved it into place
                manifest = read_manifest(self._work)
            with suppress(UserError):
                earlier = manifest or self._read_purpose()
            is_resumed = earlier is not None and _made_from(earlier) == _made_from(purpose)
            if is_resumed and manifest is not None:
                self._publish(manifest)
            else:
                self._publish(self._prepare(purpose, is_resumed, workers))
                dataset.remember_hashes(self.directory)  # all files were written or read just now
        except BaseException:
            if any(path for pattern in _KEPT for path in self._work.glob(pattern)):
                self.log("finished files are kept: the same command resumes while the text is unchanged")
            else:
                shutil.rmtree(self._work, ignore_errors=True)
            raise

    def _prepare(self, purpose: Mapping[str, Any], is_resumed: bool, workers: int | None) -> dict[str, Any]:
        """Write all files of the dataset, the manifest last, and return that."""
        self.log(f"preparing {self.sources[0].name}{': resuming' if is_resumed else ''}")
        plan, units, tokenizer = self._plan(purpose, is_resumed)
        size = sum(file.bytes for source in self.sources for file in source.files())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = workers or (1 if size <= _SMALL else cores)
        if self.data.deduplicate:
            units = self._with_duplicates(plan, units, workers)
        if is_resumed:
            self._drop_damaged(units)
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
        write_atomic(self._work / MANIFEST, sealed_json(manifest))
        self.log(_summary(manifest))
        return manifest

    def _plan(self, purpose: Mapping[str, Any], is_resumed: bool) -> tuple[Plan, list[WorkUnit], Tokenizer]:
        """Plan the build. Unless it is resumed, clear its directory and write what a later call needs to resume it."""
        make_plan = partial(work_units.make_plan, self._work, self.sources, self.data, log=self.log)
        if is_resumed:
            return make_plan(load_tokenizer(self._work / TOKENIZER))
        for names in filter(None, (source.left_out for source in self.sources)):
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            self.log(f"left out: {', '.join(names[:3])}{more}")
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        plan, units, tokenizer = make_plan(self.wanted.tokenizer)
        write_atomic(self._work / TOKENIZER, tokenizer.to_json())
        write_atomic(self._work / _PURPOSE, sealed_json({**purpose, "tokenizer_sha256": tokenizer.sha256}))
        return plan, units, tokenizer

    def _read_purpose(self) -> dict[str, Any] | None:
        """What an unfinished build was for; None if its tokenizer has changed. Raises `UserError` if it is damaged."""
        purpose = read_sealed(self._work / _PURPOSE)
        return purpose if load_tokenizer(self._work / TOKENIZER).sha256 == purpose["tokenizer_sha256"] else None

    def _drop_damaged(self, units: Sequence[WorkUnit]) -> None:
        """Remove the marks of damaged shards and units, and of units that lack shards, so that they are redone."""
        for unit in units:
            marks = [path for split in SPLITS for path in self._work.glob(f"{split}-{unit.number:05d}-*.json")]
            damaged = [mark for mark in marks if not is_intact(mark)]
            for mark in damaged:
                self.log(f"{mark.with_suffix('.bin').name} is damaged; it is prepared again")
                mark.unlink()
            finished = counts_path(self._work, unit.number)
            with suppress(UserError):
                counts = read_sealed(finished)
                documents = sum(read_sealed(mark)["documents"] for mark in marks)
                if not damaged and documents == counts["documents"] - counts["duplicates"]:
                    continue
            finished.unlink(missing_ok=True)

    def _with_duplicates(self, plan: Plan, units: Sequence[WorkUnit], workers: int) -> list[WorkUnit]:
        """The units with their duplicates: documents with the text of an earlier one of any unit."""
        path = self._work / _DUPLICATES
        damage = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
        with suppress(*damage), np.load(path) as saved:  # unless it is missing or damaged
            return [dataclasses.replace(unit, duplicates=saved[f"arr_{unit.number}"]) for unit in units]
        hashes = self._run(work_units.hash_unit, plan, units, workers)
        ends = np.cumsum([len(part) for part in hashes])
        repeated = np.split(work_units.repeats(np.concatenate(hashes)), ends[:-1])
        np.savez(content := io.BytesIO(), *repeated)
        write_atomic(path, content.getvalue())
        return [dataclasses.replace(unit, duplicates=own) for unit, own in zip(units, repeated, strict=True)]

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
            return f"{name} is too short: it has no text besides the validation split, which every dataset has; {hint}"
        if not shards["validation"]:
            hint = "raise data.validation_fraction, or set data.validation_source"
            return f"{self.sources[-1].location} has no document left for validation; {hint}"
        if is_first_shard and shards["validation"][0]["is_split"]:
            return f"the first document of {name} is larger than a shard; raise data.shard_tokens"
        return None

    def _content(self, plan: Plan, units: Sequence[WorkUnit], tokenizer: Tokenizer, shards: Shards) -> dict[str, Any]:
        """Return the part of the manifest that describes the files."""
        counts = [read_sealed(counts_path(self._work, unit.number)) for unit in units]
        indexes = [[index_path(self._work / shard["name"]) for shard in shards[split]] for split in SPLITS]
        duplicates, validation_documents_in_train = count_repeats(*indexes)
        if self.data.validation == "first_shard":
            # The file is renamed when the dataset is complete.
            shards["validation"][0]["name"] = shards["validation"][0]["name"].replace("train-", "validation-", 1)
        splits: dict[str, Any] = {}
        for split in SPLITS:
            sums = {name: sum(each[name] for each in shards[split]) for name in COUNTS}
            entries = [{key: value for key, value in each.items() if key != "is_split"} for each in shards[split]]
            splits[split] = {**sums, "shards": entries}
        return {
            "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
            "dtype": plan.dtype,
            **{key: sum(count.get(name, 0) for count in counts) for key, name in _COUNTS.items()},
            "duplicates": duplicates,
            "validation_documents_in_train": validation_documents_in_train,
            "splits": splits,
        }

    def _publish(self, manifest: Mapping[str, Any]) -> None:
        """Remove the files that are not part of the dataset, and rename the directory. Repeatable after a kill."""
        kept = {MANIFEST, *files_of(manifest)}
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
    return {**identity, "commit": None, "files": [{**file, "mtime_ns": None} for file in identity.get("files", [])]}


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
