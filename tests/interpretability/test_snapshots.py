"""Probe snapshots: correct numbers, complete files, and no influence on training."""

import contextlib
import errno
import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import TrainConfig
from glassgpt.data.dataset import open_dataset
from glassgpt.data.prepare import prepare
from glassgpt.interop.references import load
from glassgpt.interpretability.capture import capture
from glassgpt.interpretability.head_scores import HEAD_TYPES, head_scores
from glassgpt.interpretability.snapshots import ProbeSnapshot, Prompt, prompt_of, read_probe, take_probe, write_probe
from glassgpt.model.gpt import GPT
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.tokenizers.builtin import BytesTokenizer
from glassgpt.training.run import resume, train
from glassgpt.utils.errors import UserError
from kill_harness import Quiet, differences, fast_training, probes_of, tiny_config, write_text
from slot_harness import TINY, random_model


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    """Train without flushing to disk, with one thread and without measuring peak memory."""
    with fast_training():
        yield


def run_of(config: TrainConfig, out: Path) -> Path:
    return train(config, out, progress=Quiet())


def model_with(**changes: Any) -> GPT:
    return random_model(ModelConfig(**(TINY | changes))).float()


def small_snapshot() -> ProbeSnapshot:
    """Return a snapshot of two prompts, one of a single token, by a model with a window and shared key/value heads."""
    model = model_with(n_kv_head=1, window=3)
    prompts = [prompt_of(list(b"abca"), BytesTokenizer()), prompt_of([7], BytesTokenizer())]
    prompts = [Prompt([i % model.vocab_size for i in prompt.ids], prompt.pieces) for prompt in prompts]
    return take_probe(model, prompts, ["a sample\n", "ein Wörtchen \ud7ff\U0001f642"], step=12)


def same_bits(one: ProbeSnapshot, other: ProbeSnapshot) -> bool:
    """Return whether two snapshots have the same bits."""
    first, second = (
        {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in each.tensors.items()} for each in (one, other)
    )
    return one.values == other.values and first == second


# --- numbers


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_snapshot_equals_what_its_checkpoint_computes(tmp_path: Path, text: Path, precision: str) -> None:
    """At any precision of the run, values equal float32 results of PyTorch's functions and written-out formulas."""
    config = tiny_config(text, model={"n_layer": 2, "dropout": 0.1}, precision=precision)
    run = run_of(config, tmp_path / "run")
    snapshot = read_probe(RunDirectory(run).probe_path(5))
    model, tokenizer = load(f"{run}@5")
    (prompt,), tensors = snapshot.prompts, snapshot.tensors
    ids = open_dataset(prepare(config.data)).validation.read(0, 16)  # the context length is 16
    assert prompt.ids == ids.tolist()
    assert tokenizer is not None
    assert "".join(prompt.pieces) == tokenizer.decode(ids.tolist()).replace(" ", "␣").replace("\n", "⏎")
    row = torch.tensor(ids)[None]
    with torch.no_grad(), capture(model) as computed:
        logits = model(row)[0]
    bits = F.cross_entropy(logits[:-1], row[0, 1:], reduction="none") / math.log(2)
    assert math.isnan(tensors["surprisal.0"][0])
    # Float32 rounding of sums in another order.
    torch.testing.assert_close(tensors["surprisal.0"][1:], bits, rtol=1e-5, atol=1e-5)
    for layer, attention in zip(computed.layers, tensors["attention.0"], strict=True):
        weights = (
            (layer.rot_q @ layer.rot_k.transpose(-2, -1) / math.sqrt(8))
            .masked_fill(~torch.ones(16, 16).tril().bool(), -math.inf)
            .softmax(-1)
        )
        # Half a step of 8-bit weights, plus float32 rounding.
        torch.testing.assert_close(attention / 255, weights[0], rtol=0, atol=0.5 / 255 + 1e-6)
    with torch.no_grad():
        for depth, stream in enumerate(computed.residual_stream):
            weight, bias = model.get_parameter("norm.weight"), model.get_parameter("norm.bias")
            expected = (F.layer_norm(stream[0], (16,), weight, bias) @ model.embedding.weight.T).softmax(-1)
            chosen = expected.gather(1, tensors["lens_ids.0"][depth].long())
            # Float16 has 10 fraction bits.
            torch.testing.assert_close(tensors["lens_p.0"][depth].float(), chosen, rtol=2**-10, atol=1e-6)
            torch.testing.assert_close(chosen, expected.topk(3).values, rtol=1e-5, atol=0)
            p_of_next = expected[:-1].gather(1, row[0, 1:, None])
            assert tensors["next_rank.0"][depth].tolist() == [*(expected[:-1] > p_of_next).sum(-1).tolist(), -1]
    assert snapshot.head_types == list(HEAD_TYPES)
    torch.testing.assert_close(tensors["head_scores"], head_scores(model), rtol=0, atol=0)
    assert same_bits(snapshot, take_probe(model, [prompt], snapshot.samples, 5))


