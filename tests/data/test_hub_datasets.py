"""Datasets of the Hugging Face Hub, served by a local stand-in.

The calls run in subprocesses, because huggingface_hub reads its environment variables at import.
"""

import glob
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glassgpt.data.builder import text_identity
from glassgpt.data.hub_datasets import choose_subset, folder_of, format_of, matches, splits_by_name, subsets_of
from glassgpt.utils.errors import UserError
from hub_server import Fault, HubServer, Repository, claim, flip, hub, refuse, silence, stall, too_much, truncate

FINEWEB = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb
"""


def content(name: str, size: int = 100_000) -> bytes:
    """Return `size` bytes derived from the name, so that every file has different content."""
    return hashlib.shake_128(name.encode()).digest(size)


def fineweb() -> Repository:
    names = [f"sample/10BT/{i:03}_00000.parquet" for i in range(3)] + [
        f"data/CC-MAIN-2024-{i}/train-0.parquet" for i in (18, 10)
    ]
    return Repository(
        {"main": {"README.md": FINEWEB.encode(), ".gitattributes": b"*", **{name: content(name) for name in names}}}
    )


# ---------------------------------------------------------------------------------------------------------- which files


@pytest.mark.parametrize(
    "data_files",
    ["a/*.csv", ["a/*.csv"], {"train": "a/*.csv"}, {"train": ["a/*.csv"]}, [{"split": "train", "path": ["./a/*.csv"]}]],
)
def test_all_documented_forms_of_data_files_mean_the_same(data_files: object) -> None:
    (subset,) = subsets_of({"configs": [{"config_name": "x", "data_files": data_files}]}, "acme/x")
    assert subset.patterns == {"train": ("a/*.csv",)}


def test_paths_of_a_subset_are_relative_to_its_data_dir() -> None:
    configs = [{"config_name": 2024, "data_dir": "d/", "data_files": "*.csv"}, {"config_name": "y", "data_dir": "e"}]
    first, second = subsets_of({"configs": configs}, "acme/x")
    assert (first.name, first.patterns) == ("2024", {"train": ("d/*.csv",)})
    assert (second.folder, second.patterns) == ("e", None)


@pytest.mark.parametrize(
    "configs",
    [
        "x",
        ["x"],
        [{"data_files": "a"}],
        [{"config_name": "x", "data_files": [{"split": "train"}]}],
        [{"config_name": "x", "data_files": {"train": 3}}],
        [{"config_name": "x", "data_files": []}],
        [{"config_name": "x", "data_files": "https://example.org/a.csv"}],
        [{"config_name": "x", "data_files": "../a.csv"}],
        [{"config_name": "x", "data_dir": "../../etc"}],
    ],
)
def test_undocumented_metadata_is_refused(configs: object) -> None:
    with pytest.raises(UserError, match="acme/x"):
        subsets_of({"configs": configs}, "acme/x")


def test_the_default_subset_is_the_marked_one_or_named_default_or_the_only_one() -> None:
    def chosen(*configs: dict[str, Any]) -> str | None:
        return choose_subset(subsets_of({"configs": list(configs)}, "acme/x"), None, "acme/x").name

    a, b, default = ({"config_name": name, "data_files": "*"} for name in ("a", "b", "default"))
    assert chosen(a) == "a"
    assert chosen(a, default) == "default"
    assert chosen(a, b | {"default": True}, default) == "b"
    with pytest.raises(UserError, match="a, b"):
        chosen(a, b)


def test_patterns_match_the_same_files_as_glob(tmp_path: Path) -> None:
    """The reference is Python's `glob` on real files, without the Hub's own rule that `__` hides a file."""
    names = [
        "a.csv",
        "b.txt",
        "data/a.csv",
        "data/x/a.csv",
        "data/x/y/b.csv",
        ".h/a.csv",
        "data/.a.csv",
        "data/x1/a[1].csv",
        "d/a.csv",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = """* *.csv ** **/*.csv data/* data/** data/*/* data/**/a.csv data/x?/* d*/[ab].csv .h/* .*/* data/.*
        **/a.csv data/x/**/b.csv [!a].txt d?ta/*.csv data/x1/a[[]1].csv nothing/* data *.CSV"""
    for pattern in patterns.split():
        expected = {
            name for name in glob.glob(pattern, root_dir=tmp_path, recursive=True) if (tmp_path / name).is_file()
        }
        assert {name for name in names if matches(name, pattern)} == expected, pattern
        folder, below = folder_of(pattern)
        assert all(name.startswith(folder) and (below or "/" not in name[len(folder) + 1 :]) for name in expected), (
            pattern
        )


@pytest.mark.parametrize(
    ("names", "folder", "splits"),
    [
        (["train.csv", "test.csv", "LICENSE"], "", {"train": ["train.csv"], "test": ["test.csv"]}),
        (["my_train_file-1.txt", "dev.txt"], "", {"train": ["my_train_file-1.txt"], "validation": ["dev.txt"]}),
        (["training/a.jsonl", "valid/b.jsonl"], "", {"train": ["training/a.jsonl"], "validation": ["valid/b.jsonl"]}),
        (
            ["data/train-00000-of-00002-2d5a.parquet", "extra-train.txt"],
            "",
            {"train": ["data/train-00000-of-00002-2d5a.parquet"]},
        ),
        (["data/odd-00000-of-00001.parquet"], "", {"odd": ["data/odd-00000-of-00001.parquet"]}),
        (
            ["en/c4-train.00000-of-01024.json.gz", "de/c4-train.00000.json.gz"],
            "en",
            {"train": ["en/c4-train.00000-of-01024.json.gz"]},
        ),
        (["b.csv", "a.csv.zst", ".c.csv", "constrained.md"], "", {"train": ["a.csv.zst", "b.csv"]}),
        (["trained.csv"], "", {"train": ["trained.csv"]}),
        (["a.py", "dataset_infos.json"], "", {}),
    ],
)
def test_splits_are_inferred_from_file_names(names: list[str], folder: str, splits: dict[str, list[str]]) -> None:
    assert splits_by_name(names, folder) == splits


def test_the_format_is_inferred_from_the_suffix() -> None:
    formats = {
        name: format_of(f"x/{name}")
        for name in ("a.PARQUET", "a.json.gz", "a.b.csv.bz2", "a.txt", "a.zip", "a.gz", "README", "config.json")
    }
    assert list(formats.values()) == ["parquet", "jsonl", "csv", "txt", None, None, None, None]


# ------------------------------------------------------------------------------------------------------------- the hub

PRELUDE = """
import json, sys, threading
from pathlib import Path
from glassgpt.utils import hub
from glassgpt.data.hub_datasets import HubSource
from glassgpt.data.source_files import fetch_all
from glassgpt.utils.errors import UserError
hub._PAUSE = 0.05
lines = []
def outcome(call):
    try:
        return call()
    except UserError as error:
        return f"error: {error}"
def find_dataset(hub_id, subset=None, split="train"):
    source = HubSource(f"{hub_id}:{subset or ''}:{split}")
    source.files()
    return source
def fetch(*asked):
    files = find_dataset(*asked).files()
    return {file.name: str(path) for file, path in fetch_all(files, log=lines.append, every=0.0)}
"""


def environment(server: HubServer, home: Path, **more: str) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    return (
        {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and key != "HF_TOKEN"}
        | own
        | more
    )


def run(code: str, server: HubServer, home: Path, **more: str) -> Any:
    """Run the code in a process that uses the server as its Hub, and return the JSON that it prints."""
    command = [sys.executable, "-c", PRELUDE + code]
    result = subprocess.run(command, env=environment(server, home, **more), capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def server() -> Iterator[HubServer]:
    english, german = (
        "config_name: en\n  data_files: [b.jsonl, '*.jsonl']",
        "config_name: de\n  data_files: {train: de/*, dev: dev/*}",
    )
    configs = f"---\nconfigs:\n- {english}\n- {german}\n---\n"
    two = {
        "README.md": configs.encode(),
        "b.jsonl": b"{}\n",
        "a.jsonl": content("a"),
        "de/a.csv": content("de"),
        "de/LICENSE": b"free",
    }
    shards = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")
    stories = {**{f"data/{shard}-2d.parquet": content(shard) for shard in shards}, "V2-train.txt": b"x"}
    script = {"README.md": b"no metadata", "script.py": b"import os", "raw.zip": b"zip"}
    converted = {"plain/train/0000.parquet": content("c0"), "plain/train/0001.parquet": content("c1")}
    repositories = {
        "acme/fineweb": fineweb(),
        "acme/two": Repository({"main": two}, small={"README.md", "b.jsonl", "de/LICENSE"}),
        "acme/stories": Repository({"main": stories}, page=2),
        "acme/script": Repository({"main": script, "refs/convert/parquet": converted}),
        "acme/large": Repository(
            {"main": script, "refs/convert/parquet": {"plain/partial-train/0000.parquet": content("c0")}}
        ),
        "acme/nothing": Repository({"main": script}),
        "acme/broken": Repository({"main": {"README.md": b"---\nconfigs: [\n---\n"}}),
        "acme/gated": Repository({"main": {"a.jsonl": content("a")}}, token="hf_secret"),
    }
    with hub(repositories) as server:
        yield server


def test_a_dataset_resolves_to_a_list_of_files_at_a_commit(server: HubServer, home: Path) -> None:
    resolved = run(
        """
calls = [("acme/fineweb", "sample-10BT"), ("acme/fineweb",), ("acme/two", "en"), ("acme/two", "de")]
calls += [("acme/stories",), ("acme/stories", None, "validation"), ("acme/script",)]
datasets = [find_dataset(*call) for call in calls]
files = [[[file.name, file.bytes] for file in dataset.files()] for dataset in datasets]
print(json.dumps([{**d.identity(), "left_out": d.left_out, "as": each} for d, each in zip(datasets, files)]))
""",
        server,
        home,
    )
    names = [[file["name"] for file in each["files"]] for each in resolved]
    assert names == [
        [f"sample/10BT/{i:03}_00000.parquet" for i in range(3)],
        ["data/CC-MAIN-2024-10/train-0.parquet", "data/CC-MAIN-2024-18/train-0.parquet"],
        ["b.jsonl", "a.jsonl"],
        ["de/a.csv"],
        ["data/train-00000-of-00002-2d.parquet", "data/train-00001-of-00002-2d.parquet"],
        ["data/validation-00000-of-00001-2d.parquet"],
        ["plain/train/0000.parquet", "plain/train/0001.parquet"],
    ]
    sample, english, converted = resolved[0], resolved[2], resolved[-1]
    assert (sample["repository"], sample["subset"], sample["split"]) == ("acme/fineweb", "sample-10BT", "train")
    assert sample["commit"] == server.repositories["acme/fineweb"].commit("main")
    assert converted["commit"] == server.repositories["acme/script"].commit("refs/convert/parquet")
    name = "sample/10BT/000_00000.parquet"
    sha256 = hashlib.sha256(content(name)).hexdigest()
    assert sample["files"][0] == {"name": name, "bytes": 100_000, "sha256": sha256}
    assert sample["as"][0] == [name, 100_000]
    assert english["files"][0] == {
        "name": "b.jsonl",
        "bytes": 3,
        "sha256": None,
        "git_sha1": hashlib.sha1(b"blob 3\0{}\n").hexdigest(),
    }
    assert resolved[3]["left_out"] == ["de/LICENSE"]
    # Only the subset's folder is listed, because a corpus has tens of thousands of files.
    assert server.requests_to("fineweb/tree")[0].path.endswith("/sample/10BT")


def test_an_error_about_an_unknown_name_lists_the_existing_ones(server: HubServer, home: Path) -> None:
    facts = {
        '"acme/fineweb", "sample-10B"': ("'sample-10B'", "default, sample-10BT", "did you mean 'sample-10BT'?"),
        '"acme/fineweb", None, "trian"': ("'trian'", "did you mean 'train'?"),
        '"acme/two"': ("en, de",),
        '"acme/two", "de", "dev"': ("'de'", "'dev'", ".parquet, .jsonl, .csv or .txt"),
        '"acme/stories", "data1"': ("'data1'", "only data"),
        '"acme/large"': ("the hub's conversion", "has only the first part of the split 'train'"),
        '"acme/nothing"': ("README.md, raw.zip, script.py",),
        '"acme/broken"': ("README.md of acme/broken",),
        '"acme/none"': ("acme/none", "HF_TOKEN"),
    }
    calls = ", ".join(f"({each},)" for each in facts)
    answers = run(f"print(json.dumps([outcome(lambda: find_dataset(*asked)) for asked in [{calls}]]))", server, home)
    for answer, expected in zip(answers, facts.values(), strict=True):
        assert answer.startswith("error: ")
        assert all(fact in answer for fact in expected), answer
        assert len(answer.splitlines()) <= 2


FAULTY = """
dataset = find_dataset("acme/faulty")
print(json.dumps([{file.name: str(path) for file, path in fetch_all(dataset.files(), log=lines.append)}, lines]))
"""


@pytest.mark.slow
def test_downloaded_files_are_complete_despite_server_faults(home: Path) -> None:
    """Each file meets another fault of the server; in the end, huggingface_hub finds all files in its cache."""
    faults: dict[str, list[Fault]] = {
        "truncated": [truncate(30_000)],
        "stalled": [stall(30_000)],
        "longer": [claim(1000)],
        "shorter": [claim(-1000)],
        "too-much": [too_much],
        "flipped": [flip],
        "limited": [refuse(429, retry_after="0")],
        "broken": [refuse(500), refuse(503), refuse(502)],
    }
    files = {f"{name}.jsonl": content(name) for name in faults}
    with hub({"acme/faulty": Repository({"main": files}, {"flipped.jsonl", "truncated.jsonl"})}) as server:
        server.faults = {f"{name}.jsonl": list(each) for name, each in faults.items()}
        server.faults |= {"api": [refuse(503), silence, refuse(429, retry_after="0")]}
        paths, lines = run(FAULTY, server, home)
        assert list(paths) == sorted(files)
        assert all(Path(path).read_bytes() == files[name] for name, path in paths.items())
        assert not any(server.faults.values())
        assert lines[-1].startswith("downloaded 800.0 kB of 8 files")
        cached = run(
            """
from huggingface_hub import hf_hub_download, scan_cache_dir
dataset = find_dataset("acme/faulty")
where = {"repo_type": "dataset", "revision": dataset.dataset.commit, "local_files_only": True}
paths = [hf_hub_download(dataset.dataset.hub_id, file.name, **where) for file in dataset.files()]
(repository,) = scan_cache_dir().repos
print(json.dumps([paths, repository.repo_id, repository.size_on_disk]))
""",
            server,
            home,
        )
        assert cached == [list(paths.values()), "acme/faulty", 800_000]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_leaves_only_complete_files(server: HubServer, home: Path, ending: signal.Signals) -> None:
    """The process ends within 20 s though the server sends nothing; the next one fetches only the missing file."""
    server.faults["sample/10BT/002_00000.parquet"] = [stall(60_000)]
    code = PRELUDE + 'fetch("acme/fineweb", "sample-10BT")'
    more = {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(server, home, **more), stderr=subprocess.DEVNULL
    ) as process:
        blobs = home / "hub" / "datasets--acme--fineweb" / "blobs"
        deadline = time.monotonic() + 60
        while not (server.stalled.is_set() and len(complete(blobs)) == 3):  # README.md and two files
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(ending)
        process.wait(20)
    assert len(complete(blobs)) == 3
    before = len(server.requests)
    paths = run('print(json.dumps(fetch("acme/fineweb", "sample-10BT")))', server, home)
    assert len(paths) == 3
    assert all(Path(path).read_bytes() == content(name) for name, path in paths.items())
    assert len([each for each in server.requests[before:] if "cdn" in each.path]) == 1


def complete(blobs: Path) -> list[Path]:
    """Return the completely downloaded files in a folder of the Hub's cache."""
    return [path for path in blobs.glob("*") if path.suffix != ".incomplete"]


def test_the_token_is_sent_only_to_the_hub(server: HubServer, home: Path) -> None:
    """Without a token, the error contains the address of the page to accept the terms of a gated dataset."""
    without = run('print(json.dumps(outcome(lambda: fetch("acme/gated"))))', server, home)
    assert all(fact in without for fact in ("error: ", "acme/gated", f"{server.url}/datasets/acme/gated", "HF_TOKEN"))
    assert len(server.requests_to("a.jsonl")) == 1
    paths = run('print(json.dumps(fetch("acme/gated")))', server, home, HF_TOKEN="hf_secret")
    assert Path(paths["a.jsonl"]).read_bytes() == content("a")
    assert server.requests_to("/resolve/")[-1].authorization == "Bearer hf_secret"
    assert server.requests_to("/cdn/")[-1].authorization is None


def test_a_commit_that_changes_only_other_files_keeps_the_text_identity(server: HubServer, home: Path) -> None:
    """`left_out` lists the files of the split that are not read."""
    code = """
from glassgpt.data.sources import resolve
source = resolve("hf:acme/two:de")
print(json.dumps([source.identity(), source.left_out]))
"""
    first, left_out = run(code, server, home)
    assert left_out == ["de/LICENSE"]
    branches = server.repositories["acme/two"].branches
    branches["main"] = {**branches["main"], "README.md": branches["main"]["README.md"] + b"More."}
    second = run(code, server, home)[0]
    branches["main"] = {**branches["main"], "de/a.csv": b"new"}
    third = run(code, server, home)[0]
    assert first["commit"] != second["commit"]
    assert text_identity(first) == text_identity(second)
    for other in (third, *({**first, key: "other"} for key in ("repository", "subset", "split"))):
        assert text_identity(first) != text_identity(other)


def test_a_registered_dataset_is_looked_up_each_time(server: HubServer, home: Path) -> None:
    """The Hub is asked again even within one process, because the dataset may have changed."""
    code = """
from glassgpt.data import hub_datasets, sources
hub_datasets.HUB_NAMES = {**hub_datasets.HUB_NAMES, "tinystories": ("acme/two", "de")}
print(json.dumps([sources.resolve("tinystories").identity()["commit"] for _ in range(2)]))
"""
    run(code, server, home)
    assert len([each for each in server.requests if each.path == "/api/datasets/acme/two"]) == 2


def test_a_file_that_cannot_be_downloaded_is_named(server: HubServer, home: Path) -> None:
    server.faults["a.jsonl"] = [refuse(404)]
    server.faults["b.jsonl"] = [refuse(503)] * 10
    answers = run(
        """
files = find_dataset("acme/two", "en").files()
print(json.dumps([outcome(lambda: str(file.fetch())) for file in files]))
""",
        server,
        home,
    )
    for answer, name, status, downloads in zip(answers, ("b.jsonl", "a.jsonl"), (503, 404), (4, 1), strict=True):
        assert all(fact in answer for fact in ("error: ", f"{name} of the dataset acme/two", str(status)))
        assert "hf download --repo-type dataset acme/two" in answer
        gets = [each for each in server.requests_to(name) if "/resolve/" not in each.path or name == "b.jsonl"]
        assert len([each for each in gets if each.method == "GET"]) == downloads


def test_without_network_the_cache_is_used(server: HubServer, home: Path) -> None:
    """Offline, the commit that was resolved earlier is read, although the branch has moved."""
    files = server.repositories["acme/fineweb"].branches
    first = run(
        """
dataset = find_dataset("acme/fineweb", "sample-10BT")
print(json.dumps([dataset.identity(), {file.name: str(file.fetch()) for file in dataset.files()}]))
""",
        server,
        home,
    )
    again = """
dataset = outcome(lambda: find_dataset("acme/fineweb", "sample-10BT"))
paths = None if isinstance(dataset, str) else {file.name: str(file.fetch()) for file in dataset.files()}
other = outcome(lambda: find_dataset("acme/stories"))
print(json.dumps([dataset if isinstance(dataset, str) else dataset.identity(), paths, other]))
"""
    files["old"], files["main"] = files["main"], {**files["main"], "sample/10BT/000_00000.parquet": b"new"}
    closed = run(again, server, home, HF_ENDPOINT="http://127.0.0.1:9")
    offline = run(again, server, home, HF_HUB_OFFLINE="1")
    server.faults["api"] = [refuse(503)] * 20
    down = run(again, server, home)
    for answer, reason in ((closed, "refused"), (offline, "HF_HUB_OFFLINE"), (down, "503")):
        assert answer[:2] == first
        assert all(fact in answer[2] for fact in ("error: ", "acme/stories", reason)), answer[2]
        assert "hf download --repo-type dataset acme/stories --local-dir DIR" in answer[2]
    Path(first[1]["sample/10BT/001_00000.parquet"]).unlink()
    partly = run(again, server, home, HF_HUB_OFFLINE="1")[0]
    assert "1 of its 3 files" in partly
    assert "sample/10BT/001_00000.parquet" in partly


def test_a_damaged_file_in_the_cache_is_downloaded_again(server: HubServer, home: Path) -> None:
    code = 'print(json.dumps(fetch("acme/two", "en")))'
    paths = run(code, server, home)
    blob = Path(paths["a.jsonl"]).resolve()
    blob.write_bytes(b"!" + content("a")[1:])
    run(code, server, home)
    assert blob.read_bytes() == content("a")
    blob.write_bytes(b"!" + content("a")[1:])
    offline = run('print(json.dumps(outcome(lambda: fetch("acme/two", "en"))))', server, home, HF_HUB_OFFLINE="1")
    assert all(fact in offline for fact in ("error: ", "a.jsonl", "HF_HUB_OFFLINE"))
