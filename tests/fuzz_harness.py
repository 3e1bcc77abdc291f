"""Seeded fuzz cases: damaged or odd settings and files, each given to a command in a forked child with limits.

A case damages one thing in its own copy of small, sound files (`make_files`) and runs one command on them. The command
must refuse it in a few lines, or give the right result: that of the sound files, of transformers or of the tokenizers
library. `tests/test_fuzz.py` runs a few hundred cases and `benchmarks/fuzz.py` thousands. Linux only, since it forks.
"""

import contextlib
import copy
import hashlib
import importlib
import io
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

import glassgpt
from glassgpt.cli import main as command_line

SECONDS, BYTES = 20.0, 4 << 30  # limits of a case
_ADDRESS_SPACE = 24 << 30  # of a child, so that the machine survives: torch alone maps several gigabytes
_NUMBERS = re.compile(r"\bnan\b|\binf\b")
LONGEST_ERROR = 2_000  # characters

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e300, -1e300, 1e-300, float("nan"), float("inf"), 2**31, 2**32,
    2**53 + 1, 2**63, 2**64, 10**18, 10**50, "", " ", "x", "-1", "3", "none", "../x", "/dev/zero", "a" * 300, "\x00",
    "\n", "\u00e9", [], [0], [-1], ["x"], [[]], {}, {"a": 1},
)  # fmt: skip


@dataclass
class Case:
    """One case: what was damaged, the command, and how to tell a wrong result from a right one."""

    kind: str
    damage: str
    arguments: Sequence[str]
    # Called in the child after exit code 0: a description of a wrong result, or None.
    wrong: Callable[[], str | None] = lambda: None


@dataclass
class Outcome:
    """How a case ended."""

    case: Case
    fault: str | None  # None: done, or refused as it should be
    refused: bool
    seconds: float
    peak_bytes: int
    output: str
    number: int = -1


@dataclass
class Files:
    """The sound files, and the results of the commands on them."""

    root: Path
    reference: dict[str, Any] = field(default_factory=dict)