@pytest.mark.slow
def test_snapshots_do_not_depend_on_compilation_checkpointing_or_precision(tmp_path: Path, text: Path) -> None:
    """The snapshot before the first update has the same bytes, because all runs have the same weights there."""
    config = tiny_config(text, model={"n_layer": 2, "dropout": 0.1}, steps=1, eval_every=0, sample={"count": 0})
    changes: list[dict[str, Any]] = [
        {},
        {"compile": "on", "compile_backend": "eager"},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"precision": "bfloat16"},
    ]
    contents = {
        probes_of(run_of(config.override(**change), tmp_path / str(i)))["000000.safetensors"]
        for i, change in enumerate(changes)
    }
    assert len(contents) == 1


def test_a_snapshot_contains_the_samples_of_its_step(tmp_path: Path, text: Path) -> None:
    run = RunDirectory(run_of(tiny_config(text, sample={"count": 2}), tmp_path / "run"))
    assert run.probed_steps == [0, 5, 10]
    written = run.samples_path.read_text().split("\n## Step ")[1:]
    for step, section in zip(run.probed_steps, written, strict=True):
        samples = read_probe(run.probe_path(step)).samples
        assert len(samples) == 2
        assert all("\n".join(f"    {line}" for line in sample.split("\n")) in section for sample in samples)


def test_training_mode_and_global_random_state_are_unchanged() -> None:
    model = model_with(dropout=0.5)
    state = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        snapshots = [take_probe(model, [Prompt([1, 2], ["a", "b"])], [], 0) for _ in range(2)]
        assert model.training is training
        assert all(module.training is training for module in model.modules())
        assert same_bits(*snapshots)  # dropout was disabled
    assert torch.equal(torch.get_rng_state(), state)


# --- prompts


def test_prompts_are_truncated_to_the_configured_tokens(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text, probe={"prompts": ["the fox", "a", "quick brown dog jumps over"], "tokens": 20}, steps=1)
    for changes, expected in (({}, [7, 1, 16]), ({"tokens": 3}, [3, 1, 3])):  # the context length is 16
        run = run_of(config.override(probe=changes), tmp_path / str(len(changes)))
        pieces = [prompt.pieces for prompt in read_probe(RunDirectory(run).probe_path(1)).prompts]
        assert [len(each) for each in pieces] == expected
        assert "".join(pieces[0]) == "the␣fox"[: expected[0]]


def test_snapshots_between_evaluations(tmp_path: Path, text: Path) -> None:
    """They have no samples, and a run that is resumed from step 5 writes the later snapshots again."""
    config = tiny_config(text, probe={"every": 4})
    full_run, resumed = (RunDirectory(run_of(config, tmp_path / name)) for name in ("uninterrupted", "resumed"))
    assert full_run.probed_steps == [0, 4, 5, 8, 10]
    assert [len(read_probe(full_run.probe_path(step)).samples) for step in full_run.probed_steps] == [1, 0, 1, 0, 1]
    shutil.rmtree(resumed.checkpoints / "000010")
    resume(resumed.path, progress=Quiet())
    assert differences(resumed.path, full_run.path) == []


def test_a_mixture_has_one_default_prompt_per_text(tmp_path: Path) -> None:
    texts = [write_text(tmp_path / f"{seed}.txt", seed=seed) for seed in (1, 2)]
    config = tiny_config(texts[0], data={"mixture": {str(path): 0.5 for path in texts}}, steps=1)
    prompts = read_probe(RunDirectory(run_of(config, tmp_path / "run")).probe_path(0)).prompts
    assert len({tuple(prompt.ids) for prompt in prompts}) == 2


def test_pieces_of_a_prompt_are_in_display_form() -> None:
    assert prompt_of(list("a é\n".encode()), BytesTokenizer()).pieces == ["a", "␣", "<c3>", "<a9>", "⏎"]


# --- no influence on training


def test_a_run_has_the_same_bits_with_and_without_snapshots(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text, model={"dropout": 0.2}, optim={"name": "muon"}, eval_every=2)
    with_snapshots = run_of(config, tmp_path / "with")
    without_snapshots = run_of(config.override(probe={"tokens": 0}), tmp_path / "without")
    assert differences(with_snapshots, without_snapshots) == ["config.toml", "probes"]
    assert not (without_snapshots / "probes").exists()


def test_prompts_may_change_on_resume(tmp_path: Path, text: Path) -> None:
    """Prompts may also change in a run whose config has no [probe] section, from before snapshots existed."""
    run = run_of(tiny_config(text, steps=5), tmp_path / "run")
    before, section_text = (run / "config.toml").read_text(), "[probe]\nprompts = []\ntokens = 32\nevery = 0\n"
    assert section_text in before
    for steps, section, tokens in ((7, "", 16), (10, '[probe]\nprompts = ["the fox"]\ntokens = 4\n', 4)):
        (run / "config.toml").write_text(before.replace(section_text, section))
        resume(run, steps=steps, progress=Quiet())
        prompts = read_probe(RunDirectory(run).probe_path(steps)).prompts
        assert [len(prompt.ids) for prompt in prompts] == [tokens]
        before = (run / "config.toml").read_text()


# --- files


