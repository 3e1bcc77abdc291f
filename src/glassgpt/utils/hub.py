"""The Hugging Face Hub, through its own library: which references are hub ids, models, and the files of datasets.

Everything is kept in the library's cache. `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`,
`HF_HUB_DOWNLOAD_TIMEOUT` and the usual proxy variables apply.
"""

import hashlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from glassgpt.utils.errors import UserError, nearby_path
from glassgpt.utils.files import explain_os_errors, sha256_of, user_path

T = TypeVar("T")

ATTEMPTS = 4  # requests in all if the hub does not answer or answers 408, 429 or 5xx
_PAUSE = 1.0  # seconds before the second request; doubled before each further one

# Named without an owner, from the hub's first days. Any other name without an owner is a path.
_BARE_IDS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
_SUFFIXES = ".bin .bz2 .csv .gz .json .jsonl .md .npy .parquet .pt .pth .safetensors .toml .txt .zst"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")
_CONFIG = ("config.json", "generation_config.json", *_TOKENIZER)
# By these names only: some repositories hold the same weights a second time for other programs.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


class HubUnreachableError(UserError):
    """The hub cannot be reached, or does not answer as a hub does."""


def find_hub_id(reference: str) -> str | None:
    """Return the hub id that a reference to a model or dataset names, None for a local path, existing or mistyped.

    `hf:owner/name` is always an id. `owner/name` and GPT-2's names without an owner are ids if nothing local has that
    name and it does not look like a path: below `runs` or an existing folder, with a file's suffix, or one typo away
    from an existing path. Raises `UserError` if what follows `hf:` is not an id.
    """
    plain = reference.removeprefix("hf:")
    is_id = plain in _BARE_IDS or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", plain, re.ASCII) is not None
    if plain != reference:
        if not is_id:
            raise UserError(f"{reference} is not a Hugging Face id; write hf:owner/name")
        return plain
    if not is_id or user_path(plain).exists():
        return None
    owner, slash, _ = plain.partition("/")
    is_path = owner == "runs" or Path(owner).exists() or Path(plain).suffix in _SUFFIXES.split() or nearby_path(plain)
    return None if slash and is_path else plain


def download_model(hub_id: str) -> Path:
    """Return a directory with a model's newest config, weights and tokenizer, or without network the cached ones."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        print(f"downloading {hub_id} from the Hugging Face Hub", file=sys.stderr)
    for weights in (_SAFETENSORS, _TORCH):
        path = Path(_request(partial(snapshot_download, hub_id, allow_patterns=[*_CONFIG, *weights]), hub_id, "model"))
        if any(match for pattern in _SAFETENSORS for match in path.glob(pattern)):
            break
    return path


@dataclass(frozen=True)
class HubFile:
    """A file at a commit. The hub lists sha256 for large files, and git's sha1 for small ones."""

    name: str
    bytes: int
    sha256: str | None
    git_sha1: str | None

    def is_at(self, path: Path) -> bool:
        """Whether this file's content is at `path`, by its hash."""
        if self.sha256:
            return sha256_of(path) == self.sha256
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.git_sha1


