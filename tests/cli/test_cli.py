"""The command line: arguments it passes on, output, exit codes, and help that does not import torch."""

import dataclasses
import errno
import inspect
import io
import json
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

import glassgpt.evaluation.perplexity
import glassgpt.generation.generate
import glassgpt.interop.references
import glassgpt.training.run
from glassgpt.cli.console import RichProgress
from glassgpt.cli.main import COMMANDS, main
from glassgpt.cli.options import _field_comments, help_texts
from glassgpt.cli.train import Plan, Resume
from glassgpt.config.recipes import recipe, recipe_names, recipe_text
from glassgpt.config.schema import TrainConfig
from glassgpt.generation.generate import GeneratedToken
from glassgpt.training.progress import Progress
from glassgpt.utils.errors import UserError, program
from glassgpt.utils.formatting import format_duration
from glassgpt.utils.gpu_specs import GPUS

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def training(monkeypatch: Patch) -> mock.Mock:
    """Replace `training.train` and `training.resume` by mocks with the same signatures, on a machine with memory."""
    monkeypatch.setattr("glassgpt.planning.memory.check_memory", lambda *arguments: None)
    stand_in = mock.Mock()
    for name in ("train", "resume"):
        recorder = mock.create_autospec(getattr(glassgpt.training.run, name), return_value=Path("runs/x"))
        stand_in.attach_mock(recorder, name)
        monkeypatch.setattr(glassgpt.training.run, name, recorder)
    return stand_in


def trained_config(training: mock.Mock, *arguments: str) -> TrainConfig:
    """Return the config that `glassgpt train ARGUMENTS` would train."""
    assert main(["train", *arguments]) == 0
    config = training.train.call_args.args[0]
    assert isinstance(config, TrainConfig)
    return config


