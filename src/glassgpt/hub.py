"""Models of the Hugging Face hub, by their id: downloaded once, into the hub library's own cache."""

import re
from pathlib import Path

from .errors import UserError

# Named without an owner, from the hub's first days. Any other bare name is a run that is not there.
_BARE_IDS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
_CONFIG = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
# By these names only: some repositories hold the same weights a second time for other programs.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


def is_hub_id(text: str) -> bool:
    """Whether a text that names nothing on the disk can be an id of the hub: `owner/name`, or one of GPT-2's bare names.

    A name under a directory that is there, and under `runs`, is a path.
    """
    owner, _, name = text.partition("/")
    if not name:
        return text in _BARE_IDS
    part = r"\w[\w.-]*"
    return bool(re.fullmatch(f"{part}/{part}", text, re.ASCII)) and owner != "runs" and not Path(owner).is_dir()


def download_model(hub_id: str) -> Path:
    """The directory with a model's config, weights and tokenizer: the hub's newest, or without network the one in the cache.

    `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and the usual proxy variables count. Raises `UserError` where it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

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
