"""The Hugging Face hub: models by their id, downloaded once into the hub library's own cache, and what a dataset's repository holds.

Datasets are asked for here and downloaded by `data.hub_datasets`: the library (2.4) begins a file anew after every killed or failed
download, gives it up at the first 5xx, waits without end for a listing, and compares no hash.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from glassgpt.utils.errors import UserError, nearby_path
from glassgpt.utils.files import user_path

# Requests after the first, where the hub is not reached or answers 429 or 5xx, and the seconds before the first of them.
_RETRIES = 3
_PAUSE = 1.0

# Named without an owner, from the hub's first days. Any other name without an owner is a path.
_BARE_IDS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
_FILE_SUFFIXES = {
    f".{suffix}" for suffix in "bin bz2 csv gz json jsonl md npy parquet pt pth safetensors toml txt zst".split()
}
_CONFIG = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
# By these names only: some repositories hold the same weights a second time for other programs.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


def find_hub_id(reference: str) -> str | None:
    """Return the hub id that a reference to a model or dataset names, or None if it is a local path, existing or mistyped.

    `hf:owner/name` is always an id. `owner/name` and GPT-2's names without an owner are ids if nothing local has that name and it
    does not look like a path: below `runs` or an existing folder, with a file's suffix, or one typo away from an existing path.
    Raises `UserError` if what follows `hf:` is not an id.
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
    if slash and (
        owner == "runs" or Path(owner).exists() or Path(plain).suffix in _FILE_SUFFIXES or nearby_path(plain)
    ):
        return None
    return plain


def download_model(hub_id: str) -> Path:
    """The directory with a model's config, weights and tokenizer: the hub's newest, or without network the one in the cache.

    `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and the usual proxy variables count. Raises `UserError` where it cannot be had.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    if not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        print(f"downloading {hub_id} from the Hugging Face Hub", file=sys.stderr)
    try:
        path = Path(snapshot_download(hub_id, allow_patterns=[*_CONFIG, *_SAFETENSORS]))
        if not any(found for pattern in _SAFETENSORS for found in path.glob(pattern)):
            path = Path(snapshot_download(hub_id, allow_patterns=[*_CONFIG, *_TORCH]))
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no run or checkpoint at {hub_id}, and the hub has no such model (or asks for a token: set HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"there is no run or checkpoint at {hub_id}, and the Hugging Face hub cannot be reached. Without network: put the model's "
            "config.json, model.safetensors and tokenizer.json into a directory and name that"
        ) from None
    except Exception as error:  # its own, and those of whatever HTTP library it uses
        raise UserError(f"cannot download {hub_id} from the hub: {str(error).splitlines()[0]}") from None
    return path


# -------------------------------------------------------------------------------------------------------------- datasets


class HubUnreachableError(UserError):
    """The hub does not answer, or not as a hub does; what is in the cache may do."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit, and the hash the hub knows it by: sha256 of large files, git's sha1 of small ones."""

    name: str
    bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class DatasetRepository:
    """A dataset's repository at one commit, as the hub has it."""

    hub_id: str
    commit: str

    def metadata(self) -> Mapping[str, Any]:
        """What the top of its README.md says of its subsets (`configs`). Raises `UserError` where it cannot be understood."""
        from huggingface_hub import DatasetCard, hf_hub_url

        with _explained(self.hub_id):
            response = _ask_for_part(
                hf_hub_url(self.hub_id, "README.md", repo_type="dataset", revision=self.commit), {}
            )
            readme = "" if response is None else response.text
        if not readme.lstrip("\ufeff").startswith("---"):
            return {}
        try:
            card = DatasetCard(readme.lstrip("\ufeff"), ignore_metadata_errors=True)
            return {"configs": card.data.get("configs")}
        except Exception as error:  # whatever its YAML library raises
            reason = str(error).splitlines()[0]
            raise UserError(f"the metadata in the README.md of {self.hub_id} cannot be understood: {reason}") from None

    def files(self, folder: str = "", recursive: bool = True) -> list[HubFile]:
        """The files in a folder, and below it: none where it is not there."""
        from huggingface_hub import constants

        path = f"/{quote(folder, safe='')}" if folder else ""
        url: str | None = f"{constants.ENDPOINT}/api/datasets/{self.hub_id}/tree/{self.commit}{path}"
        parameters = {"recursive": str(recursive).lower()}
        files: list[HubFile] = []
        with _explained(self.hub_id):
            while url is not None:
                if (response := _ask_for_part(url, parameters)) is None:
                    return []
                files += [_hub_file(entry) for entry in response.json() if entry["type"] == "file"]
                following = response.links.get("next", {}).get("url")
                url, parameters = following and urljoin(url, following), {}  # the link has them
        return files

    def request(self, name: str) -> tuple[str, dict[str, str], float]:
        """The URL of a file, the headers to send to it, and the seconds of silence after which to give up."""
        from huggingface_hub import constants, hf_hub_url

        url = hf_hub_url(self.hub_id, name, repo_type="dataset", revision=self.commit)
        return url, _headers(url), float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def dataset_repository(hub_id: str, revision: str | None = None, patient: bool = True) -> DatasetRepository:
    """A dataset's repository at the commit that a revision (a branch, a tag, a commit; None: the newest) stands for at this moment.

    `patient`: a hub that does not answer is asked again, which takes seconds that whoever has a copy need not wait.
    Raises `HubUnreachableError` where the hub does not tell, `UserError` where it says that there is none, or not for this user.
    """
    from huggingface_hub import constants

    path = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    with _explained(hub_id, revision):
        answer = _ask(f"{constants.ENDPOINT}/api/datasets/{hub_id}{path}", {}, _RETRIES if patient else 0).json()
        found, commit = (
            str(answer.get("id") or hub_id),
            str(answer["sha"]),
        )  # another id where the repository was renamed
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", found, re.ASCII):
            raise ValueError(f"no commit: {commit}")
    return DatasetRepository(found, commit)


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` is set: the hub is not asked then."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def dataset_cache(hub_id: str) -> Path:
    """The dataset's folder in the hub library's cache: `blobs/HASH`, and links to them at `snapshots/COMMIT/NAME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join(["datasets", *hub_id.split("/")])