def fails(capsys: Capture, *arguments: str) -> str:
    """Run a command that must fail as a user error (exit code 2, at most two lines); return its standard error."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("glassgpt: error: ")
    assert captured.err.count("\n") <= 2
    assert "Traceback" not in captured.err
    return captured.err


def run_process(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, encoding="utf-8", timeout=60, **options
    )


# help


EVERY_COMMAND = [
    [],
    *(name.split() for name in (*COMMANDS, "tokenizer", "data")),
]


def test_help_of_every_command_imports_neither_torch_nor_numpy_nor_rich_nor_plotly() -> None:
    """All commands run in one process, so `sys.modules` at the end shows what any of them imported."""
    script = """if True:
        import contextlib, io, json, sys
        from glassgpt.__main__ import main
        for command in json.loads(sys.argv[1]):
            sys.argv[1:] = [*command, "--help"]
            with contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    code = main()
                except SystemExit as stop:
                    code = stop.code
            assert not code and "usage: glassgpt" in out.getvalue(), command
        print(sorted({"torch", "numpy", "rich", "plotly"} & set(sys.modules)))
    """
    result = run_process("-c", script, json.dumps(EVERY_COMMAND))
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_during_the_imports_gives_no_traceback() -> None:
    script = """if True:
        import os, signal, sys
        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == "tyro":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupt())
        from glassgpt.__main__ import main
        sys.exit(main())
    """
    result = run_process("-c", script, "--help")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "glassgpt: interrupted\n")


def option_defaults(config: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        yield from option_defaults(value, f"{name}.") if dataclasses.is_dataclass(value) else [(f"--{name}", value)]


def test_train_help_shows_every_option_with_the_recipes_default(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # a wider terminal would place the boxes side by side
    with pytest.raises(SystemExit) as stop:
        main(["train", "shakespeare-cpu", "--help"])
    assert stop.value.code == 0
    text = " ".join(line.strip(" │") for line in capsys.readouterr().out.splitlines())
    for option, value in option_defaults(recipe("shakespeare-cpu")):
        shown = (
            "none"
            if value in (None, {}, [])
            else {"\n": r"'\n'"}.get(value if isinstance(value, str) else "", str(value))
        )
        # The option, its help of two words or more, and its default, before the next option begins.
        match = re.search(rf"{option}(?:,? \S+)? (?P<help>(?:(?! --).)*?) ?\(default: (?P<default>[^)]*)\)", text)
        assert match, option
        assert len(match["help"].split()) >= 2 or option == "--device", option
        assert match["default"] == shown, option


def options_with_help(command: type, prefix: str = "--") -> Iterator[tuple[str, str]]:
    """Yield every option of a command, also those of its config, with its help text."""
    texts, types = help_texts(command), typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        inner = typing.get_type_hints(command)[field.name]
        annotated = [getattr(each, "help", None) for each in getattr(types[field.name], "__metadata__", ())]
        yield f"{prefix}{field.name}", texts.get(field.name) or next(filter(None, annotated), "")
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from options_with_help(inner, f"{prefix}{field.name}.")


@pytest.mark.parametrize("command", [*COMMANDS.values(), Resume])
def test_every_option_has_a_help_text(command: type) -> None:
    """The help is the comment in the source, so a reformatted field or a comment for a tool could change it."""
    for option, text in options_with_help(command):
        assert len(text.split()) >= 2, option
        assert not re.search("noqa|type:|pragma", text), (option, text)


def test_parsing_leaves_the_config_classes_unchanged(training: mock.Mock) -> None:
    trained_config(training, "demo")
    assert not any(field.metadata for field in dataclasses.fields(TrainConfig))


def test_help_works_without_the_packages_sources(capsys: Capture, monkeypatch: Patch) -> None:
    """In a frozen application the sources are missing, and with them the help texts, which are comments there."""
    monkeypatch.setattr(inspect, "getsource", mock.Mock(side_effect=OSError))
    _field_comments.cache_clear()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    _field_comments.cache_clear()
    assert stop.value.code == 0
    assert "--optim.lr" in capsys.readouterr().out


# train


def test_options_override_the_recipes_config(training: mock.Mock) -> None:
    arguments = "--data book.txt --seed 7 --eval-every 5 --checkpoint-every 6 --model.n-layer 3 --model.n_embd 48"
    more = "--model.no-bias --data.tokenizer bytes --sample.top-k none --eval-tokens 99 --init-from none"
    more += " --sample.prompt=--x --optim.lr 1e-3"
    config = trained_config(training, "shakespeare-cpu", *arguments.split(), *more.split())
    expected = recipe(
        "shakespeare-cpu",
        data={"source": "book.txt", "tokenizer": "bytes"},
        seed=7,
        eval_every=5,
        checkpoint_every=6,
        model={"n_layer": 3, "n_embd": 48, "bias": False},
        optim={"lr": 1e-3},
        eval_tokens=99,
        sample={"prompt": "--x"},
    )
    assert config == expected
    assert training.train.call_args.kwargs["out"] is None
    assert training.train.call_args.kwargs["overwrite"] is False


def test_train_without_arguments_trains_the_demo_recipe(training: mock.Mock) -> None:
    assert trained_config(training) == recipe("demo")


def test_out_and_overwrite_are_passed_to_train(training: mock.Mock, capsys: Capture) -> None:
    trained_config(training, "demo", "--out", "some where/x", "--overwrite")
    assert training.train.call_args.kwargs["out"] == Path("some where/x")
    assert training.train.call_args.kwargs["overwrite"] is True
    assert "glassgpt generate runs/x" in capsys.readouterr().out


def test_steps_on_the_command_line_replaces_the_recipes_epochs_and_vice_versa(
    training: mock.Mock, tmp_path: Path, capsys: Capture
) -> None:
    by_epochs = tmp_path / "mine.toml"
    by_epochs.write_text("epochs = 2.0\nbatch_tokens = 1024\nmicro_batch_size = 1\n")
    config = trained_config(training, "demo", "--epochs", "0.5")
    assert (config.steps, config.epochs) == (None, 0.5)
    config = trained_config(training, str(by_epochs), "--steps=9")
    assert (config.steps, config.epochs, config.name) == (9, None, "mine")
    assert trained_config(training, str(by_epochs)).epochs == 2.0
    capsys.readouterr()
    assert "exactly one" in fails(capsys, "train", "demo", "--steps", "3", "--epochs", "1")


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """Write only the config of a run, which is enough to parse the options of --resume."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(recipe("demo", model={"vocab_size": 65}, micro_batch_size=4).to_toml())
    return run


def test_resume_passes_on_steps_and_changed_execution_settings(training: mock.Mock, small_run: Path) -> None:
    assert main(["train", "--resume", str(small_run)]) == 0
    assert main(["train", f"--resume={small_run}", "--steps", "90"]) == 0
    more = "--micro-batch-size 2 --eval-every 3 --activation-checkpointing full --sample.count 0 --log none"
    assert main(["train", "--resume", str(small_run), *more.split()]) == 0
    calls = [(call.args, call.kwargs) for call in training.resume.call_args_list]
    assert all(arguments == (small_run,) for arguments, _ in calls)
    changes = [{key: value for key, value in options.items() if key != "progress"} for _, options in calls]
    assert changes[:2] == [{"steps": None}, {"steps": 90}]
    sample = dataclasses.replace(recipe("demo").sample, count=0)
    expected = {"micro_batch_size": 2, "eval_every": 3, "activation_checkpointing": "full", "sample": sample}
    assert changes[2] == {"steps": None, **expected}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--optim.lr 1e-3", ["optim.lr", "--resume"]),
        ("--data x.txt", ["data.source"]),
        ("--model.n_layer=3", ["model.n_layer"]),
        ("--seed 3", ["seed"]),
        ("--out x", ["--out", "--resume"]),
        ("--overwrite", ["--overwrite"]),
        ("--micro-batch-size 0", ["--micro-batch-size", "at least 1"]),
    ],
)
def test_resume_refuses_options_that_would_change_the_numbers(
    training: mock.Mock, small_run: Path, capsys: Capture, arguments: str, expected: list[str]
) -> None:
    message = fails(capsys, "train", "--resume", str(small_run), *arguments.split())
    assert [word for word in expected if word not in message] == []
    assert "--resume" in fails(capsys, "train", "demo", "--resume", str(small_run))
    assert (training.train.call_count, training.resume.call_count) == (0, 0)


