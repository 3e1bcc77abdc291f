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
from glassgpt.data.dataset import FORMAT, MANIFEST, VERSION, files_of, read_manifest, remember_hashes
from glassgpt.data.progress import Log, ProgressLine
from glassgpt.data.shards import SPLITS, TOKENIZER, finished_shards, index_path, read_index
from glassgpt.data.source_files import fetch_all
from glassgpt.data.sources import Source
from glassgpt.data.work_units import (
    Hashes,
    Plan,
    WorkUnit,
    counts_path,
    hash_unit,
    make_plan,
    prepare_unit,
    shard_prefix,
)
from glassgpt.data.workers import run_tasks
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import PARTIAL_PREFIX, flush_to_disk, write_atomic
from glassgpt.utils.formatting import format_bytes

R = TypeVar("R")
Shards = Mapping[str, list[dict[str, Any]]]

# The beginning of the manifest, while the dataset is built: a build resumes only for the same request and text.
_PURPOSE = "build.json"
_DUPLICATES = "duplicates.npz"
# Files worth keeping if a build stops.
_KEPT = (*(f"{split}-*.json" for split in SPLITS), _DUPLICATES)
_SMALL = 1 << 24  # bytes of files up to which starting a second process costs more than it saves
# Counts in the manifest of what is left out.
_LEFT_OUT = {
    "blank_documents": "blank documents are left out",
    "bad_rows": "rows without text are left out (--skip-bad)",
    "duplicates_removed": "duplicate documents are left out (--deduplicate)",
}


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
        """Build the dataset with this many processes (default: one per core, if it is large) and move it into place."""
        # The sources' identity before reading, so that a file that changes meanwhile is noticed.
        source = {"name": self.sources[0].name, "identity": [source.identity() for source in self.sources]}
        purpose = {"format": FORMAT, "version": VERSION, "source": source, "request": self.request}
        try:
            manifest = read_manifest(self._work)  # if an earlier build was killed while it moved it into place
            earlier = manifest or read_manifest(self._work, _PURPOSE)
            is_resumed = earlier is not None and _is_same(earlier, purpose)
            if not is_resumed or manifest is None:
                self._prepare(purpose, is_resumed, workers)
            self._publish()
            if not is_resumed:  # nothing is known about files that lay on the disk meanwhile
                remember_hashes(self.directory)
        except BaseException:
            if any(path for pattern in _KEPT for path in self._work.glob(pattern)):
                self.log("finished files are kept: the same command resumes while the text is unchanged")
            else:
                shutil.rmtree(self._work, ignore_errors=True)
            raise

    def _prepare(self, purpose: Mapping[str, Any], is_resumed: bool, workers: int | None) -> None:
        """Write all files of the dataset, the manifest last."""
        self.log(f"preparing {self.sources[0].name}{': resuming' if is_resumed else ''}")
        if not is_resumed:
            for names in (source.left_out for source in self.sources if source.left_out):
                more = ", ..." if len(names) > 3 else ""
                self.log(f"files of other types are left out: {', '.join(names[:3])}{more}")
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir()
        own_tokenizer = load_tokenizer(self._work / TOKENIZER) if is_resumed else self.tokenizer
        plan, units, tokenizer = make_plan(self._work, self.sources, self.data, own_tokenizer)
        if not is_resumed:
            write_atomic(self._work / TOKENIZER, tokenizer.to_json())
            write_atomic(self._work / _PURPOSE, json.dumps(purpose))
        size = sum(file.bytes for source in self.sources for file in source.files())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = workers or (1 if size <= _SMALL else cores)
        if self.data.deduplicate:
            units = self._with_duplicates(plan, units, workers)
        unfinished = [unit for unit in units if not counts_path(self._work, unit.number).is_file()]
        self._run(prepare_unit, plan, unfinished, workers)
        shards = {
            split: [each for unit in units for each in finished_shards(self._work, shard_prefix(split, unit.number))]
            for split in SPLITS
        }
        if self.data.validation == "first_shard":
            shards["validation"], shards["train"] = shards["train"][:1], shards["train"][1:]
        if problem := self._find_problem(shards, purpose["source"]["identity"]):
            shutil.rmtree(self._work)
            raise UserError(problem)
        counts = [json.loads(counts_path(self._work, unit.number).read_bytes()) for unit in units]
        manifest = {**purpose, **self._content(plan, tokenizer, shards, counts)}
        write_atomic(self._work / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self.log(_summary(manifest))

    def _with_duplicates(self, plan: Plan, units: Sequence[WorkUnit], workers: int) -> list[WorkUnit]:
        """The units with their duplicates: documents with the text of an earlier one of any unit."""
        path = self._work / _DUPLICATES
        if not path.is_file():
            hashes = self._run(hash_unit, plan, units, workers)
            repeated = np.split(_repeats(np.concatenate(hashes)), np.cumsum([len(part) for part in hashes])[:-1])
            np.savez(content := io.BytesIO(), *repeated)
            write_atomic(path, content.getvalue())
        with np.load(path) as saved:
            return [replace(unit, duplicates=saved[f"arr_{unit.number}"]) for unit in units]

    def _run(self, task: Callable[..., R], plan: Plan, units: Sequence[WorkUnit], workers: int) -> list[R]:
        """Call a task for each unit with its files, as soon as they are present."""
        # New objects: a cancelled one stays so.
        files = [file for source in self.sources for file in source.files()]
        wanted = [file for unit in units for file in files[unit.first_file : unit.first_file + len(unit.files)]]
        progress, before = ProgressLine(self.log), self._bytes_written()

        def message(seconds: float) -> str:
            if task is hash_unit:
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
        """Why the shards are no dataset: the text changed meanwhile, or a split is empty. None if they are."""
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

    def _content(
        self, plan: Plan, tokenizer: Tokenizer, shards: Shards, counts: Sequence[Mapping[str, int]]
    ) -> dict[str, Any]:
        """What the manifest says about the files."""
        train, validation = (
            np.concatenate([read_index(index_path(self._work / shard["name"]))["hash"] for shard in shards[split]])
            for split in SPLITS
        )
        if self.data.validation == "first_shard":
            # The file is renamed when the dataset is complete.
            shards["validation"][0]["name"] = shards["validation"][0]["name"].replace("train-", "validation-", 1)
        return {
            "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
            "dtype": plan.dtype,
            "documents": sum(count["documents"] for count in counts),
            "blank_documents": sum(count["blank"] for count in counts),
            "bad_rows": sum(count["bad"] for count in counts),
            "duplicates_removed": sum(count["duplicates"] for count in counts),
            "duplicates": int(_repeats(np.concatenate([train, validation])).sum()),
            "validation_documents_in_train": int(np.isin(validation, train).sum()),
            "splits": {split: _totals(shards[split]) for split in SPLITS},
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


def _is_same(earlier: Mapping[str, Any], purpose: Mapping[str, Any]) -> bool:
    """Whether an earlier build had the same request and the same text."""
    texts = [[text_identity(each) for each in build["source"]["identity"]] for build in (earlier, purpose)]
    return bool(earlier["request"] == purpose["request"] and texts[0] == texts[1])


def text_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what does not change the text: files' times, and the commit, as most change other files."""
    files = [{**file, "mtime_ns": None} for file in identity.get("files", [])]
    return {**identity, "commit": None, "files": files}


def _totals(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A split's part of the manifest."""
    sums = {key: sum(shard[key] for shard in shards) for key in ("characters", "bytes", "tokens", "documents")}
    return {**sums, "shards": [{key: value for key, value in shard.items() if key != "is_split"} for shard in shards]}


def _repeats(hashes: Hashes) -> npt.NDArray[np.bool_]:
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
    lines = [
        f"prepared {name}: {documents:,} documents, {characters:,} characters, {tokens}",
        *(f"{manifest[key]:,} {text}" for key, text in _LEFT_OUT.items() if manifest[key]),
    ]
    if manifest["duplicates"] and not manifest["duplicates_removed"]:
        lines.append(
            f"{manifest['duplicates']:,} documents are duplicates (--deduplicate removes them); "
            f"{manifest['validation_documents_in_train']:,} validation documents are also in the training split"
        )
    return "\n".join(lines)
