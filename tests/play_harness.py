"""Small models and runs, and the playground's server for them in a thread of this process."""

import http.client
import json
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glassgpt.config.schema import TrainConfig
from glassgpt.model.gpt import GPT
from glassgpt.playground.model_pool import Catalog, ModelPool
from glassgpt.playground.server import PlayServer, bind
from glassgpt.runs.checkpoint import Snapshot, TrainingState, save_checkpoint
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.tokenizers.base import END_OF_TEXT, bytes_to_unicode
from glassgpt.tokenizers.builtin import BPETokenizer, BytesTokenizer, Tokenizer

TOKEN = "the-token-of-the-tests"
AUTHORIZATION = b"authorization: Bearer %s\r\n" % TOKEN.encode()
JSON = {"content-type": "application/json"}
IDS = json.dumps({"model": 0, "ids": [1, 2, 3]}).encode()

GPT2_LIKE = {"n_layer": 2, "n_head": 4, "n_embd": 16, "context_length": 24}
WINDOWED = {
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 16,
    "context_length": 24,
    "position": "rope",
    "window": 5,
    "window_globals": 1,
    "window_pattern": "SL",
    "norm": "rmsnorm",
    "qk_norm": True,
    "activation": "swiglu",
    "tied_head": False,
    "logit_softcap": 3.0,
}


def small_bpe() -> BPETokenizer:
    """Return a byte-level BPE tokenizer with six merges."""
    merges = ["t h", "th e", "Ġ the", "a b", "ab ab", "Ã ©"]
    symbols = [*bytes_to_unicode(), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    return BPETokenizer.from_merges({symbol: i for i, symbol in enumerate(symbols)}, merges)


def random_model(config: TrainConfig, seed: int = 0) -> GPT:
    """Return a model with large random weights, so that every part of it affects every number."""
    model = GPT.create(config.model, seed=seed)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_run(
    path: Path, model: Mapping[str, Any], tokenizer: Tokenizer | None = None, steps: tuple[int, ...] = (1,)
) -> RunDirectory:
    """Write a run's directory with a different checkpoint for each step."""
    tokenizer = BytesTokenizer() if tokenizer is None else tokenizer
    size = {**model, "vocab_size": tokenizer.vocab_size}
    config = TrainConfig.from_dict(
        {"model": size, "steps": 100, "batch_tokens": model["context_length"], "micro_batch_size": 1}
    )
    run = RunDirectory(path)
    path.mkdir(parents=True, exist_ok=True)
    run.write_config(config)
    for step in steps:
        weights: dict[str, torch.Tensor] = dict(random_model(config, seed=step).named_parameters())
        state = TrainingState(step=step, best_step=steps[0], val_loss=1.0)
        save_checkpoint(run.checkpoints, Snapshot(weights, {}), config, tokenizer, state)
    return run


def post_lines(path: str, body: Mapping[str, Any], token: str = TOKEN) -> bytes:
    """Return the bytes of a POST request, for tests that manage the connection themselves."""
    text = json.dumps(body)
    headers = {"host": "localhost", "authorization": f"Bearer {token}", "content-length": len(text), **JSON}
    lines = [f"POST /api/{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", text]
    return "\r\n".join(lines).encode()


class Client:
    """Sends requests to a server on this machine, by default with the token."""

    def __init__(self, port: int, token: str | None = TOKEN) -> None:
        self.port = port
        self.headers = {} if token is None else {"authorization": f"Bearer {token}"}

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 20,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Send a request; return status, headers by lower-case name, and body of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def ask(self, path: str, **body: Any) -> tuple[int, Any]:
        """POST a JSON body; return status and decoded body of the response."""
        data = json.dumps(body).encode()
        status, headers, answer = self.request("POST", f"/api/{path}", data, JSON)
        return status, unpacked(answer) if headers["content-type"] == "application/octet-stream" else lines_or_value(
            headers, answer
        )

    def answer(self, path: str, **body: Any) -> Any:
        """POST a JSON body; return the decoded body of the response, whose status must be 200."""
        status, value = self.ask(path, **body)
        assert status == 200, value
        return value

    def get(self, path: str) -> tuple[int, Any]:
        """GET a path; return status and decoded body of the response."""
        status, headers, answer = self.request("GET", path)
        return status, unpacked(answer) if headers["content-type"] == "application/octet-stream" else json.loads(answer)


def lines_or_value(headers: Mapping[str, str], answer: bytes) -> Any:
    """Decode a JSON body, or a body of JSON lines as a list."""
    if headers["content-type"].startswith("application/x-ndjson"):
        return [json.loads(line) for line in answer.splitlines()]
    return json.loads(answer)


def unpacked(data: bytes) -> dict[str, Any]:
    """Decode a binary response body: return its plain values and its arrays by name."""
    (length,) = struct.unpack("<I", data[:4])
    header: dict[str, Any] = json.loads(data[4 : 4 + length])
    start = (4 + length + 7) // 8 * 8
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, place in header.pop("arrays").items():
        dtype = np.dtype(place["dtype"]).newbyteorder("<")
        assert place["offset"] % 8 == 0
        arrays[name] = np.frombuffer(data, dtype, int(np.prod(place["shape"])), start + place["offset"]).reshape(
            place["shape"]
        )
    return {**header, **arrays}


class ServerThread:
    """A running playground server in a thread."""

    def __init__(self, catalog: Catalog, token: str = TOKEN, port: int = 0) -> None:
        listener, policy = bind(None, port)
        self.url = policy.url
        self.policy = replace(policy, token=token)
        self.client = Client(listener.getsockname()[1], token)
        self.pool = ModelPool(catalog, torch.device("cpu"))
        self.server = PlayServer(self.pool, self.policy)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the server and wait for its thread."""
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def serving(*references: Path | str, token: str = TOKEN, port: int = 0) -> Iterator[ServerThread]:
    """Run a server for these references, and stop it at the end."""
    served = ServerThread(Catalog([str(reference) for reference in references]), token, port)
    try:
        yield served
    finally:
        served.stop()