def test_a_run_in_runs_is_suggested(tmp_path: Path, monkeypatch: Patch, small_run: Path, capsys: Capture) -> None:
    (tmp_path / "runs").mkdir()
    small_run.rename(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    assert "runs/demo" in fails(capsys, "train", "--resume", "demo")
    (tmp_path / "my.txt").write_text("text")
    assert "--data my.txt" in fails(capsys, "train", "my.txt")


@pytest.mark.parametrize("command", [["demo"], ["--resume", "RUN"]])
def test_a_run_that_does_not_fit_in_memory_needs_force(
    training: mock.Mock, small_run: Path, capsys: Capture, monkeypatch: Patch, command: list[str]
) -> None:
    problem = "an update needs 9 GB and this machine has 1 GB free; use --micro-batch-size 2"
    monkeypatch.setattr("glassgpt.planning.memory.check_memory", lambda *arguments: problem)
    arguments = ["train", *(str(small_run) if word == "RUN" else word for word in command)]
    message = fails(capsys, *arguments)
    assert problem in message
    assert "--force" in message
    assert (training.train.call_count, training.resume.call_count) == (0, 0)
    assert main([*arguments, "--force"]) == 0
    assert problem in capsys.readouterr().err
    assert training.train.call_count + training.resume.call_count == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trian", "did you mean 'train'"),
        ("--vresion", "did you mean '--version'"),
        ("tokenizer", "error: tokenizer needs a second word (commands: tokenizer train, tokenizer show)"),
        ("data", "error: data needs a second word (commands: data info)"),
        ("tokenizer trian", "did you mean 'tokenizer train'"),
        ("train demmo", "did you mean 'demo'"),
        ("train --model.n-lyer 3", "did you mean '--model.n-layer'"),
        ("train --n-layer 3", "did you mean '--model.n-layer'"),
        ("train --step 3", "did you mean '--steps'"),
        ("train --optim.schedule cosin", "'cosine'"),
        ("eval x --splt train", "did you mean '--split'"),
        ("train --steps 3 demo", "a recipe comes first"),
        ("train --steps ten", "--steps: must be a whole number, got 'ten'"),
        ("train --optim.lr fast", "--optim.lr: must be a number, got 'fast'"),
        ("train --optim.lr nan", "optim.lr must be a number"),
        ("train --model.norm-bias foo", "--model.norm-bias: must be one of 'True', 'False', 'none', got 'foo'"),
        ("eval x --split foo", "--split: must be one of 'validation', 'train', 'all', 'none', got 'foo'"),
        ("train --resume /etc/passwd", "/etc/passwd is not a run"),
        ("info path/to/llama", "check the path"),
        ("info runs/nonexistent", "train --out runs/nonexistent"),
        ("train --optim.lr", "--optim.lr"),
        ("train --data.tokenizer charcters", ".json file, got 'charcters'; did you mean 'characters'?"),
        ("train --model.n-head 7", "error: --model.n-head must be"),
        ("train --seed -1", "error: --seed must be at least 0"),
        ("train --data a --data.source b", "give one of them"),
        ("train --data a --data b", "give one of them"),
        ("train missing.toml", "missing.toml"),
        ("generate", "REF is missing"),
        ("generate a --prompt x --prompt-file y", "--prompt-file"),
        ("generate a --prompt-file /nonexistent/x", "cannot read /nonexistent/x"),
        ("prepare x --validation-fraction 2", "error: --validation-fraction must be"),
        ("prepare x --tokenizer y", "error: --tokenizer must be"),
        ("prepare x --tokeniser gpt2", "did you mean '--tokenizer'"),
        ("prepare -- -x --tokenizer gpt2", "'--tokenizer' is an option, but after --"),
        ("prepare -x.txt", "./-x"),
        ("train --data.mixture a=0.1 b=0.5 a=0.9", "error: --data.mixture: 'a' is given twice"),
        ("train --data.mixture a=0.1 --data.mixture b=0.5", "error: --data.mixture is given twice"),
        ("train --probe.prompts a --probe.prompts=b", "error: --probe.prompts is given twice"),
        ("train --data.mixture b=-1", "error: --data.mixture must be sources with weights above 0"),
        ("prepare x --workers 1000000000", "error: --workers must be at least 1 and at most 4,096"),
        ("train --data.encoding x", "error: --data.encoding must be"),
        ("train --encoding x", "error: --encoding must be"),
        ("train --batch_start 3", "error: --batch-start must be"),
        ("generate x --n 0", "error: --n must be"),
        ("generate x --seed -1", "error: --seed must be"),
        ("generate x --temperature -1", "error: --temperature must be"),
        ("generate x --prompt -abc", "--prompt=-"),
        ("eval x --hellaswag-items 0", "error: --hellaswag-items must be"),
        ("plan --gpus 0", "error: --gpus must be"),
        ("play --port 65536", "65,535"),
        ("tokenizer train x --vocab-size 999999999999999999999999999999", "error: --vocab-size must be"),
        ("train --out=", "--out: must be a path"),
        ("train --resume=", "--resume"),
        ("report nonexistent", "nonexistent"),
        ("report", "needs a run"),
        ("recipes gtp2", "did you mean 'gpt2'"),
    ],
)
def test_errors_name_the_mistake_or_the_fix(arguments: str, expected: str, capsys: Capture) -> None:
    assert expected in fails(capsys, *arguments.split())


