"""Files written by glassgpt 0.1.0 stay readable: a dataset, a checkpoint, and a run that resumes identically."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from glassgpt.data.dataset import open_dataset
from glassgpt.interop.references import load
from glassgpt.runs.checkpoint import Checkpoint, read_tensors
from glassgpt.training.progress import SilentProgress
from glassgpt.training.run import resume
from glassgpt.utils.device import cpu_name

FILES = Path(__file__).resolve().parents[1] / "fixtures" / "v0_1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Copy the files, and set the run's data source to the copied dataset."""
    copy = Path(shutil.copytree(FILES, tmp_path / "old"))
    config = copy / "run" / "config.toml"
    config.write_text(config.read_text().replace('source = "dataset"', f"source = {json.dumps(str(copy / 'dataset'))}"))
    return copy


def test_dataset_loads(old: Path) -> None:
    dataset = open_dataset(old / "dataset")
    assert dataset.fingerprint == json.loads((old / "run" / "environment.json").read_text())["data_fingerprint"]
    assert len(dataset.train) == 9882
    ids = dataset.train.read(0, 64)
    assert dataset.tokenizer.encode(dataset.tokenizer.decode(ids)).tolist() == ids.tolist()


def test_checkpoint_loads_bit_for_bit(old: Path) -> None:
    folder = old / "run" / "checkpoints" / "000006"
    stored = read_tensors(folder / "model.safetensors")
    assert Checkpoint(folder).state.step == 6
    model, tokenizer = load(old / "run")
    state = model.state_dict()
    assert tokenizer is not None
    assert tokenizer.vocab_size == model.config.vocab_size
    assert stored
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_run_resumes_to_the_same_weights(old: Path) -> None:
    """Weights and losses are equal bit for bit on the same CPU type and torch version, elsewhere to 1e-5 (rounding)."""
    resume(old / "run", progress=SilentProgress())
    written = read_tensors(old / "run" / "checkpoints" / "000012" / "model.safetensors")
    expected = read_tensors(old / "expected" / "model.safetensors")
    environment = json.loads((FILES / "run" / "environment.json").read_text())
    same_cpu = (cpu_name(), torch.backends.cpu.get_cpu_capability()) == (
        environment["cpu"],
        environment["cpu_capability"],
    )
    tolerance = 0.0 if same_cpu and torch.__version__ == environment["torch"] else 1e-5
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=tolerance)
    records = [json.loads(line) for line in (old / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    for line in (old / "expected" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            assert losses[record["step"]] == pytest.approx(record["loss"], rel=0, abs=tolerance)
