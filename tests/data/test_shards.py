"""Shards: whole documents, indexes, and the same files no matter how often the writer was stopped."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.data import shards
from glassgpt.data.shards import (
    INDEX_DTYPE,
    Encoded,
    ShardWriter,
    count_repeats,
    finished_shards,
    index_path,
    read_index,
    text_hash,
)
from glassgpt.utils.files import sha256_of
from prepare_harness import contents

# A document is a list of the lengths of its parts in characters. A character is one token; each document has one more.
Documents = list[list[int]]
documents_in_parts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=12)
limits = st.integers(1, 30)


def parts_of(documents: Documents) -> Iterator[tuple[int, str, np.ndarray, bool]]:
    """Yield the document's number, the text, the ids and whether a document begins for each part. All ids differ."""
    token = 0
    for number, lengths in enumerate(documents):
        for part, length in enumerate(lengths):
            text = "".join(chr(0x100 + token + i) for i in range(length))
            ids = np.arange(token, token + length + (part == 0), dtype=np.uint32)
            token += len(ids)
            yield number, text, ids, part == 0


def write(folder: Path, documents: Documents, limit: int, upto: int | None = None, batch: int = 1) -> None:
    """Write shards as a work unit does, skipping finished documents. Stop after `upto` parts, as a kill would.

    Up to `batch` documents are added at once, the last of which may have further parts.
    """
    writer = ShardWriter(folder, "train-00000", "uint16", limit)
    held: list[tuple[str, np.ndarray]] = []

    def add(begins: bool) -> None:
        if held:
            offsets = np.cumsum([0, *(len(ids) for _, ids in held)])
            writer.add(Encoded(np.concatenate([ids for _, ids in held]), offsets, [text for text, _ in held], begins))
        held.clear()

    for i, (number, text, ids, begins) in enumerate(parts_of(documents)):
        if i == upto:
            return writer.abandon()
        if not begins or len(held) == batch:
            add(True)
        if number >= writer.done:
            held.append((text, ids))
        if not begins:
            add(False)
    add(True)
    writer.close()


@settings(deadline=None, max_examples=25)
@given(documents=documents_in_parts, limit=limits, batch=st.integers(1, 12))
def test_a_document_is_whole_in_one_shard_unless_it_is_larger(documents: Documents, limit: int, batch: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, documents, limit, batch=batch)
        shards = finished_shards(folder, "train-00000")
        tokens = [np.fromfile(folder / shard["name"], "<u2") for shard in shards]
        starts = [read_index(index_path(folder / shard["name"]))["start"].astype(int) for shard in shards]
    lengths = [1 + sum(parts) for parts in documents]
    assert np.concatenate(tokens).tolist() == list(range(sum(lengths)))
    assert all(0 < len(shard) <= limit for shard in tokens)
    first_tokens = [shard[position] for shard, positions in zip(tokens, starts, strict=True) for position in positions]
    firsts = np.cumsum([0, *lengths[:-1]])
    assert first_tokens == firsts.tolist()
    for first, length in zip(firsts, lengths, strict=True):
        holding = [i for i, shard in enumerate(tokens) if shard[0] < first + length and first <= shard[-1]]
        assert len(holding) == 1 or length > limit
    # No shard ends while the next document still fits.
    for shard, following in itertools.pairwise(tokens):
        if following[0] in firsts:
            assert len(shard) + lengths[firsts.tolist().index(following[0])] > limit
    assert [shard["documents"] for shard in shards] == [len(positions) for positions in starts]
    text = "".join(part for _, part, _, _ in parts_of(documents))
    assert sum(shard["characters"] for shard in shards) == len(text)
    assert sum(shard["bytes"] for shard in shards) == len(text.encode())


@settings(deadline=None, max_examples=25)
@given(
    documents=documents_in_parts, limit=limits, stops=st.lists(st.integers(0, 40), max_size=3), batch=st.integers(1, 12)
)
def test_a_writer_that_is_stopped_or_gets_several_documents_at_once_writes_the_same_files(
    documents: Documents, limit: int, stops: list[int], batch: int
) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        write(Path(one), documents, limit)
        for stop in stops:
            write(Path(two), documents, limit, upto=stop, batch=batch)
        write(Path(two), documents, limit, batch=batch)
        assert contents(Path(one)) == contents(Path(two))


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
    write(tmp_path, [[4], [4], [4], [4]], limit=5, upto=3)
    first = tmp_path / "train-00000-00000.bin"
    before = first.stat()
    write(tmp_path, [[4], [4], [4], [4]], limit=5)
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert len(finished_shards(tmp_path, "train-00000")) == 4


def test_the_entry_of_a_shard_describes_its_files(tmp_path: Path) -> None:
    write(tmp_path, [[3, 2], [1]], limit=100)
    (entry,) = finished_shards(tmp_path, "train-00000")
    path = tmp_path / entry["name"]
    assert (entry["tokens"], entry["documents"], entry["is_split"]) == (8, 2, False)
    assert (entry["sha256"], entry["index_sha256"]) == (sha256_of(path), sha256_of(index_path(path)))


def test_repeated_hashes_are_counted_a_range_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, paths = np.random.default_rng(0), []
    for number, count in enumerate((40, 0, 25, 30)):
        entries = np.zeros(count, dtype=INDEX_DTYPE)
        # From the whole range of 64 bits.
        entries["hash"] = draw.choice(np.linspace(0, 2**64 - 2**12, 60).astype(np.uint64), count)
        paths.append(tmp_path / f"{number}.idx")
        paths[-1].write_bytes(entries.tobytes())
    train, validation = (
        [hash for path in part for hash in read_index(path)["hash"]] for part in (paths[:2], paths[2:])
    )
    expected = (95 - len({*train, *validation}), sum(hash in train for hash in validation))
    for compared in (1, 7, 1 << 22):
        monkeypatch.setattr(shards, "_COMPARED", compared)
        assert count_repeats(paths[:2], paths[2:]) == expected


def test_a_document_is_hashed_part_by_part(tmp_path: Path) -> None:
    assert text_hash(b"one") == text_hash(b"one")
    assert len({text_hash(b"one"), text_hash(b"two"), text_hash(b""), text_hash(b"one", text_hash(b"two"))}) == 4
    write(tmp_path, [[3, 2], [1]], limit=100)
    first, second, third = (text.encode() for _, text, _, _ in parts_of([[3, 2], [1]]))
    hashes = read_index(tmp_path / "train-00000-00000.idx")["hash"].tolist()
    assert hashes == [text_hash(second, text_hash(first)), text_hash(third)]
