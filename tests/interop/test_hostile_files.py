"""Model files of others that are damaged or made to harm: one clear error each, before memory is taken.

Also what is only unusual: names with the prefixes of training wrappers, and several ids that end a text.
"""

import copy
import io
import json
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import glassgpt as g
from glassgpt.config.model import ModelConfig
from glassgpt.generation.generate import generate
from glassgpt.generation.inference import quantize
from glassgpt.interop.hf_models import export_hf
from glassgpt.utils.errors import UserError
from glassgpt.utils.safe_pickle import read_plain_pickle

SHAPE: dict[str, Any] = {"vocab_size": 97, "context_length": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
LLAMA: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "bias": False,
    "activation": "swiglu",
    "tied_head": False,
}


@pytest.fixture(scope="module", params=["GPT2", "Llama"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny random model."""
    folder: Path = tmp_path_factory.mktemp("model") / request.param
    export_hf(g.GPT.create(ModelConfig(**SHAPE, **(LLAMA if request.param == "Llama" else {})), seed=0), None, folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """Return a copy of the model's directory."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({rename(name): tensor.clone() for name, tensor in tensors.items()}, path)


def refusal(path: Path) -> str:
    """Return the error of loading a model, which has one line and takes little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        g.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert "\n" not in str(error.value)
    return str(error.value)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "_fsdp_wrapped_module."]
)
def test_the_prefixes_of_wrappers_are_removed(prefix: str, folder: Path) -> None:
    expected, _ = g.load(folder)
    rename_tensors(folder, lambda name: f"{prefix}{name}")
    model, _ = g.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_wrapped_blocks_are_read(folder: Path) -> None:
    rename_tensors(folder, lambda name: name.replace(".0.", ".0._orig_mod."))
    g.load(folder)


def test_an_unknown_prefix_is_named(folder: Path) -> None:
    rename_tensors(folder, lambda name: f"student.{name}")
    assert "'student." in refusal(folder)


def test_two_tensors_of_one_name_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = min(tensors)
    safetensors.torch.save_file({**tensors, f"module.{name}": tensors[name] + 1}, path)
    assert name in refusal(folder)


# --- sizes ------------------------------------------------------------------------------------------------------------

SIZES: dict[str, tuple[Any, ...]] = {
    "n_layer": (-1, 10**9, 1e30),
    "n_embd": (3, 10**18, True),
    "vocab_size": (0, 10**400, [2]),
    "n_positions": (2.5, "12"),
    "n_inner": (65_536, {}),
    "n_head": (0, float("nan")),
}


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_the_weights_do_not_have_are_refused(key: str, folder: Path) -> None:
    theirs = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_positions": "max_position_embeddings"}
    theirs |= {"n_inner": "intermediate_size", "n_head": "num_attention_heads"}
    config = json.loads((folder / "config.json").read_text())
    for value in SIZES[key]:
        name = theirs.get(key, key) if config["model_type"] == "llama" else key
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        assert "model" in refusal(folder), value


# --- ends of text -----------------------------------------------------------------------------------------------------


def greedy(
    folder: Path, ids: list[int], prepare: Callable[[g.GPT], g.GPT] = lambda model: model, n: int = 1
) -> list[int]:
    """Return the ids that the model's greedy text has."""
    model, _ = g.load(folder)
    tokens = generate(prepare(model), None, ids, temperature=0, max_new_tokens=20, n=n)
    return [token.token_id for token in tokens if token.sample == n - 1]


def test_a_text_ends_at_any_of_the_ids_in_transformers_order(folder: Path) -> None:
    """generation_config.json decides if it exists, otherwise config.json."""
    free = greedy(folder, [5, 9])
    assert len(free) == 20
    later, unused = free[8], next(i for i in range(97) if i not in free)
    first = next(i for i, token in enumerate(free) if token == later)
    config, generation = folder / "config.json", folder / "generation_config.json"
    change_json(config, eos_token_id=unused)
    for value in (later, [unused, later], [later, -1, 10**6]):
        change_json(generation, eos_token_id=value)
        expected = free[: first + 1]
        assert greedy(folder, [5, 9]) == greedy(folder, [5, 9], n=3) == expected
        assert greedy(folder, [5, 9], copy.deepcopy) == expected
    model, _ = g.load(folder)
    assert quantize(model).end_ids == model.end_ids == (later, -1, 10**6)
    change_json(generation, eos_token_id=None)
    change_json(config, eos_token_id=[later])
    assert greedy(folder, [5, 9]) == free
    generation.unlink()
    assert greedy(folder, [5, 9]) == free[: first + 1]
    export_hf(g.load(folder)[0], None, folder / "again")
    assert g.load(folder / "again")[0].end_ids == (later,)


@pytest.mark.parametrize("value", [True, [[1]], "1", 1.0, [None], {"a": 1}, [1, "2"]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_other_values_of_the_end_are_refused(value: Any, name: str, folder: Path) -> None:
    change_json(folder / name, eos_token_id=value)
    assert "eos_token_id" in refusal(folder)


# --- damaged safetensors ----------------------------------------------------------------------------------------------


def header_of(content: bytes) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return result


def with_header(content: bytes, header: str) -> bytes:
    size = int.from_bytes(content[:8], "little")
    return struct.pack("<Q", len(header)) + header.encode() + content[8 + size :]


def with_changed(content: bytes, **changes: Any) -> bytes:
    """Return the file with other entries for its first tensor."""
    header = header_of(content)
    name = next(name for name in header if name != "__metadata__")
    return with_header(content, json.dumps({**header, name: {**header[name], **changes}}))


SAFETENSORS: dict[str, Callable[[bytes], bytes]] = {
    "a header of 2^60 bytes": lambda content: struct.pack("<Q", 1 << 60) + content[8:],
    "a header of 0 bytes": lambda content: struct.pack("<Q", 0) + content[8:],
    "no header": lambda content: content[:7],
    "cut off": lambda content: content[:-5],
    "longer": lambda content: content + b"x" * 50,
    "deep": lambda content: with_header(content, "[" * 50_000),
    "overlapping": lambda content: with_changed(content, data_offsets=[4, 68]),
    "negative": lambda content: with_changed(content, data_offsets=[-4, 60]),
    "another type": lambda content: with_changed(content, dtype="F64"),
    "an unknown type": lambda content: with_changed(content, dtype="Q9"),
    "a size of 2^62": lambda content: with_changed(content, shape=[1 << 62, 4]),
    "a negative size": lambda content: with_changed(content, shape=[-1]),
    "a name twice": lambda content: with_header(
        content, json.dumps(header_of(content))[:-1] + ', "lm_head.weight": {"dtype": "F32", "shape": [1], '
        '"data_offsets": [0, 4]}, "lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", SAFETENSORS)
def test_damaged_safetensors_are_refused(damage: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(SAFETENSORS[damage](path.read_bytes()))
    assert "model.safetensors" in refusal(folder)


# --- pickles ----------------------------------------------------------------------------------------------------------


def rezipped(path: Path, compression: int, change: Callable[[str, bytes], bytes] = lambda name, data: data) -> None:
    """Write the members of a zip again, changed or compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def deep(path: Path) -> None:
    content = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    rezipped(path, zipfile.ZIP_STORED, lambda name, data: content if name.endswith("data.pkl") else data)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


DAMAGE: dict[str, Callable[[Path], object]] = {
    "compressed": lambda path: rezipped(path, zipfile.ZIP_DEFLATED),
    "deep": deep,
    "tar": tar,
    "half": lambda path: path.write_bytes(path.read_bytes()[:600]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_archives_of_torch_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": {"a": torch.zeros(1 << 20)}, "model_args": {}}, path)
    DAMAGE[damage](path)
    assert "x.pt" in refusal(path)


def billion_lists() -> list[Any]:
    """Return a list that is small in memory, and whose text would have 2^60 characters."""
    values: list[Any] = [1]
    for _ in range(60):
        values = [values, values]
    return values


ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor[:2]]),
    "meta": lambda tensor: tensor.to("meta"),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "integers": Tensor.int,
    "repeated": lambda tensor: tensor[:1, :1].expand(10**9, 10**3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(kind: str, folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "embed" in name or "wte" in name)
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, name: ODD_TENSORS[kind](tensors[name])}, folder / "pytorch_model.bin")
    assert name in refusal(folder)


def test_small_views_of_one_large_storage_and_old_files_are_read(folder: Path) -> None:
    expected, _ = g.load(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
    views = {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
    for is_zip in (True, False):
        torch.save(views, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        model, _ = g.load(folder)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("content", [[1, 2], {1: torch.ones(1)}, {("a", "b"): torch.ones(1)}, {"a": 1}, torch.ones(2)])
def test_weights_without_names_are_refused(content: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)


@pytest.mark.parametrize("value", [billion_lists(), [[1]], {"a": 1}, torch.ones(3), (1, 2)], ids=range(5))
def test_settings_of_a_nanogpt_checkpoint_are_numbers_and_text(value: Any, tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "model_args": {"n_layer": value}}, tmp_path / "x.pt")
    assert "n_layer" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content", [b"\x80\x02]r\xff\xff\xff\x1f.", b"\x80\x04\x8e" + struct.pack("<Q", 20 << 30) + b"a.", b"", b"\x80"]
)
def test_a_pickle_takes_no_more_memory_than_its_size(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"meta\.pkl"):
        read_plain_pickle(tmp_path / "meta.pkl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0}}))
    assert read_plain_pickle(tmp_path / "meta.pkl") == {"stoi": {"a": 0}}
