"""Build a dataset: plan it once, prepare its work units in any order by several processes, then move it into place."""

import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from glassgpt.config.schema import DataConfig
from glassgpt.data.dataset import FORMAT, MANIFEST, VERSION, files_of, read_manifest
from glassgpt.data.plan import Plan, WorkUnit, make_plan
from glassgpt.data.progress import Log, ProgressLine
from glassgpt.data.shards import SPLITS, TOKENIZER, finished_shards, index_path, read_index
from glassgpt.data.source_files import SourceFile, fetch_all
from glassgpt.data.sources import Source
from glassgpt.data.work_units import Counts, hash_unit, prepare_unit, saved_counts, shard_prefix
from glassgpt.data.workers import run_tasks
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import PARTIAL_PREFIX, explain_os_errors, flush_to_disk, sha256_of, write_atomic
from glassgpt.utils.formatting import format_bytes

R = TypeVar("R")

# What a build is for: it cannot resume for another request or text.
_PURPOSE = "build.json"
_DUPLICATES = "duplicates.npz"
# Files worth keeping if a build stops.
_KEPT = (*(f"{split}-*.json" for split in SPLITS), _DUPLICATES)
# Bytes of files up to which starting a second process costs more than it saves.
_SMALL = 1 << 24


@dataclass
class DatasetBuilder:
    """Builds a dataset in a hidden directory next to its final one. A later builder resumes what a killed one left.

    `sources` are the text and, if validation has a source of its own, that.
    """

    directory: Path
    sources: Sequence[Source]
    data: DataConfig
    tokenizer: Tokenizer | None
    request: Mapping[str, Any]
    log: Log

    def __post_init__(self) -> None:
        self._work = self.directory.with_name(f"{PARTIAL_PREFIX}{self.directory.name}")

    def build(self, workers: int | None) -> None:
        """Build the dataset with this many processes (default: one per core, if it is large) and move it into place.

        Raises `UserError` for a bad source.
        """
        # Before reading, so that a file that changes meanwhile is noticed.
        identity = [source.identity() for source in self.sources]
        with explain_os_errors("write", self.directory):
            try:
                manifest = read_manifest(self._work)  # if an earlier build was killed while it moved it into place
                if manifest is None or not self._is_same(manifest["request"], manifest["source"]["identity"], identity):
                    self._prepare(identity, workers)
                self._publish()
            except BaseException:
                if any(path for pattern in _KEPT for path in self._work.glob(pattern)):
                    self.log("finished files are kept: the same command resumes while the text is unchanged")
                else:
                    shutil.rmtree(self._work, ignore_errors=True)
                raise

    def _is_same(self, request: Mapping[str, Any], recorded: Sequence[Any], identity: Sequence[Any]) -> bool:
        """Whether an earlier request and the identities of its sources are the present ones."""
        same = [source.same_text(old, new) for source, old, new in zip(self.sources, recorded, identity, strict=False)]
        return request == self.request and len(recorded) == len(identity) and all(same)

    def _is_started(self, identity: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an earlier build of this dataset can be resumed."""
        try:
            purpose = json.loads((self._work / _PURPOSE).read_bytes())
        except (OSError, ValueError):
            return False
        return purpose["version"] == VERSION and self._is_same(purpose["request"], purpose["identity"], identity)

    def _prepare(self, identity: Sequence[Mapping[str, Any]], workers: int | None) -> None:
        is_started = self._is_started(identity)
        self.log(f"preparing {self.sources[0].name}{': resuming' if is_started else ''}")
        if is_started:
            plan, units, tokenizer = make_plan(self.sources, self.data, load_tokenizer(self._work / TOKENIZER))
        else:
            plan, units, tokenizer = self._start(identity)
        workers = workers or (1 if sum(file.bytes for file in self._files) <= _SMALL else _cores())
        if self.data.deduplicate:
            units = self._with_duplicates(units, workers)
        todo = [unit for unit in units if saved_counts(self._work, unit.number) is None]
        self._run(prepare_unit, [(self._work, plan, unit) for unit in todo], todo, workers)
        for source, recorded in zip(self.sources, identity, strict=True):
            if not source.is_unchanged(recorded):  # the shards may mix two versions of it
                shutil.rmtree(self._work)
                raise UserError(f"{source.location} changed while it was prepared; run the command again")
        manifest = self._manifest(plan, len(units), tokenizer, identity)
        write_atomic(self._work / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self.log(_summary(manifest))

    def _start(self, identity: Sequence[Mapping[str, Any]]) -> tuple[Plan, list[WorkUnit], Tokenizer]:
        """Plan the dataset, in an empty directory."""
        for names in (source.left_out for source in self.sources):
            if names:
                more = ", ..." if len(names) > 3 else ""
                self.log(f"files of other types are left out: {', '.join(names[:3])}{more}")
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        plan, units, tokenizer = make_plan(self.sources, self.data, self.tokenizer)
        write_atomic(self._work / TOKENIZER, tokenizer.to_json())
        purpose = {"version": VERSION, "request": self.request, "identity": identity}
        write_atomic(self._work / _PURPOSE, json.dumps(purpose))
        return plan, units, tokenizer

    @property
    def _files(self) -> list[SourceFile]:
        """The files of all sources, in the plan's order. New objects: a cancelled one stays so."""
        return [file for source in self.sources for file in source.files()]

    def _with_duplicates(self, units: Sequence[WorkUnit], workers: int) -> list[WorkUnit]:
        """The units with their duplicates: documents with the text of an earlier one of any unit."""
        path = self._work / _DUPLICATES
        if not path.is_file():
            hashes = self._run(hash_unit, [(unit,) for unit in units], units, workers)
            repeated = np.split(_repeats(np.concatenate(hashes)), np.cumsum([len(part) for part in hashes])[:-1])
            np.savez(content := io.BytesIO(), *repeated)
            write_atomic(path, content.getvalue())
        with np.load(path) as saved:
            return [replace(unit, duplicates=saved[f"arr_{unit.number}"]) for unit in units]

    def _run(
        self, task: Callable[..., R], arguments: Sequence[tuple[Any, ...]], units: Sequence[WorkUnit], workers: int
    ) -> list[R]:
        """Call a task with the arguments and the files of each unit, as soon as they are present."""
        files, progress, before = self._files, ProgressLine(self.log), self._bytes_written()
        wanted = [files[unit.first_file :][: len(unit.files)] for unit in units]

        def message(seconds: float) -> str:
            if task is hash_unit:
                return "looking for duplicates"
            written = self._bytes_written()
            return f"{format_bytes(written)} of tokens written ({format_bytes((written - before) / seconds)}/s)"

        with closing(fetch_all(list(itertools.chain.from_iterable(wanted)), log=self.log)) as fetched:
            paths = (path for _, path in fetched)
            ready = (
                (*each, list(itertools.islice(paths, len(own)))) for each, own in zip(arguments, wanted, strict=True)
            )
            return run_tasks(task, ready, max(1, min(workers, len(units))), lambda: progress.update(message))

    def _bytes_written(self) -> int:
        return sum(path.stat().st_size for split in SPLITS for path in self._work.glob(f"{split}-*.bin"))

    # --------------------------------------------------------------------------------------------------------- manifest

    def _manifest(
        self, plan: Plan, units: int, tokenizer: Tokenizer, identity: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The manifest. Raises `UserError` if one of the splits is empty."""
        shards = {
            split: [shard for unit in range(units) for shard in finished_shards(self._work, shard_prefix(split, unit))]
            for split in SPLITS
        }
        if self.data.validation == "first_shard":
            shards["validation"], shards["train"] = shards["train"][:1], shards["train"][1:]
        self._refuse_empty(shards)
        hashes = {split: self._hashes(shards[split]) for split in SPLITS}
        if self.data.validation == "first_shard":
            # The file is renamed when the dataset is complete.
            shards["validation"][0]["name"] = shards["validation"][0]["name"].replace("train-", "validation-", 1)
        counts = [saved_counts(self._work, unit) or Counts() for unit in range(units)]  # all are finished
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": {"name": self.sources[0].name, "identity": identity},
            "request": self.request,
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "sha256": sha256_of(self._work / TOKENIZER),
            },
            "dtype": plan.dtype,
            "documents": sum(count.documents for count in counts),
            "blank_documents": sum(count.blank for count in counts),
            "bad_rows": sum(count.bad for count in counts),
            "duplicates_removed": sum(count.duplicates for count in counts),
            "duplicates": int(_repeats(np.concatenate([hashes[split] for split in SPLITS])).sum()),
            "validation_documents_in_train": int(np.isin(hashes["validation"], hashes["train"]).sum()),
            "splits": {split: _totals(shards[split]) for split in SPLITS},
        }

    def _refuse_empty(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        first_shard = self.data.validation == "first_shard"
        if shards["train"] and shards["validation"] and not (first_shard and shards["validation"][0]["is_split"]):
            return
        shutil.rmtree(self._work)
        name = self.sources[0].location
        if not shards["train"]:
            hint = "lower data.shard_tokens, or set data.validation = fraction" if first_shard else "use more text"
            raise UserError(f"{name} has no text left for training after the validation split; {hint}")
        if not shards["validation"]:
            raise UserError(
                f"{self.sources[-1].location} has no document left for validation; raise data.validation_fraction, "
                "or set data.validation_source"
            )
        raise UserError(f"the first document of {name} is larger than a shard; raise data.shard_tokens")

    def _hashes(self, shards: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.uint64]:
        """The hash of each document (documents,) that starts in these shards."""
        indexes = [read_index(index_path(self._work / shard["name"]))["hash"] for shard in shards]
        return np.concatenate([*indexes, np.empty(0, dtype="<u8")])

    def _publish(self) -> None:
        """Remove the files that are not part of the dataset, and rename the directory. Repeatable after a kill."""
        manifest = json.loads((self._work / MANIFEST).read_bytes())
        kept = files_of(manifest)
        for name in kept:
            if not (self._work / name).exists():
                os.replace(self._work / name.replace("validation-", "train-", 1), self._work / name)
        for path in self._work.iterdir():
            if path.name not in kept:
                path.unlink()
        flush_to_disk(self._work)
        if self.directory.exists():
            _remove_dataset(self.directory)
        os.replace(self._work, self.directory)
        flush_to_disk(self.directory.parent)


def _remove_dataset(directory: Path) -> None:
    """Remove a dataset, its manifest last: what a kill leaves is still recognised as a dataset and may be replaced."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST:
            path.unlink()
    shutil.rmtree(directory)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _totals(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A split's part of the manifest."""
    sums = {key: sum(shard[key] for shard in shards) for key in ("characters", "bytes", "tokens", "documents")}
    return {**sums, "shards": [{key: value for key, value in shard.items() if key != "is_split"} for shard in shards]}


def _repeats(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether each hash (N,) occurred before."""
    repeated = np.ones(len(hashes), dtype=np.bool_)
    # A range of values at a time, as sorting takes several times the memory of what it sorts.
    ranges = max(1, len(hashes) >> 24)
    for number in range(ranges):
        chosen = np.flatnonzero(hashes % np.uint64(ranges) == number)
        repeated[chosen[np.unique(hashes[chosen], return_index=True)[1]]] = False
    return repeated


def _summary(manifest: Mapping[str, Any]) -> str:
    """What was prepared and left out, in a few lines."""
    splits = manifest["splits"]
    characters = sum(splits[split]["characters"] for split in SPLITS)
    tokens = ", ".join(f"{splits[split]['tokens']:,} tokens for {split}" for split in SPLITS)
    name, documents = manifest["source"]["name"], manifest["documents"]
    lines = [f"prepared {name}: {documents:,} documents, {characters:,} characters, {tokens}"]
    for key, text in (
        ("blank_documents", "blank documents are left out"),
        ("bad_rows", "rows without text are left out (--skip-bad)"),
        ("duplicates_removed", "duplicate documents are left out (--deduplicate)"),
    ):
        if manifest[key]:
            lines.append(f"{manifest[key]:,} {text}")
    if manifest["duplicates"] and not manifest["duplicates_removed"]:
        lines.append(
            f"{manifest['duplicates']:,} documents are duplicates (--deduplicate removes them); "
            f"{manifest['validation_documents_in_train']:,} validation documents are also in the training split"
        )
    return "\n".join(lines)
