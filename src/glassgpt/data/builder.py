"""A dataset in the making: planned once, its groups of files done in any order by any number of processes, then put in its place."""

import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.config.schema import DataConfig
from glassgpt.data.dataset import FORMAT, MANIFEST, VERSION, files_of, read_manifest
from glassgpt.data.dedup import has_hashes, mark_duplicates, repeats
from glassgpt.data.plan import Plan, Planner
from glassgpt.data.progress import Log, Meter
from glassgpt.data.readers import reading_of
from glassgpt.data.shards import SPLITS, TOKENIZER, finished_shards, index_path, read_index
from glassgpt.data.source_files import SourceFile, fetch_all
from glassgpt.data.sources import Source
from glassgpt.data.work_units import group_record, shard_prefix
from glassgpt.data.workers import run_groups
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import PARTIAL_PREFIX, explain_os_errors, flush_to_disk, sha256_of, write_atomic

# What the directory is made for, while it is made: for anything else it is made anew.
_ORDER = "order.json"
# What is worth keeping when the making stops: shards, and the hashes by which duplicates are found.
_FINISHED = (*(f"{split}-*.json" for split in SPLITS), "hashes-*.bin")
# Bytes of files up to which a second process would cost more than it brings.
_SMALL = 1 << 24


class Making:
    """One dataset in the making, in a directory beside its place, where a later call finds what a killed one has finished.

    `sources` are the text, and, where validation has a source of its own, that.
    """

    def __init__(
        self,
        directory: Path,
        sources: Sequence[Source],
        data: DataConfig,
        tokenizer: Tokenizer | None,
        request: Mapping[str, Any],
        log: Log,
    ) -> None:
        self._directory, self._work = directory, directory.with_name(f"{PARTIAL_PREFIX}{directory.name}")
        self._sources, self._data, self._tokenizer, self._request, self._log = sources, data, tokenizer, request, log

    def run(self, workers: int | None) -> None:
        """Make the dataset and put it in its place, with so many processes, or as many as it is worth.

        Raises `UserError` for what is wrong with the text.
        """
        # Before reading: a file that changes in between is then found out.
        identity = [source.identity() for source in self._sources]
        with explain_os_errors("write", self._directory):
            try:
                if not self._is_ready(identity):
                    self._prepare(identity, workers)
                self._publish()
            except BaseException:
                if any(path for pattern in _FINISHED for path in self._work.glob(pattern)):
                    self._log(
                        "what is finished is kept: the same command goes on from there, as long as the text is the same"
                    )
                else:
                    shutil.rmtree(self._work, ignore_errors=True)
                raise

    def _is_ready(self, identity: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an earlier call has made just this, and was killed before it was in its place."""
        manifest = read_manifest(self._work)
        return manifest is not None and self._is_ours(manifest["request"], manifest["source"]["identity"], identity)

    def _is_ours(
        self, request: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]], identity: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Whether a request and its text, recorded earlier, are the ones of now."""
        same = [source.same_text(old, new) for source, old, new in zip(self._sources, recorded, identity, strict=False)]
        return request == self._request and len(recorded) == len(identity) and all(same)

    def _begun(self, identity: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an earlier call has begun with just this."""
        try:
            order = json.loads((self._work / _ORDER).read_bytes())
        except (OSError, ValueError):
            return False
        return order.get("version") == VERSION and self._is_ours(order["request"], order["identity"], identity)

    def _prepare(self, identity: Sequence[Mapping[str, Any]], workers: int | None) -> None:
        name = self._sources[0].name
        if self._begun(identity):
            self._log(f"preparing {name}, from where it was left")
        else:
            self._log(f"preparing {name}")
            for passed_over in (source.left_out for source in self._sources):
                if passed_over:
                    names = ", ".join(passed_over[:3]) + (", ..." if len(passed_over) > 3 else "")
                    self._log(f"files of other kinds are passed over: {names}")
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir()
            planner = Planner(
                [(source, source.reading or reading_of(self._data)) for source in self._sources], self._data
            )
            plan, tokenizer = planner.plan(self._tokenizer)
            write_atomic(self._work / TOKENIZER, tokenizer.to_json())
            plan.save(self._work)
            write_atomic(
                self._work / _ORDER, json.dumps({"version": VERSION, "request": self._request, "identity": identity})
            )
        plan = Plan.load(self._work)
        workers = workers or (1 if sum(file.bytes for file in self._files) <= _SMALL else _cores())
        if self._data.deduplicate:
            todo = [number for number in range(len(plan.groups)) if not has_hashes(self._work, number)]
            self._run("hash", plan, todo, workers, "compared")
            mark_duplicates(self._work, len(plan.groups))
        todo = [number for number in range(len(plan.groups)) if group_record(self._work, number) is None]
        self._run("prepare", plan, todo, workers, "prepared")
        self._refuse_changes(identity)
        manifest = self._manifest(plan, identity)
        write_atomic(self._work / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self._log(summary(manifest))

    @property
    def _files(self) -> list[SourceFile]:
        """All files, in the order in which the plan counts them. Made anew: a download that was ended stays so."""
        return [file for source in self._sources for file in source.files()]

    def _refuse_changes(self, identity: Sequence[Mapping[str, Any]]) -> None:
        """Raise `UserError` where a source is not what it was at the beginning: what was made may be of neither."""
        for source, recorded in zip(self._sources, identity, strict=True):
            if not source.is_unchanged(recorded):
                shutil.rmtree(self._work)  # it would never do
                raise UserError(
                    f"{source.location} has changed while it was prepared; give the same command again once it stays as it is"
                )

    def _run(self, task: str, plan: Plan, todo: Sequence[int], workers: int, done: str) -> None:
        """Do a task for these groups, each as soon as its files are there; those of other groups are not fetched."""
        files = self._files
        wanted = [files[plan.groups[n].first_file :][: len(plan.groups[n].files)] for n in todo]
        with closing(fetch_all(list(itertools.chain.from_iterable(wanted)), log=self._log)) as fetched:
            paths = (path for _, path in fetched)
            groups = (
                (number, list(itertools.islice(paths, len(own)))) for number, own in zip(todo, wanted, strict=True)
            )
            run_groups(task, self._work, groups, max(1, min(workers, len(todo))), Meter(self._log, done))

    # --------------------------------------------------------------------------------------------------------- manifest

    def _shards(self, split: str, group: int) -> list[dict[str, Any]]:
        return finished_shards(self._work, shard_prefix(split, group))

    def _manifest(self, plan: Plan, identity: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the manifest says. Raises `UserError` where nothing is left for one of the splits."""
        shards = {
            split: [shard for group in range(len(plan.groups)) for shard in self._shards(split, group)]
            for split in SPLITS
        }
        if self._data.validation == "first_shard":
            shards["validation"], shards["train"] = shards["train"][:1], shards["train"][1:]
        self._refuse_empty(shards)
        hashes = {split: self._hashes(shards[split]) for split in SPLITS}
        if self._data.validation == "first_shard":
            shards["validation"][0]["name"] = _as_validation(shards["validation"][0]["name"])
        records = [
            record for number in range(len(plan.groups)) if (record := group_record(self._work, number)) is not None
        ]
        assert len(records) == len(plan.groups), "all groups are done"
        tokenizer = load_tokenizer(self._work / TOKENIZER)
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": {"name": self._sources[0].name, "identity": identity},
            "request": self._request,
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "sha256": sha256_of(self._work / TOKENIZER),
            },
            "dtype": plan.dtype,
            "documents": sum(record["documents"] for record in records),
            "blank_documents": sum(record["blank"] for record in records),
            "bad_rows": sum(record["bad"] for record in records),
            "duplicates_removed": sum(record["duplicates"] for record in records),
            "duplicates": int(repeats(np.concatenate([hashes[split] for split in SPLITS])).sum()),
            "validation_documents_in_train": int(np.isin(hashes["validation"], hashes["train"]).sum()),
            "splits": {split: _totals(shards[split]) for split in SPLITS},
        }

    def _refuse_empty(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        name, first_shard = self._sources[0].location, self._data.validation == "first_shard"
        if shards["train"] and shards["validation"] and not (first_shard and shards["validation"][0]["unfinished"]):
            return
        shutil.rmtree(self._work)  # it would never do
        if shards["train"] and shards["validation"]:
            raise UserError(
                f"the first document of {name} is larger than a shard, so it would be cut: raise data.shard_tokens"
            )
        if not shards["train"]:
            hint = "lower data.shard_tokens, or set data.validation = fraction (train: --data.validation fraction)"
            raise UserError(
                f"{name} leaves no text to train on beside that for validation; {hint if first_shard else 'give more text'}"
            )
        raise UserError(
            f"no document of {self._sources[-1].location} is left for validation; raise data.validation_fraction, or name another source "
            "for it (data.validation_source)"
        )

    def _hashes(self, shards: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.uint64]:
        """The hash of each document (documents,) that starts in these shards."""
        indexes = [read_index(index_path(self._work / shard["name"]))["hash"] for shard in shards]
        return np.concatenate([*indexes, np.empty(0, dtype="<u8")])

    def _publish(self) -> None:
        """Leave what belongs to a dataset, and give the directory its name. May be repeated after a kill at any point."""
        manifest = json.loads((self._work / MANIFEST).read_bytes())
        kept = files_of(manifest)
        for name in kept:
            if not (self._work / name).exists():
                os.replace(self._work / _as_train(name), self._work / name)
        for path in self._work.iterdir():
            if path.name not in kept:
                path.unlink()
        flush_to_disk(self._work)
        if self._directory.exists():
            _remove_dataset(self._directory)
        os.replace(self._work, self._directory)
        flush_to_disk(self._directory.parent)


def _remove_dataset(directory: Path) -> None:
    """Remove a dataset, its manifest last: what a kill leaves of it is still known for one, and may be replaced."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST:
            path.unlink()
    shutil.rmtree(directory)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The first shard is known for that of validation only when it is there.
def _as_validation(name: str) -> str:
    return name.replace("train-", "validation-", 1)


def _as_train(name: str) -> str:
    return name.replace("validation-", "train-", 1)


def _totals(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A split's part of the manifest."""
    sums = {key: sum(shard[key] for shard in shards) for key in ("characters", "bytes", "tokens", "documents")}
    return {**sums, "shards": [{key: value for key, value in shard.items() if key != "unfinished"} for shard in shards]}


def summary(manifest: Mapping[str, Any]) -> str:
    """What was made, and what was left out, in a few lines."""
    splits = manifest["splits"]
    characters = sum(splits[split]["characters"] for split in SPLITS)
    counts = ", ".join(f"{splits[split]['tokens']:,} tokens for {split}" for split in SPLITS)
    lines = [
        f"prepared {manifest['source']['name']}: {manifest['documents']:,} documents, {characters:,} characters, {counts}"
    ]
    if manifest["blank_documents"]:
        lines.append(f"{manifest['blank_documents']:,} documents have no text and are left out")
    if manifest["bad_rows"]:
        lines.append(f"{manifest['bad_rows']:,} rows that are no text are left out, as --skip-bad asks")
    if manifest["duplicates_removed"]:
        lines.append(f"{manifest['duplicates_removed']:,} documents that repeat an earlier one are left out")
    elif manifest["duplicates"]:
        lines.append(
            f"{manifest['duplicates']:,} documents repeat an earlier one (--deduplicate leaves them out); "
            f"{manifest['validation_documents_in_train']:,} documents of the validation split are in the training split too"
        )
    return "\n".join(lines)