@dataclass(frozen=True)
class DatasetRepository:
    """A dataset's repository at one commit."""

    hub_id: str
    commit: str

    @staticmethod
    def open(hub_id: str, revision: str | None = None, attempts: int = ATTEMPTS) -> "DatasetRepository":
        """Resolve a branch, tag or commit (None: the default branch). Raises `HubUnreachableError` and `UserError`."""
        from huggingface_hub import HfApi, constants

        timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        ask = partial(HfApi().dataset_info, hub_id, revision=revision, timeout=timeout)
        info = _request(ask, hub_id, attempts=attempts)
        if info.sha is None:
            raise HubUnreachableError(f"cannot download the dataset {hub_id}: the Hub's answer has no commit")
        return DatasetRepository(info.id, info.sha)  # another id if the repository was renamed

    @property
    def cache(self) -> Path:
        """The dataset's folder in the library's cache, with links to its files at `snapshots/COMMIT/NAME`."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / "--".join(["datasets", *self.hub_id.split("/")])

    def metadata(self) -> Mapping[str, Any]:
        """Return the YAML block of README.md, empty if there is none. Raises `UserError` if it is not valid."""
        from huggingface_hub import hf_hub_download, metadata_load
        from huggingface_hub.errors import EntryNotFoundError

        def readme() -> str | None:
            with suppress(EntryNotFoundError):
                return hf_hub_download(self.hub_id, "README.md", repo_type="dataset", revision=self.commit)
            return None

        path = _request(readme, self.hub_id)
        try:
            return (path and metadata_load(path)) or {}
        except Exception as error:  # of the YAML library that the hub's library uses
            reason = str(error).splitlines()[0]
            raise UserError(f"the metadata in README.md of {self.hub_id} is not valid: {reason}") from None

    def missing_bytes(self, file: HubFile) -> int:
        """The file's size if it is not in the cache or has another size there, otherwise 0."""
        path = self.cache / "snapshots" / self.commit / file.name
        return 0 if path.is_file() and path.stat().st_size == file.bytes else file.bytes

    def download(self, file: HubFile, on_bytes: Callable[[int], None]) -> Path:
        """Return the verified file in the cache, downloaded if it is missing or damaged.

        `on_bytes` gets the size of each piece that arrives, and 0 between requests. If it raises `CancelledError`, the
        download ends.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import tqdm

        class Bar(tqdm):  # prints nothing: the library's only hook into a running download
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                on_bytes(int(n or 0))

        where: dict[str, Any] = {"repo_type": "dataset", "revision": self.commit, "tqdm_class": Bar}
        with explain_os_errors("write", self.cache):
            for force in (False, True):  # the library compares sizes only
                fetch = partial(hf_hub_download, self.hub_id, file.name, force_download=force, **where)
                path = Path(_request(fetch, self.hub_id, file=file.name, on_bytes=on_bytes))
                if file.is_at(path):
                    return path
        raise UserError(f"{file.name} of the dataset {self.hub_id} does not have the hash that the hub lists")


@cache  # per commit, whose files never change
def list_files(repository: DatasetRepository, folder: str = "", recursive: bool = True) -> dict[str, HubFile]:
    """Return the files in a folder, and below it, by their names, sorted; none if there is no such folder."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import EntryNotFoundError

    def files() -> dict[str, HubFile]:
        where: dict[str, Any] = {"recursive": recursive, "revision": repository.commit, "repo_type": "dataset"}
        found = {}
        with suppress(EntryNotFoundError):
            for file in HfApi().list_repo_tree(repository.hub_id, folder or None, **where):
                if isinstance(file, RepoFile):
                    sha256, git_sha1 = (file.lfs.sha256, None) if file.lfs else (None, file.blob_id)
                    found[file.path] = HubFile(file.path, file.size, sha256, git_sha1)
        return dict(sorted(found.items()))

    return _request(files, repository.hub_id)


def _request(
    call: Callable[[], T],
    hub_id: str,
    kind: str = "dataset",
    file: str = "",
    attempts: int = ATTEMPTS,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> T:
    """Call the library, and again after a pause if the error may pass. Raises `HubUnreachableError` or `UserError`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    for attempt in range(attempts):
        end = time.monotonic() + (_PAUSE * 2 ** (attempt - 1) if attempt else 0)
        on_bytes(0)  # raises if the download is cancelled
        while (remaining := end - time.monotonic()) > 0:
            time.sleep(min(remaining, 0.1))
            on_bytes(0)
        try:
            return call()
        except Exception as error:  # also of the library's HTTP client, whose package differs between its versions
            if isinstance(error, CancelledError) or getattr(error, "errno", None) is not None:
                raise  # one with a number is of this machine's disk
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            is_hidden = isinstance(error, RepositoryNotFoundError) or status in (401, 403)
            is_final = isinstance(error, EntryNotFoundError | OfflineModeIsEnabled)  # the library has retried the first
            if is_final or (status is not None and status < 500 and status not in (408, 429)):
                break
    if is_hidden:
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{hub_id}"
        problem = f"the {kind} {hub_id} cannot be read: it does not exist, or it is private or gated"
        raise UserError(f"{problem};\naccept its terms at {page} and set HF_TOKEN to a token that may read it")
    reason = f"it answers {status}" if status else (str(cause) or type(cause).__name__).splitlines()[0]
    what = f"{file} of the {kind} {hub_id}" if file else f"the {kind} {hub_id}"
    manual = {
        "model": "name a directory with the model's config.json, model.safetensors and tokenizer.json",
        "dataset": f"run `hf download --repo-type dataset {hub_id} --local-dir DIR` elsewhere and name that folder",
    }
    message = f"cannot download {what} from the Hugging Face Hub: {reason}\nwithout network: {manual[kind]}"
    raise (UserError if status == 404 else HubUnreachableError)(message)
