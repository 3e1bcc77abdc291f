"""Hub ids, and models from a local server, in subprocesses: huggingface_hub reads its variables at import."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from unittest import mock

import pytest

import glassgpt as g
from glassgpt.config.model import ModelConfig
from glassgpt.data.hub_datasets import HubSource
from glassgpt.data.sources import resolve
from glassgpt.interop.hf_models import export_hf
from glassgpt.interop.references import find_model
from glassgpt.tokenizers.builtin import CharacterTokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.hub import DatasetRepository, HubFile, HubUnreachableError, find_hub_id
from hub_server import HubServer, Repository, hub

NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
NEEDED.add("chat_template.jinja")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """Serve a model that also has files that glassgpt does not need, and a gated one."""
    config = ModelConfig(vocab_size=3, context_length=8, n_layer=1, n_head=1, n_embd=4)
    export_hf(g.GPT.create(config, 0), CharacterTokenizer("abc"), tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    files["chat_template.jinja"] = b"{{ messages }}"
    assert files.keys() >= NEEDED
    more = {"tf_model.h5": b"for another program", "consolidated.safetensors": b"the same weights again"}
    with hub(
        {"acme/tiny": Repository({"main": files | more}), "acme/gated": Repository({"main": files}, token="x")}
    ) as server:
        yield server


def run(home: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and the endpoint as its Hub."""
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | own, capture_output=True, text=True, timeout=120
    )


DOWNLOAD = "import sys; from glassgpt.utils.hub import download_model; print(download_model(sys.argv[1]))"


def test_a_model_is_downloaded_once(server: HubServer, tmp_path: Path) -> None:
    """Only the needed files are downloaded; later the model comes from the cache, even without the server."""
    first = run(tmp_path / "home", server.url, "-c", DOWNLOAD, "acme/tiny")
    assert "downloading acme/tiny from the Hugging Face Hub" in first.stderr
    folder = Path(first.stdout.strip())
    files = server.repositories["acme/tiny"].branches["main"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: files[name] for name in NEEDED}
    again = run(tmp_path / "home", "http://127.0.0.1:9", "-c", DOWNLOAD, "acme/tiny")
    assert again.stdout == first.stdout, again.stderr
    assert "downloading" not in again.stderr


@pytest.mark.slow
def test_a_model_on_the_hub_can_generate(server: HubServer, tmp_path: Path) -> None:
    arguments = ("-m", "glassgpt", "generate", "acme/tiny", "--prompt", "abc", "--max-new-tokens", "20")
    result = run(tmp_path / "home", server.url, *arguments)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.strip()) <= set("abc")


def test_a_model_that_cannot_be_downloaded_is_an_error_of_two_lines(server: HubServer, tmp_path: Path) -> None:
    cases = [
        (server.url, "acme/huge", ("acme/huge", "HF_TOKEN")),
        (server.url, "acme/gated", ("acme/gated cannot be read", "private or gated", f"{server.url}/acme/gated")),
        ("http://127.0.0.1:9", "acme/huge", ("acme/huge", "refused", "model.safetensors")),
    ]
    for endpoint, hub_id, facts in cases:
        error = run(tmp_path / "home", endpoint, "-c", DOWNLOAD, hub_id).stderr.rpartition("Error: ")[2]
        assert all(fact in error for fact in facts), error
        assert len(error.splitlines()) <= 2


def test_a_cancelled_download_sends_no_further_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause after a failed request takes 1 s, and ends as soon as the download is cancelled."""
    failed = mock.Mock(side_effect=ConnectionError("no route"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failed)
    checks: list[int] = []

    def on_bytes(count: int) -> None:
        checks.append(count)
        if len(checks) == 4:
            raise CancelledError

    start = time.monotonic()
    with pytest.raises(CancelledError):
        DatasetRepository("acme/two", "0" * 40).download(HubFile("a.jsonl", 9, None, None), on_bytes)
    assert (failed.call_count, checks) == (1, [0] * 4)
    assert 0.1 < time.monotonic() - start < 0.9


def test_an_answer_without_a_commit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = mock.Mock(id="acme/two", sha=None)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", mock.Mock(return_value=answer))
    with pytest.raises(HubUnreachableError, match=r"acme/two.*no commit"):
        DatasetRepository.open("acme/two")


def test_a_path_is_never_mistaken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("runs", "demo").mkdir(parents=True)
    for name in ("gpt2", "gpt2-xl", "openai-community/gpt2", "a.b/c_d-1.0"):
        assert find_hub_id(name) == find_hub_id(f"hf:{name}") == name
    assert find_hub_id("hf:models/tiny") == "models/tiny"
    with pytest.raises(UserError, match="hf:a/b/c"):
        find_hub_id("hf:a/b/c")
    paths = (
        "demo runs/demo runs/dmo rnus/dmo model/tiny.safetensors models/tiny ./a/b /a/b ~/a a/b/c a/ a/b@best größe/b"
    )
    for name in ("", "../b", *paths.split()):
        assert find_hub_id(name) is None, name


def test_a_misspelt_path_gets_the_existing_path_as_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs", "demo").mkdir(parents=True)
    Path("data", "books").mkdir(parents=True)
    with pytest.raises(UserError, match=r"rnus/dmo .*did you mean runs/demo\?"):
        find_model("rnus/dmo")
    with pytest.raises(UserError, match=r"dat/books.* did you mean data/books\?"):
        resolve("dat/books")
    assert isinstance(resolve("hf:dat/books"), HubSource)