def import_all() -> None:
    """Import what the commands import when they run, so that the forked children need not."""
    import pyarrow.parquet  # noqa: F401
    import transformers

    for module in pkgutil.walk_packages(glassgpt.__path__, "glassgpt."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("GPT2LMHeadModel", *(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen3", "Starcoder2"))):
        getattr(transformers, name)


def in_child(action: Callable[[], int], folder: Path) -> tuple[int, float, int]:
    """Run `action` in a forked child in a folder, with limits. Returns its wait status, seconds and peak bytes.

    Its standard output and error are in `folder.out`, next to the folder.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _become_child(action, folder)
    began = time.monotonic()
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # by as much, a busy machine takes longer
        seconds = (time.monotonic() - began) / busy
        if ended:
            return status, seconds, usage.ru_maxrss * 1024
        if seconds > SECONDS:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, SECONDS, usage.ru_maxrss * 1024
        time.sleep(0.002)


def _become_child(action: Callable[[], int], folder: Path) -> None:
    code = 70
    try:
        output = os.open(folder.with_name(f"{folder.name}.out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, target)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        os.chdir(folder)
        os.environ["GLASSGPT_CACHE"] = str(folder / ".cache")
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.fsync = lambda fd: None  # no power fails here, and it would take most of the time
        code = action()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_case(case: Case, folder: Path) -> Outcome:
    """Run a case in its folder."""

    def action() -> int:
        code = command_line.main(list(case.arguments))
        if code == 0 and (problem := case.wrong()):
            print(f"WRONG: {problem}", flush=True)
            return 71
        return code

    status, seconds, peak = in_child(action, folder)
    output = folder.with_name(f"{folder.name}.out").read_text(encoding="utf-8", errors="replace")
    code = os.waitstatus_to_exitcode(status)
    fault = None
    if seconds >= SECONDS:
        fault = "hang"
    elif peak > BYTES or "out of memory" in output:
        fault = "memory"
    elif code == 71:
        fault = "wrong result"
    elif code == 0:
        asked = " ".join([case.damage, *case.arguments]).lower()
        fault = "not a number" if set(_NUMBERS.findall(output.lower())) - set(_NUMBERS.findall(asked)) else None
    elif code < 0:
        fault = f"ended by signal {-code}"
    elif code != 2 or "Traceback" in output:
        fault = "traceback"
    elif "error: " not in output or len(output[output.index("error: ") :]) > LONGEST_ERROR:
        fault = "error text"
    return Outcome(case, fault, code == 2, seconds, peak, output)


# ---------------------------------------------------------------------------------------------------- the sound files


def make_files(root: Path) -> Files:
    """Write the sound files: texts, a dataset, a run, models of other projects, token files and a tokenizer."""
    root.mkdir(parents=True)
    files = Files(root)

    def action() -> int:
        _write_texts(root / "texts")
        _write_run(root)
        _write_models(root / "models")
        (root / "reference.json").write_text(json.dumps(_reference(root)))
        return 0

    status, _, _ = in_child(action, root)
    if status:
        raise RuntimeError(root.with_name(f"{root.name}.out").read_text(errors="replace"))
    files.reference = json.loads((root / "reference.json").read_bytes())
    return files


def _write_texts(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    lines = [f"{n} is a number, and {n * n} its square: h\u00e9llo, w\u00f6rld." for n in range(400)]
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": line, "id": n}) for n, line in enumerate(lines)))
    (folder / "c.csv").write_text("id,text\n" + "\n".join(f'{n},"{line}"' for n, line in enumerate(lines)))
    parquet.write_table(pyarrow.table({"text": lines}), folder / "d.parquet")
    import gzip

    (folder / "e.txt.gz").write_bytes(gzip.compress((folder / "a.txt").read_bytes()))


RECIPE: dict[str, Any] = {
    "name": "small", "steps": 4, "batch_tokens": 64, "micro_batch_size": 2, "eval_every": 2, "checkpoint_every": 2,
    "eval_tokens": 256, "device": "cpu", "precision": "float32", "compile": "off", "seed": 1, "keep_checkpoints": 2,
    "model": {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16, "vocab_multiple": 1, "dropout": 0.0,
        "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "tied_head": True, "bias": True,
    },
    "data": {"source": "texts/a.txt", "tokenizer": "bytes", "order": "shuffled", "validation_fraction": 0.1},
    "optim": {
        "name": "adamw", "lr": 0.01, "schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1, "grad_clip": 1.0,
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "min_lr_ratio": 0.1,
    },
    "sample": {"count": 1, "max_new_tokens": 8, "temperature": 0.8, "top_k": 50},
    "probe": {"tokens": 8, "every": 2},
}  # fmt: skip


def _write_run(root: Path) -> None:
    _command("tokenizer", "train", "texts/a.txt", "--vocab-size", "300", "--out", "tokenizer.json")
    _command("prepare", "texts/b.jsonl", "--tokenizer", "bytes", "--shard-tokens", "9000", "--out", "dataset")
    recipe = copy.deepcopy(RECIPE)
    recipe["data"]["source"] = str(root / "dataset")
    (root / "recipe.toml").write_text(tomli_w.dumps(RECIPE))
    (root / "run.toml").write_text(tomli_w.dumps(recipe))
    _command("train", "run.toml", "--out", "run")


def _write_models(folder: Path) -> None:
    import numpy as np
    import torch
    import transformers

    folder.mkdir()
    sizes = {"vocab_size": 300, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    llama = {
        "vocab_size": 300, "max_position_embeddings": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 24, "bos_token_id": None, "eos_token_id": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    for name, settings in {
        "GPT2": {**sizes, "bos_token_id": None, "eos_token_id": 256}, "Llama": llama,
        "Mistral": {**llama, "sliding_window": 8}, "Qwen3": {**llama, "head_dim": 8}, "Starcoder2": llama,
    }.items():  # fmt: skip
        config: Any = getattr(transformers, f"{name}Config")(**settings)
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(config)
        model.save_pretrained(folder / name)
        shutil.copy("tokenizer.json", folder / name)
    (tokens := Path("tokens")).mkdir()
    ids = np.random.default_rng(0).integers(0, 300, 3_000).astype("<u2")
    ids[:2_500].tofile(tokens / "train.bin")
    ids[2_500:].tofile(tokens / "val.bin")
    shutil.copy("tokenizer.json", tokens)


def _command(*arguments: str) -> None:
    if code := command_line.main(arguments):
        raise RuntimeError(f"{arguments} ended with {code}")


GENERATE = ("generate", "run", "--max-new-tokens", "8", "--prompt", "4 is", "--device", "cpu")


def _reference(root: Path) -> dict[str, Any]:
    """The right results: losses of the dataset and the token files, and the weights of the resumed run."""
    found = {}
    for data in ("dataset", "tokens"):
        model = "run" if data == "dataset" else "models/GPT2"
        _command("eval", model, "--data", str(root / data), "--json", f"{data}.json", "--device", "cpu")
        found[data] = json.loads(Path(f"{data}.json").read_bytes())["loss"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _command(*GENERATE)
    found["text"] = printed.getvalue()
    shutil.copytree("run", "resumed")
    _command("train", "--resume", "resumed", "--steps", "6")
    found["resumed"] = _weights_hash(Path("resumed"))
    shutil.rmtree("resumed")
    return found


def _weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "checkpoints" / "000006" / "model.safetensors").read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------------------------- the damages


def damage_bytes(rng: random.Random, path: Path) -> str:
    """Damage a file's bytes in one of many ways; returns what was done."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 8, 100, 4000))
    match rng.randrange(12):
        case 0 | 1 | 2:
            place = min(place, max(0, len(data) - 1))
            bit = rng.randrange(8)
            if data:
                data[place] ^= 1 << bit
            done = f"bit {bit} of byte {place} flipped"
        case 3:
            data[place : place + length] = bytes(len(data[place : place + length]))
            done = f"{length} zero bytes at {place}"
        case 4:
            del data[place:]
            done = f"cut off at {place}"
        case 5:
            data[place:place] = rng.randbytes(length)
            done = f"{length} random bytes inserted at {place}"
        case 6:
            del data[place : place + length]
            done = f"{length} bytes deleted at {place}"
        case 7:
            data[place:place] = data[place : place + length]
            done = f"{length} bytes at {place} doubled"
        case 8:
            data = bytearray(rng.randbytes(rng.choice((0, 1, 7, 1000))))
            done = f"replaced by {len(data)} random bytes"
        case 9:
            return _replace_by_special(rng, path)
        case 10:
            path.unlink()
            return "removed"
        case _:
            others = [each for each in sorted(path.parent.iterdir()) if each.is_file()]
            other = rng.choice(others)
            data = bytearray(other.read_bytes())
            done = f"replaced by {other.name}"
    path.unlink()
    path.write_bytes(data)
    return done


def _replace_by_special(rng: random.Random, path: Path) -> str:
    path.unlink()
    match rng.randrange(5):
        case 0:
            path.mkdir()
            return "replaced by a directory"
        case 1:
            os.mkfifo(path)
            return "replaced by a named pipe"
        case 2:
            path.symlink_to("/dev/zero")
            return "replaced by a link to /dev/zero"
        case 3:
            path.symlink_to(path.name)
            return "replaced by a link to itself"
        case _:
            path.symlink_to("missing")
            return "replaced by a dangling link"


def damage_value(rng: random.Random, value: Any) -> str:
    """Change one entry inside nested lists and tables; returns what was done."""
    holder, key = _random_place(rng, value)
    if holder is None:
        return "nothing"
    match rng.randrange(8):
        case 0:
            del holder[key]
            return f"{key!r} removed"
        case 1 if isinstance(holder, dict):
            holder[f"{key}{rng.choice(('', ' ', '_', 'x'))}"] = holder.pop(key)
            return f"{key!r} renamed"
        case 2:
            other, name = _random_place(rng, value)
            holder[key] = copy.deepcopy(other[name])
            return f"{key!r} set to the value of {name!r}"
        case 3:
            holder[key] = [holder[key]]
            return f"{key!r} in a list"
        case _:
            holder[key] = copy.deepcopy(rng.choice(ODD))
            return f"{key!r} set to {holder[key]!r}"[:200]


def _random_place(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A list or table inside a value and one of its keys; each level as likely, however many entries it has."""
    holder, key = None, None
    while isinstance(value, dict | list) and value and (holder is None or rng.randrange(4)):
        holder, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = holder[key]
    return holder, key


def damage_json(rng: random.Random, path: Path) -> str:
    """Damage a JSON file as text or as a value."""
    kind = rng.randrange(8)
    if kind == 0:
        return damage_bytes(rng, path)
    if kind == 1:
        depth = rng.choice((150, 5_000, 100_000))
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        return f"nested {depth} deep"
    value = json.loads(path.read_bytes())
    done = "; ".join(damage_value(rng, value) for _ in range(rng.choice((1, 1, 1, 2))))
    path.write_text(json.dumps(value))
    return done


def damage_toml(rng: random.Random, path: Path) -> str:
    """Damage a TOML file as text or as a value."""
    if rng.randrange(4) == 0:
        return damage_bytes(rng, path)
    value = tomllib.loads(path.read_text(encoding="utf-8"))
    done = damage_value(rng, value)
    with contextlib.suppress(TypeError, ValueError):  # TOML has no null
        path.write_text(tomli_w.dumps(value), encoding="utf-8")
        return done
    return "nothing"


def damage_file(rng: random.Random, path: Path) -> str:
    """Damage a file by its kind."""
    damage = {".json": damage_json, ".toml": damage_toml}.get(path.suffix, damage_bytes)
    return f"{path.name}: {damage(rng, path)}"


# ----------------------------------------------------------------------------------------------------------- the cases


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def config_case(rng: random.Random, files: Files, folder: Path) -> Case:
    """A recipe with one odd setting: planned for a GPU from its data sheet, or trained."""
    shutil.copytree(files.root / "texts", folder / "texts")
    path = folder / "recipe.toml"
    shutil.copy(files.root / "recipe.toml", path)
    damage = damage_toml(rng, path)
    if rng.randrange(3):
        return Case("config", damage, ["plan", "recipe.toml", "--device", rng.choice(("h100", "t4", "a100-80"))])
    # What takes long because the setting asks for it is no hang.
    short = ["--steps", "1", "--batch-tokens", "64", "--sample.max-new-tokens", "8"]
    return Case("config", damage, ["train", "recipe.toml", "--out", "out", *short])


# Options that take a file, text, a whole number, a number or nothing, for each command without its own.
_OPTIONS = {
    "generate": "--prompt --prompt-file --max-new-tokens --temperature --top-k --top-p --min-p --greedy --stop --n "
    "--seed --device --precision --quantize --no-cache",
    "eval": "--data --split --column --encoding --errors --skip-bad --context-length --json --token-losses --device "
    "--quantize --hellaswag-file --hellaswag-items --hellaswag",
    "info": "--json --device",
    "report": "--out",
    "export": "--out --dtype",
    "prepare": "--tokenizer --out --workers --column --encoding --errors --skip-bad --validation "
    "--validation-fraction --validation-source --deduplicate --shard-tokens --split-on --delimiter",
    "data info": "--json --skip-check",
    "tokenizer show": "--text --data --column --encoding",
    "tokenizer train": "--vocab-size --out --max-bytes --column",
    "recipes": "",
    "plan": "--gpus --device --steps --batch-tokens --model.n-layer --model.n-embd --data --out --resume",
}
_ARGUMENTS = ("run", "run@best", "run@4", "models/Llama", "dataset", "texts/a.txt", "texts", "tokens", "tokenizer.json",
              "recipe.toml", "run/checkpoints/000004", "nothing", "", ".", "run@x", "/dev/zero", "demo")  # fmt: skip
_VALUES = ("", "0", "-1", "1", "2", "7", "0.5", "-0.5", "1e300", "nan", "inf", "99999999999999999999", "9" * 60,
           "text", "-abc", "none", "bytes", "gpt2", "utf-8", "utf-16", "idna", "undefined", "cpu", "cuda:7", "int8",
           "texts/b.jsonl", "texts", "tokenizer.json", "run", "run/config.toml", "/dev/full", "/dev/zero", "/proc/x",
           "new/x.json", "a" * 300, "\udcff", "\n", "\u00e9", "float32", "bfloat16", "train", "all", ",",
           "\t")  # fmt: skip
# What takes long because it was asked for is no hang, and no file outside the case's folder may be written.
_LONG = {"--max-new-tokens", "--n", "--steps"}


def command_line_case(rng: random.Random, files: Files, folder: Path) -> Case:
    """A command with random arguments and options."""
    for name in ("texts", "run", "dataset", "tokens", "models/Llama"):
        shutil.copytree(files.root / name, folder / name)
    for name in ("tokenizer.json", "recipe.toml"):
        shutil.copy(files.root / name, folder)
    name = rng.choice(sorted(_OPTIONS))
    arguments = [*name.split()]
    if rng.randrange(8):
        good = {"plan": "recipe.toml", "prepare": "texts/a.txt", "data info": "dataset", "recipes": "demo",
                "tokenizer show": "tokenizer.json", "tokenizer train": "texts/a.txt"}  # fmt: skip
        arguments.append(rng.choice((good.get(name, "run"), good.get(name, "run"), rng.choice(_ARGUMENTS))))
    for option in rng.sample(options := _OPTIONS[name].split(), min(len(options), rng.randrange(4))):
        value = rng.choice(_VALUES)
        if option in _LONG and re.fullmatch(r"9{5,}", value):
            value = "3"
        if rng.randrange(12) == 0:
            arguments.append(option)
        elif rng.randrange(2):
            arguments.append(f"{option}={value}")
        else:
            arguments += [option, value]
    if name == "plan" and "--device" not in " ".join(arguments):
        arguments += ["--device", "t4"]  # from its data sheet: measuring this machine takes a minute
    if name == "generate" and "--max-new-tokens" not in " ".join(arguments):
        arguments += ["--max-new-tokens", "8"]
    return Case("command line", " ".join(map(repr, arguments))[:300], arguments)


_SAID = re.compile(r" -> |damage|match|chang|set aside|missing|differ|cannot be|unreadable|edited|another|lost|verif")


def _output() -> str:
    """What this child has printed so far."""
    sys.stdout.flush()
    sys.stderr.flush()
    return Path(f"{Path.cwd()}.out").read_text(encoding="utf-8", errors="replace")


def _same(actual: Any, expected: Any, what: str) -> str | None:
    """Why a result is wrong: it differs from that of the sound files, and no line says so."""
    said = actual == expected or _SAID.search(_output())
    return None if said else f"{what} {actual} instead of {expected}, unsaid"


def _text_is(files: Files) -> str | None:
    output = _output()
    return None if files.reference["text"] in output or _SAID.search(output) else "another text, unsaid"


def run_case_of(rng: random.Random, files: Files, folder: Path) -> Case:
    """A run with a damaged file: resumed, evaluated, generated from, exported, reported."""
    shutil.copytree(files.root / "run", folder / "run")
    path = rng.choice(_files_below(folder / "run"))
    damage = f"{path.relative_to(folder)}: {damage_file(rng, path)}"
    match rng.randrange(6):
        case 0 | 1:

            def wrong() -> str | None:
                return _same(_weights_hash(Path("run")), files.reference["resumed"], "weights")

            return Case("run files", damage, ["train", "--resume", "run", "--steps", "6"], wrong)
        case 2:
            arguments = ["eval", "run", "--data", str(files.root / "dataset"), "--json", "o.json", "--device", "cpu"]
            return Case("run files", damage, arguments, lambda: _loss_is(files, "dataset"))
        case 3:
            return Case("run files", damage, GENERATE, lambda: _text_is(files))
        case 4:
            return Case("run files", damage, ["report", "run"])
        case _:
            return Case("run files", damage, rng.choice((["info", "run"], ["export", "run", "--out", "exported"])))


def _loss_is(files: Files, data: str) -> str | None:
    return _same(json.loads(Path("o.json").read_bytes())["loss"], files.reference[data], "loss")


def dataset_case(rng: random.Random, files: Files, folder: Path) -> Case:
    """A dataset, or token files of another project, with a damaged file: evaluated, trained on, prepared again."""
    if rng.randrange(5) == 0:
        shutil.copytree(files.root / "tokens", folder / "tokens")
        damage = damage_file(rng, rng.choice(_files_below(folder / "tokens")))
        model = str(files.root / "models" / "GPT2")
        return Case("dataset files", damage, ["eval", model, "--data", "tokens", "--json", "o.json"])
    shutil.copytree(files.root / "dataset", folder / "dataset")
    damage = damage_file(rng, rng.choice(_files_below(folder / "dataset")))
    match rng.randrange(4):
        case 0 | 1:
            run = str(files.root / "run")
            arguments = ["eval", run, "--data", "dataset", "--json", "o.json", "--device", "cpu"]
            return Case("dataset files", damage, arguments, lambda: _loss_is(files, "dataset"))
        case 2:
            shutil.copy(files.root / "recipe.toml", folder)
            arguments = ["train", "recipe.toml", "--data", "dataset", "--steps", "1", "--out", "out"]
            return Case("dataset files", damage, arguments)
        case _:
            text = str(files.root / "texts" / "b.jsonl")
            arguments = ["prepare", text, "--tokenizer", "bytes", "--shard-tokens", "9000", "--out", "dataset"]

            def repaired() -> str | None:
                names = [path.name for path in _files_below(files.root / "dataset") if path.suffix in (".bin", ".idx")]
                for name in names:
                    if Path("dataset", name).read_bytes() != (files.root / "dataset" / name).read_bytes():
                        return f"{name} differs after prepare"
                return None

            return Case("dataset files", damage, arguments, repaired)


def model_case(rng: random.Random, files: Files, folder: Path) -> Case:
    """A Hugging Face model with a damaged file; if both load it, the logits must be those of transformers."""
    name = rng.choice(sorted(path.name for path in (files.root / "models").iterdir()))
    shutil.copytree(files.root / "models" / name, folder / "model")
    paths = _files_below(folder / "model")
    path = rng.choice((folder / "model" / "config.json", *paths))
    damage = f"{name}/{damage_file(rng, path)}"
    text = str(files.root / "texts" / "a.txt")
    arguments = rng.choice((
        ["generate", "model", "--prompt", "4 is", "--max-new-tokens", "8", "--greedy"],
        ["eval", "model", "--data", text, "--device", "cpu"],
        ["export", "model", "--out", "exported"],
        ["info", "model"],
    ))  # fmt: skip
    return Case("model files", damage, arguments, _differs_from_transformers)


def _differs_from_transformers() -> str | None:
    import torch
    import transformers

    # After the command, since transformers may not survive the files. Its own refusals are no reference.
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    try:
        auto: Any = transformers.AutoModelForCausalLM
        theirs = auto.from_pretrained("model", dtype=torch.float32).eval()
        with torch.no_grad():
            expected = theirs(ids).logits
    except BaseException:
        return None
    try:
        model, _ = glassgpt.load("model")
    except glassgpt.UserError:  # its tokenizer, which `info` does not read
        return None
    if model.config.context_length < ids.shape[1]:
        return None
    with torch.no_grad():
        logits = model(ids)[0] if isinstance(model(ids), tuple) else model(ids)
    difference = (logits - expected).abs().max().item()
    return None if difference <= 1e-4 * max(1.0, expected.abs().max().item()) else f"logits differ by {difference}"


def tokenizer_case(rng: random.Random, files: Files, folder: Path) -> Case:
    """A damaged tokenizer.json; if it is accepted, its ids must be those of the tokenizers library."""
    path = folder / "tokenizer.json"
    shutil.copy(files.root / "tokenizer.json", path)
    damage = damage_json(rng, path)
    text = "4 is a number, and 16 its square: h\u00e9llo"

    def wrong() -> str | None:
        import tokenizers
        from glassgpt.tokenizers.builtin import load_tokenizer

        try:
            expected = tokenizers.Tokenizer.from_file("tokenizer.json").encode(text, add_special_tokens=False).ids
        except BaseException:
            return None
        actual = list(load_tokenizer(path).encode(text))
        return None if actual == expected else f"ids {actual[:8]} instead of {expected[:8]}"

    return Case("tokenizer files", damage, ["tokenizer", "show", "tokenizer.json", "--text", text], wrong)


def text_case(rng: random.Random, files: Files, folder: Path) -> Case:
    """A damaged text file of any format."""
    source = rng.choice(_files_below(files.root / "texts"))
    shutil.copy(source, folder)
    damage = damage_file(rng, folder / source.name)
    options = rng.choice(([], ["--skip-bad"], ["--errors", "replace"], ["--deduplicate"]))
    return Case("text files", damage, ["prepare", source.name, "--tokenizer", "bytes", "--out", "out", *options])


KINDS: dict[str, Callable[[random.Random, Files, Path], Case]] = {
    "config": config_case, "command line": command_line_case, "run files": run_case_of, "dataset files": dataset_case,
    "model files": model_case, "tokenizer files": tokenizer_case, "text files": text_case,
}  # fmt: skip


def run_number(number: int, seed: int, files: Files, work: Path, kinds: Sequence[str]) -> Outcome:
    """Make and run the case with a number. The same number, seed and kinds give the same case."""
    rng = random.Random(f"{seed}/{number}")
    folder = work / f"case-{number}"
    folder.mkdir(parents=True)
    kind = kinds[number % len(kinds)]
    outcome = run_case(KINDS[kind](rng, files, folder), folder)
    outcome.number = number
    shutil.rmtree(folder)
    folder.with_name(f"{folder.name}.out").unlink()
    return outcome