# exit codes


def test_errors_of_training_become_messages_and_exit_codes(training: mock.Mock, capsys: Capture) -> None:
    training.train.side_effect = UserError("the run is there already")
    assert "the run is there already" in fails(capsys, "train")
    training.train.side_effect = MemoryError()
    assert "--micro-batch-size" in fails(capsys, "train")
    training.train.side_effect = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
    )
    assert "--micro-batch-size" in fails(capsys, "train")
    for error in (OSError(errno.EIO, "failed", "a/file"), OSError(errno.EMFILE, "full"), OSError(99, "odd", "a/file")):
        training.train.side_effect = error
        message = fails(capsys, "train")
        assert ("a/file" if error.filename else "ulimit -n") in message
        assert message.count("\n") == 1
    training.train.side_effect = OSError("a defect")
    with pytest.raises(OSError, match="a defect"):
        main(["train"])
    training.train.side_effect = RuntimeError("can't start new thread")
    assert "ulimit -u" in fails(capsys, "train")
    training.train.side_effect = KeyboardInterrupt()
    assert main(["train"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    training.train.side_effect = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train"])


@pytest.mark.parametrize(
    ("set_by_user", "spins"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
    ids=["nothing", "spin count", "policy"],
)
def test_threads_spin_briefly_unless_the_user_sets_a_wait_policy(
    set_by_user: dict[str, str], spins: str | None, monkeypatch: Patch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that the fixture also undoes what `main` sets
        monkeypatch.delenv(name)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_no_command_prints_the_overview_and_fails(capsys: Capture) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_python_m_glassgpt_runs_and_a_closed_pipe_is_not_an_error() -> None:
    assert run_process("-m", "glassgpt", "--version").stdout.startswith("glassgpt ")
    process = subprocess.Popen(
        [sys.executable, "-m", "glassgpt", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()  # long before the process writes
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0


def test_output_is_utf8_in_any_locale(tmp_path: Path) -> None:
    path = tmp_path / "мой.toml"
    path.write_text("# Über тест 語\nsteps = 1\n", encoding="utf-8")
    result = run_process("-m", "glassgpt", "recipes", str(path), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stdout) == (0, path.read_text(encoding="utf-8"))


# generate


@pytest.fixture
def fake_generate(monkeypatch: Patch) -> Callable[[Sequence[tuple[str, int]]], mock.Mock]:
    """Return a function that makes `generate` yield these (text, sample) pieces and returns the mock."""
    monkeypatch.setattr(
        glassgpt.interop.references,
        "load",
        mock.create_autospec(glassgpt.interop.references.load, return_value=(None, None)),
    )

    def install(pieces: Sequence[tuple[str, int]]) -> mock.Mock:
        tokens = [GeneratedToken(text, token_id=0, sample=sample) for text, sample in pieces]
        recorder: mock.Mock = mock.create_autospec(
            glassgpt.generation.generate.generate, side_effect=lambda *a, **k: iter(tokens)
        )
        monkeypatch.setattr(glassgpt.generation.generate, "generate", recorder)
        return recorder

    return install


FakeGenerate = Callable[[Sequence[tuple[str, int]]], mock.Mock]


def test_generate_prints_each_piece_immediately(fake_generate: FakeGenerate, capsys: Capture) -> None:
    seen: list[str] = []

    def pieces(*arguments: object, **options: object) -> Iterator[GeneratedToken]:
        for text in ("a", "", "语"):
            seen.append(capsys.readouterr().out)
            yield GeneratedToken(text, token_id=0, sample=0)
        seen.append(capsys.readouterr().out)

    fake_generate([]).side_effect = pieces
    assert main(["generate", "runs/x", "--prompt", "Да"]) == 0
    assert seen == ["Да", "a", "", "语"]


def test_generate_passes_on_its_options(fake_generate: FakeGenerate, capsys: Capture) -> None:
    recorder = fake_generate([("x", 0), ("p", 1), ("y", 0), ("q", 1)])
    options = "--n 2 --max-new-tokens 9 --top-k 3 --top-p 0.5 --min-p 0.1 --greedy --stop a --stop b --seed 5"
    options += " --no-cache --device cpu"
    assert main(["generate", "runs/x", *options.split(), "--prompt", "- "]) == 0
    given = recorder.call_args
    assert given.args[2] == "- "
    assert given.kwargs == {
        "n": 2,
        "max_new_tokens": 9,
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "stop": ("a", "b"),
        "seed": 5,
        "use_cache": False,
        "precision": "auto",
    }
    assert re.fullmatch(r"- xy\n-+\n- pq\n", capsys.readouterr().out)


def piped(monkeypatch: Patch, data: bytes) -> None:
    """Make standard input a pipe with these bytes."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    monkeypatch.setattr(sys, "stdin", open(reader, encoding="utf-8"))  # noqa: SIM115


def test_prompts_come_from_a_file_or_standard_input(
    fake_generate: FakeGenerate, monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    recorder = fake_generate([("!", 0)])

    def prompt_of(*arguments: str) -> str:
        assert main(["generate", "runs/x", *arguments]) == 0
        text: str = recorder.call_args.args[2]
        return text

    file = tmp_path / "prompt.txt"
    file.write_bytes("née\r\n".encode())
    assert prompt_of("--prompt-file", str(file)) == "née\r\n"
    file.write_bytes("\ufeffnée".encode())
    assert prompt_of("--prompt-file", str(file)) == "née"
    piped(monkeypatch, "日本\n".encode())
    assert prompt_of() == "日本\n"
    piped(monkeypatch, b"piped")
    assert prompt_of("--prompt", "-") == "piped"
    piped(monkeypatch, b"piped")
    assert prompt_of("--prompt", "given") == "given"
    piped(monkeypatch, b"")
    capsys.readouterr()
    assert prompt_of() is None
    assert capsys.readouterr().out == "!\n"  # without a prompt, only the generated text is printed
    piped(monkeypatch, b"ab\xff")
    assert "offset 2" in fails(capsys, "generate", "runs/x", "--prompt", "-")


# eval, recipes, prepare

PROVENANCE = {"model": "runs/x", "step": 7, "quantization": None, "precision": "float32"}
PROVENANCE |= {"data": "t.txt", "split": "train", "context_length": 16}


def test_eval_prints_a_table_and_writes_json(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    document = {"document": 3, "tokens": 20, "loss": 2.5, "bits_per_byte": 3.0, "text": "once\nupon"}
    figures: dict[str, Any] = {"loss": 1.5, "perplexity": float("inf"), "bits_per_byte": 2.25, "tokens": 1234}
    figures |= {"loss_by_position": [4.0, 3.0, 2.0], "tokens_by_position": [5, 3, 1], **PROVENANCE}
    figures |= {
        "worst_documents": [document],
        "document_count": 7,
        "documents": {"document": [3], "loss": [float("nan")]},
    }
    recorder = mock.create_autospec(glassgpt.evaluation.perplexity.evaluate, return_value=figures)
    monkeypatch.setattr(glassgpt.evaluation.perplexity, "evaluate", recorder)
    load = mock.create_autospec(glassgpt.interop.references.load_model)
    monkeypatch.setattr(glassgpt.interop.references, "load_model", load)
    path = tmp_path / "new" / "figures.json"
    assert (
        main(["eval", "runs/x@best", "--data", "t.txt", "--split", "train", "--quantize", "int8", "--json", str(path)])
        == 0
    )
    settings: dict[str, Any] = {"source": "t.txt", "split": "train", "column": None, "encoding": None, "errors": None}
    settings |= {"skip_bad": None, "documents": True, "quantize": "int8", "log": mock.ANY}
    settings |= {"context_length": None, "tokens": False, "delimiter": None, "split_on": None}
    assert load.call_args.args[0] == "runs/x@best"
    assert recorder.call_args == mock.call(load.return_value, **settings)
    written = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert written == {
        "glassgpt": version("glassgpt"),
        **figures,
        "perplexity": None,
        "documents": {"document": [3], "loss": [None]},
    }
    reported = capsys.readouterr().out
    assert re.search(r"^loss +1\.5000 nats", reported)
    assert re.search(r"\n1 +4\.0000\n2 to 3 +2\.7500\n\n.*7 documents", reported)
    assert re.search(r"\nnumber 3 +2\.5000 +3\.000  once upon\n", reported)


def test_export_prints_the_folder_and_the_architecture(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").touch()
    recorder = mock.create_autospec(glassgpt.interop.references.export, return_value="Llama")
    monkeypatch.setattr(glassgpt.interop.references, "export", recorder)
    assert main(["export", "runs/x@best", "--out", str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    recorder.assert_called_once_with("runs/x@best", tmp_path / "hf", "bfloat16")
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}: Llama, for AutoModelForCausalLM and AutoTokenizer\n"
    assert "--out" in fails(capsys, "export", "runs/x")


def test_recipes_lists_all_recipes_or_prints_one(capsys: Capture) -> None:
    assert main(["recipes"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert sorted(rows) == recipe_names()
    assert re.search(r"\b124M\b +\S", rows["gpt2"])  # Radford et al. (2019), as corrected by OpenAI
    assert main(["recipes", "demo"]) == 0
    assert capsys.readouterr().out == recipe_text("demo")


def test_prepare_prints_the_folder_and_the_number_of_tokens(tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("0123456789" * 100)
    out = tmp_path / "dataset"
    assert main(["prepare", str(text), "--tokenizer", "bytes", "--validation-fraction", "0.2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert re.search(r"train +800 tokens\n +validation +200 tokens", printed)


# progress


def drive(progress: Any, run: Path, seconds_per_step: float, tick: Callable[[float], None]) -> None:
    """Report a run of ten steps to `progress`, calling `tick(seconds_per_step)` before each step."""
    progress.started(run, recipe("demo"), "a small model", 0, 10)
    progress.evaluated({"step": 0, "val_loss": 4.0, "val_perplexity": 54.6, "val_bits_per_byte": 5.77})
    for step in range(1, 11):
        tick(seconds_per_step)
        progress.step({"step": step, "loss": None if step == 1 else 1 / step, "lr": 1e-3, "tokens_per_second": 1500.0})
    progress.message("a notice")
    progress.sampled(10, ["one [red]line\x1b[2J\n" + "and more " * 50, "second"])
    progress.finished(run)


def test_plain_progress_prints_a_line_every_few_seconds() -> None:
    now = [100.0]
    out = io.StringIO()

    def tick(seconds: float) -> None:
        now[0] += seconds

    drive(Progress(5.0, out, clock=lambda: now[0]), Path("runs/x"), 2.0, tick)
    lines = out.getvalue().splitlines()
    steps = [line for line in lines if re.match(r"step \d+/10  loss", line)]
    assert [int(re.findall(r"\d+", line)[0]) for line in steps] == [1, 4, 7, 10]
    assert "loss ?" in steps[0]
    assert "? left" in steps[0]
    assert "0:12 left" in steps[1]  # 6 steps of 2 s
    assert any("validation loss 4.0000" in line for line in lines)
    assert "\x1b" not in out.getvalue()
    assert lines[-1] == "done: runs/x"


def test_a_closed_output_does_not_stop_the_run() -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    drive(Progress(0.0, Closed()), Path("runs/x"), 0.0, lambda seconds: None)


def test_progress_escapes_characters_that_the_output_cannot_encode() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")  # a variable keeps it alive: it closes `raw` when it is deleted
    Progress(stream=stream).sampled(1, ["語"])
    assert b"\\u8a9e" in raw.getvalue()


def test_train_uses_plain_lines_without_a_terminal(training: mock.Mock, capsys: Capture) -> None:
    trained_config(training)
    progress = training.train.call_args.kwargs["progress"]
    assert isinstance(progress, Progress)
    drive(progress, Path("runs/x"), 0.0, lambda seconds: None)
    assert "\x1b" not in capsys.readouterr().out


def test_train_uses_the_live_display_on_a_terminal(training: mock.Mock, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    trained_config(training)
    assert isinstance(training.train.call_args.kwargs["progress"], RichProgress)


def test_live_display_shows_figures_and_restores_the_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)

    def interrupted() -> None:
        with RichProgress(console) as progress:
            drive(progress, Path("runs/x"), 0.0, lambda seconds: None)
            progress.started(Path("runs/x"), recipe("demo"), "again", 0, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = out.getvalue()
    assert "10/10" in text
    assert "loss 0.100" in text
    assert "val 4.000" in text
    assert "1,500 tok/s" in text
    assert "one [red]line" in text  # a sample's brackets are not markup
    assert "\x1b[2J" not in text  # a sample cannot clear the screen
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "?"), (0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (7384, "2:03:04")]
)
def test_format_duration(seconds: float | None, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_short_options_are_aliases_of_data_options(training: mock.Mock, capsys: Capture) -> None:
    config = trained_config(
        training,
        "demo",
        "--data",
        "t.txt",
        "--encoding",
        "latin-1",
        "--errors",
        "replace",
        "--skip-bad",
        "--column=a",
        "--delimiter=;",
        "--split-on",
        "<|endoftext|>",
    )
    capsys.readouterr()
    expected = {"source": "t.txt", "encoding": "latin-1", "errors": "replace", "skip_bad": True, "column": "a"}
    expected |= {"delimiter": ";", "split_on": "<|endoftext|>"}
    assert config == recipe("demo", data=expected)
    for again in ("--data.skip-bad", "--data.no-skip-bad", "--data.skip_bad"):
        assert "--skip-bad and --data.skip-bad are the same" in fails(capsys, "train", "--skip-bad", again)
    assert "--encoding and --data.encoding are the same" in fails(
        capsys, "train", "--encoding", "utf-8", "--data.encoding", "utf-8"
    )


def test_a_text_on_the_command_line_replaces_the_recipes_mixture(
    training: mock.Mock, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('steps = 3\n[data.mixture]\n"a.txt" = 0.5\n"b.txt" = 0.5\n')
    assert trained_config(training, str(file)).data.sources == ("a.txt", "b.txt")
    for option in ("--data", "--data.source"):
        # `validation-source` is only valid with one text, so it shows that the mixture is gone.
        config = trained_config(training, str(file), option, "c.txt", "--data.validation-source", "d.txt")
        assert (config.data.sources, config.data.mixture) == (("c.txt",), {})
        capsys.readouterr()
        assert "--data.mixture" in fails(capsys, "train", option, "c.txt", "--data.mixture", "a.txt=1")
    assert trained_config(training, "demo", "--data.mixture", "a.txt=1", "b.txt=2").data.sources == ("a.txt", "b.txt")


def test_probe_prompts_takes_several_values(training: mock.Mock, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('steps = 3\n[probe]\nprompts = ["a b", "c"]\n')
    for given, expected in (([], ["a b", "c"]), (["none"], []), (["d e", "-5", "none"], ["d e", "-5", "none"])):
        options = ["--probe.prompts", *given] if given else []
        config = trained_config(training, str(file), *options, "--probe.tokens", "7")
        assert (config.probe.prompts, config.probe.tokens) == (expected, 7)


def test_a_recipe_that_needs_a_model_names_init_from(capsys: Capture) -> None:
    assert "--init-from" in fails(capsys, "train", "finetune-shakespeare")


def test_invalid_paths_are_explained(capsys: Capture, tmp_path: Path) -> None:
    name = "x" * 300
    for arguments in (
        ["generate", name],
        ["info", name],
        ["report", name],
        ["train", "--out", name],
        ["train", "--resume", name],
    ):
        assert "too long" in fails(capsys, *arguments), arguments
    assert f"--json {tmp_path} is a directory; name a file" in fails(capsys, "eval", "x", "--json", str(tmp_path))


@pytest.mark.linux
def test_pipes_and_devices_are_neither_read_nor_waited_for(capsys: Capture, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "bytes.toml").write_bytes(b"\xff\0")
    for name in ("pipe.toml", "zero.toml", "folder.toml", "bytes.toml", "missing.toml"):
        path = str(tmp_path / name)
        assert name in fails(capsys, "plan", path)
        assert name in fails(capsys, "generate", "x", "--prompt-file", path)
        assert name in fails(capsys, "eval", "x", "--hellaswag", "--hellaswag-file", path)
    for path in (str(tmp_path / "pipe.toml"), "/dev/full", "/proc/x"):
        assert path in fails(capsys, "eval", "x", "--json", path)
        assert path in fails(capsys, "bench", "--json", path)


@pytest.mark.linux
def test_a_prompt_may_come_from_a_pipe_of_the_shell(fake_generate: FakeGenerate) -> None:
    """As in `--prompt-file <(command)`, whose pipe may still be empty."""
    recorder, (reader, writer) = fake_generate([("!", 0)]), os.pipe()
    with subprocess.Popen(["sh", "-c", "sleep 0.1; printf Once"], stdout=writer):
        os.close(writer)
        assert main(["generate", "runs/x", "--prompt-file", f"/dev/fd/{reader}"]) == 0
    os.close(reader)
    assert recorder.call_args.args[2] == "Once"


def test_a_name_with_control_characters_is_shown_escaped_on_one_line(capsys: Capture) -> None:
    message = fails(capsys, "report", "runs/\x1b[31m\nx")
    assert r"runs/\x1b[31m\nx" in message
    assert message.count("\n") == 1


def test_a_long_argument_is_shortened(capsys: Capture) -> None:
    for arguments in (["train", "x" * 10**5], ["train", "--" + "x" * 10**5], ["train", "--steps", "9" * 10**5]):
        assert len(fails(capsys, *arguments)) < 1500


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(command: str, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    too_long = [line for line in text.splitlines() if len(line) > 80 and not line.startswith(("usage:", "  "))]
    assert too_long == []
    assert "(default: )" not in text


def test_the_help_of_plan_leaves_out_what_only_training_uses(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert [option for option in ("--out", "--overwrite", "--resume", "--force", "--log") if option in text] == []
    assert "--steps" in text
    command = ["plan", "gpt2", "--device", "h100", "--out", "runs/x", "--overwrite", "--log", "wandb", "--force"]
    assert main(command) == 0


def test_a_misspelt_compile_backend_is_refused_before_the_run_starts(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the quick brown fox " * 200)
    options = [
        "--data",
        str(tmp_path / "t.txt"),
        "--out",
        str(tmp_path / "run"),
        "--compile",
        "on",
        "--compile-backend",
        "inducter",
    ]
    assert main(["train", "demo", *options]) == 2
    assert "did you mean 'inductor'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_standard_output_on_a_full_disk_is_reported_without_a_traceback() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "glassgpt", "recipes"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (
        2,
        "glassgpt: error: cannot write standard output: the disk is full\n",
    )


@pytest.mark.parametrize(
    ("on_path", "expected"), [(None, "'{folder}/glassgpt'"), ("here", "glassgpt"), ("elsewhere", "'{folder}/glassgpt'")]
)
def test_program_is_the_bare_name_only_if_path_leads_to_this_glassgpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_path: str | None, expected: str
) -> None:
    for name in ("my venv/glassgpt", "elsewhere/glassgpt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "here").symlink_to(tmp_path / "my venv")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / on_path) if on_path else "")
    assert program() == expected.format(folder=tmp_path / "my venv")


def test_a_closed_standard_output_is_not_an_error() -> None:
    result = subprocess.run(f"{sys.executable} -m glassgpt recipes >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_eval_json_does_not_overwrite_a_file_that_is_not_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    figures = {
        "loss": 1.0,
        "perplexity": 2.7,
        "bits_per_byte": 1.4,
        "tokens": 9,
        "loss_by_position": [1.0],
        "tokens_by_position": [9],
        **PROVENANCE,
    }
    monkeypatch.setattr(glassgpt.evaluation.perplexity, "evaluate", mock.Mock(return_value=figures))
    monkeypatch.setattr(glassgpt.interop.references, "load_model", mock.Mock())
    (tmp_path / "text.txt").write_text("To be or not to be")
    for text in ("To be or not to be", '{"important": 1}', "[]", '{"glassgpts": "1"}'):
        (tmp_path / "text.txt").write_text(text)
        assert "name another file" in fails(capsys, "eval", "runs/x", "--json", str(tmp_path / "text.txt"))
        assert (tmp_path / "text.txt").read_text() == text
    for _ in range(2):  # an earlier result is replaced
        assert main(["eval", "runs/x", "--json", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == {"glassgpt": version("glassgpt"), **figures}


def test_json_can_be_written_to_a_pipe(tmp_path: Path) -> None:
    """Neither a named pipe nor standard output is read first: that would wait for ever."""
    (tmp_path / "text.txt").write_text("To be or not to be")
    dataset, pipe = str(tmp_path / "dataset"), tmp_path / "pipe"
    assert main(["prepare", str(tmp_path / "text.txt"), "--out", dataset]) == 0
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    named = run_process("-m", "glassgpt", "data", "info", dataset, "--json", str(pipe))
    assert (named.returncode, named.stderr) == (0, "")
    facts = json.loads(os.read(reader, 1 << 16))
    os.close(reader)
    assert facts["splits"]["train"]["tokens"] == 16
    standard = run_process("-m", "glassgpt", "data", "info", dataset, "--json", "/dev/stdout")
    assert (standard.returncode, standard.stderr) == (0, "")
    figures = standard.stdout[standard.stdout.index("\n{\n") : standard.stdout.index("\n}\n") + 2]
    assert json.loads(figures) == facts
    # In a file, it comes after the lines that are printed, and nothing replaces /dev/stdout itself.
    command = [sys.executable, "-m", "glassgpt", "data", "info", dataset, "--json", "/dev/stdout"]
    with open(tmp_path / "printed", "w") as printed:
        subprocess.run(command, stdout=printed, check=True)
    assert Path("/dev/stdout").is_symlink()
    assert figures in (tmp_path / "printed").read_text()


@pytest.mark.parametrize("option", ["--model.n-layer", "--model.n_layer=7"])
def test_an_architecture_option_with_init_from_is_refused(
    training: mock.Mock, capsys: Capture, monkeypatch: Patch, option: str
) -> None:
    monkeypatch.setattr("glassgpt.cli.train._check_memory", lambda config, force: None)
    start = ["train", "demo", "--init-from", "runs/x"]
    message = fails(capsys, *start, *(option, "7")[: 1 if "=" in option else 2])
    assert "--model.n-layer" in message
    assert "--init-from" in message
    assert main([*start, "--model.context-length", "64", "--model.dropout", "0.1"]) == 0


def test_a_closed_terminal_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            self.write("")

    monkeypatch.setattr(sys, "stdout", Gone())
    with RichProgress() as progress:
        progress.started(Path("run"), recipe("demo"), "a model", 0, 10)
        progress.step({"step": 1, "loss": 2.0})
        progress.sampled(1, ["text"])
        progress.finished(Path("run"))
    plain = Progress(stream=Gone())
    plain.message("nobody reads this")


def test_the_help_of_plan_names_every_gpu() -> None:
    """The list stands in a docstring, which a new GPU does not change."""
    assert set(GPUS) <= set(re.findall(r"[\w-]+", Plan.__doc__ or ""))