def test_a_written_snapshot_is_read_unchanged(tmp_path: Path) -> None:
    snapshot = small_snapshot()
    for _ in range(2):  # the second write replaces the file
        write_probe(tmp_path / "probes" / "000012.safetensors", snapshot)
    assert same_bits(read_probe(tmp_path / "probes" / "000012.safetensors"), snapshot)
    assert [path.name for path in (tmp_path / "probes").iterdir()] == ["000012.safetensors"]


def test_a_truncated_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "000012.safetensors"
    write_probe(path, small_snapshot())
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"000012\.safetensors"):
            read_probe(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_probe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": None}, "'snapshot' is missing"),
        ({"metadata": {"snapshot": "{"}}, "Expecting property name"),
        ({"metadata": {"snapshot": "[]"}}, "keys"),
        ({"metadata": {"snapshot": "[" * 10**5}}, "nested too deeply"),
        ({"facts": {"step": "12"}}, "step must be a whole number"),
        ({"facts": {"prompts": [{"ids": [0]}]}}, "pieces"),
        ({"facts": {"prompts": [{"ids": [0], "pieces": []}]}}, "1 ids and 0 pieces"),
        ({"facts": {"samples": [3]}}, "samples must be a list, each item of it a string"),
        ({"facts": {"kinds": ["one"]}}, r"head_scores .* \[1, 2, 4\]"),
        ({"tensors": {"attention.0": None}}, r"'attention\.0' is missing"),
        ({"tensors": {"attention.0": torch.zeros(2, 3, 4, 4)}}, r"attention\.0 must be .* torch\.float32"),
        ({"tensors": {"surprisal.1": torch.zeros(2)}}, r"surprisal\.1 must be"),
        ({"tensors": {"lens_p.0": torch.zeros(9, 4, 3).half()}}, r"lens_p\.0 must be"),
        ({"tensors": {"next_rank.0": torch.tensor(0, dtype=torch.int32)}}, r"next_rank\.0 must be"),
        ({"tensors": {"attention.0": torch.tensor(0, dtype=torch.uint8)}}, r"attention\.0 must be"),
        ({"tensors": {"lens_ids.0": torch.tensor(0, dtype=torch.int32)}}, r"lens_ids\.0 must be"),
        ({"tensors": {"head_kinds": torch.zeros(4, 7, 7)}}, r"attention\.0 must be torch\.uint8 \[7, 7, 4, 4\]"),
        ({"tensors": {"head_kinds": torch.zeros(4)}}, r"head_scores .* \[4\]"),
    ],
    ids=str,
)
def test_a_file_that_is_not_a_snapshot_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The error names the file. Other shapes and dtypes are refused too."""
    path = tmp_path / "000012.safetensors"
    write_probe(path, small_snapshot())
    tensors = safetensors.torch.load_file(path) | change.get("tensors", {})
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["snapshot"])
    del facts["sha256"]  # as in a file of an earlier version, so that the other checks are reached
    metadata = change.get("metadata", {"snapshot": json.dumps(facts | change.get("facts", {}))})
    safetensors.torch.save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata
    )
    with pytest.raises(UserError, match=rf"000012\.safetensors .*{message}"):
        read_probe(path)


def test_a_damaged_snapshot_is_never_read_as_another_one(tmp_path: Path) -> None:
    """Bits are flipped and bytes overwritten, in the header and in the tensors."""
    path, draw = tmp_path / "000005.safetensors", random.Random(0)
    write_probe(path, small_snapshot())
    content, read = path.read_bytes(), 0
    for _ in range(400):
        altered, place = bytearray(content), draw.randrange(len(content))
        if draw.random() < 0.5:
            altered[place] ^= 1 << draw.randrange(8)
        else:
            altered[place : place + 4] = draw.randbytes(len(altered[place : place + 4]))
        path.write_bytes(altered)
        with contextlib.suppress(UserError):
            read_probe(path)
            read += altered != content
    assert read == 0


def test_a_snapshot_of_version_0_1_can_be_read() -> None:
    snapshot = read_probe(Path(__file__).parents[1] / "fixtures" / "v0_1" / "run" / "probes" / "000006.safetensors")
    assert snapshot.step == 6
    assert snapshot.head_types == list(HEAD_TYPES)
    assert snapshot.tensors["head_scores"].shape[0] == 4


def test_a_full_disk_leaves_no_partial_snapshot(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(text, eval_every=3, checkpoint_every=2)
    move = os.replace

    def replace_until_disk_is_full(source: Path, target: Path) -> None:
        if target.name == "000006.safetensors":
            assert source.stat().st_size > 1000
            raise OSError(errno.ENOSPC, "No space left on device")
        move(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", replace_until_disk_is_full)
        with pytest.raises(UserError, match=r"cannot write .*000006\.safetensors: the disk is full"):
            run_of(config, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    assert run.read_status()["state"] == "failed"
    assert sorted(probes_of(run.path)) == ["000000.safetensors", "000003.safetensors"]
    resume(run.path, progress=Quiet())
    assert differences(run.path, run_of(config, tmp_path / "uninterrupted")) == []