def _headers(url: str) -> dict[str, str]:
    """Who asks and, at the hub itself, the user's token, where there is one: a listing may go on at another host (a mirror's does)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    token = None if urlsplit(url)[:2] == urlsplit(constants.ENDPOINT)[:2] else False
    headers: dict[str, str] = build_hf_headers(token=token, library_name="glassgpt")
    return headers


def _ask(url: str, parameters: Mapping[str, str], retries: int = _RETRIES) -> Any:
    """The hub's answer, asked again after a pause where it may pass; the library's own exceptions."""
    from huggingface_hub import constants
    from huggingface_hub.utils import hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

    response = http_backoff(
        "GET",
        url,
        params=parameters or None,
        headers=_headers(url),
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        max_retries=retries,
        base_wait_time=_PAUSE,
        follow_redirects=True,
    )
    hf_raise_for_status(response)
    return response


def _ask_for_part(url: str, parameters: Mapping[str, str]) -> Any:
    """The hub's answer about a part of a repository that is there, None where it has no such part."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return _ask(url, parameters)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return None
        raise


def _hub_file(entry: Mapping[str, Any]) -> HubFile:
    """A file of the listing. Its name and its hash become paths on this machine: neither may lead elsewhere."""
    name, large = entry["path"], entry.get("lfs")
    sha256, git_sha1 = (large["oid"], None) if large else (None, entry["oid"])
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or not re.fullmatch(r"[0-9a-f]{40,64}", str(sha256 or git_sha1))
    ):
        raise ValueError(f"an entry named {name!r}")
    return HubFile(name, int(large["size"] if large else entry["size"]), sha256, git_sha1)


@contextmanager
def _explained(hub_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the library raises into `HubUnreachableError`, or a `UserError` that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(gated(hub_id)) from None
    except RevisionNotFoundError:
        raise UserError(
            f"the hub's dataset {hub_id} has no revision {revision!r}: name a branch, a tag or a commit of it"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"the Hugging Face hub has no dataset {hub_id} (or asks for a token: set HF_TOKEN)") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(gated(hub_id)) from None
        if status == 404:
            raise UserError(f"the Hugging Face hub has no dataset {hub_id}") from None
        raise HubUnreachableError(
            f"the Hugging Face hub answers {status} when asked for the dataset {hub_id}"
        ) from None
    except Exception as error:  # those of whatever HTTP library it uses, and of answers that are no hub's
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HubUnreachableError(
            f"the Hugging Face hub cannot be reached for the dataset {hub_id}: {reason}"
        ) from None


def gated(hub_id: str) -> str:
    """How a user gets at a dataset that is not for everybody."""
    from huggingface_hub import constants

    return f"the dataset {hub_id} is gated or private: accept its terms at {constants.ENDPOINT}/datasets/{hub_id} and set HF_TOKEN"
