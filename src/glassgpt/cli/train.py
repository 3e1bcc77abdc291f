"""train, its --resume, plan and recipes: from a recipe to a run."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Self

from tyro.conf import Positional, arg

from glassgpt.cli.options import Command, Flag, default, gives, is_main_process, option_of, parse_options, say_aside
from glassgpt.config.recipes import recipe, recipe_names, recipe_text
from glassgpt.config.schema import NUMERICS_SETTINGS, TYPICAL_VOCAB_SIZES, ExecutionConfig, TrainConfig
from glassgpt.config.validation import PositiveCount, Size
from glassgpt.training.progress import Progress, SilentProgress
from glassgpt.utils.errors import UserError, program
from glassgpt.utils.launcher import launcher_number

SHORT_FORMS = {f"--{name}": f"--data.{name}" for name in "column encoding errors skip-bad delimiter split-on".split()}
SHORT_FORMS["--data"] = "--data.source"
# Settings of the model that a run started from another model may have.
OWN_WITH_INIT_FROM = ("--model.context-length", "--model.dropout", "--model.attention")


class RecipeCommand(Command):
    """A command that takes a recipe: its values are the defaults of the options."""

    out: Annotated[Path | None, default("runs/NAME", "DIR")] = None  # Directory of the run.
    overwrite: Flag = False  # Replace the run that is in this directory.
    # Resume the run in this directory, with other execution settings or more --steps if given.
    resume: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(see train --resume DIR --help)")] = None
    force: Flag = False  # Train even if the memory check says that the run does not fit.
    config: Annotated[TrainConfig, arg(name="")]

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        named = bool(arguments) and not arguments[0].startswith("-")
        recipe_name, arguments = (arguments[0], arguments[1:]) if named else ("demo", arguments)
        arguments = _expand_short_forms(arguments)
        config = recipe(recipe_name)
        if config.name == TrainConfig.name:
            config = config.override(name=Path(recipe_name).stem)  # a file that does not name its runs
        config = _without_replaced_settings(config, arguments)
        hint = f"a recipe comes first (glassgpt {name} RECIPE …), a value follows its option, a switch takes none"
        command = parse_options(cls, f"{name} [RECIPE]", arguments, base=cls(config=config), hint=hint)
        for option in map(option_of, arguments) if command.config.init_from is not None else ():
            if option == "--data.tokenizer" or (option.startswith("--model.") and option not in OWN_WITH_INIT_FROM):
                raise UserError(f"{option} has no effect with --init-from: shape and tokenizer are those of its model")
        return command


class Train(RecipeCommand):
    """Train a model: a recipe's name or .toml file comes first.

    Without one it is `demo`; `glassgpt recipes` lists them. The defaults below are the recipe's.
    Of --steps and --epochs, the one given replaces the recipe's.
    Short forms: --data SRC, --column, --encoding, --errors, --skip-bad, --delimiter and --split-on mean
    --data.source SRC, --data.column, etc.
    With --resume DIR, settings of execution may change: train --resume DIR --help lists them.
    """

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        command = super().parse(name, arguments)
        if gives(arguments, "--data.tokenizer"):
            from glassgpt.data.prepare import require_tokenizer

            require_tokenizer(command.config.data)
        return command

    def run(self) -> None:
        from glassgpt.training import run as training
        from glassgpt.utils.device import keep_freed_memory

        _check_memory(self.config, self.force)
        keep_freed_memory()
        with _progress() as progress:
            run = training.train(self.config, out=self.out, overwrite=self.overwrite, progress=progress)
        _print_next_commands(run)


class Plan(RecipeCommand):
    """Estimate what a run needs: memory by component, the micro-batch that fits, tokens/s and hours.

    Takes a recipe's name or .toml file and the options of train. Nothing is written, and no text is read. --device here
    (or auto, cpu, cuda) measures this machine for some seconds to a minute. The name of a GPU uses its data sheet:
    b200, h200, h100, h100-nvl, h100-pcie, a100-80, a100-40, l40s, a10, l4, v100-32, v100-16, t4, rtx4090, rtx3090.
    """

    hidden = ("out", "overwrite", "resume", "force", "log")
    gpus: Size[int] = 1  # Number of GPUs that train together.

    def run(self) -> None:
        if self.resume is not None:
            raise UserError("plan estimates new runs; pass a recipe, or the config.toml of a run, instead of --resume")
        from glassgpt.planning.plan import plan
        from glassgpt.utils.device import keep_freed_memory

        keep_freed_memory()  # as training does, so that the measured times are those of training
        print(plan(self.config, self.gpus))


class Resume(Command):
    """Resume the run in a directory, with other settings of execution or more --steps if given.

    The defaults below are the run's.
    """

    resume: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")]  # Directory of the run to resume.
    steps: Annotated[PositiveCount[int | None], default("as before")] = None  # Number of optimizer updates at the end.
    force: Flag = False  # Train even if the memory check says that the run does not fit.
    config: Annotated[ExecutionConfig, arg(name="")]

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        for argument in arguments:
            option = option_of(argument)
            setting = SHORT_FORMS.get(option, option).removeprefix("--").replace("-", "_")
            if option in ("--out", "--overwrite"):
                raise UserError(f"{option} has no effect with --resume: a run stays in its directory")
            if option.startswith("--") and setting.partition(".")[0] in NUMERICS_SETTINGS and setting != "steps":
                raise UserError(f"--resume cannot change {setting}: it determines the numbers; start a new run")
        from glassgpt.runs.run_directory import RunDirectory
        from glassgpt.utils.files import explain_os_errors

        index = next(i for i, argument in enumerate(arguments) if option_of(argument) == "--resume")
        value = arguments[index].partition("=")[2] or next(iter(arguments[index + 1 :]), "")
        directory = RunDirectory(value)
        with explain_os_errors("read", directory.path):
            config = directory.read_config() if value and directory.is_run else TrainConfig(steps=1)
        settings = [field.name for field in dataclasses.fields(ExecutionConfig)]
        execution = ExecutionConfig(**{name: getattr(config, name) for name in settings})
        hint = "--resume DIR takes --steps and settings of execution only"
        return parse_options(cls, name, arguments, base=cls(resume=Path(), config=execution), hint=hint)

    def run(self) -> None:
        from glassgpt.runs.run_directory import RunDirectory
        from glassgpt.training import run as training
        from glassgpt.utils.device import keep_freed_memory

        directory = RunDirectory(self.resume)
        directory.require_run()
        before = directory.read_config()
        changes = {name: value for name, value in vars(self.config).items() if value != getattr(before, name)}
        _check_memory(before.override(**changes), self.force)
        keep_freed_memory()
        with _progress() as progress:
            run = training.resume(self.resume, steps=self.steps, progress=progress, **changes)
        _print_next_commands(run)


def _check_memory(config: TrainConfig, force: bool) -> None:
    """Raise `UserError` if an update cannot fit into the free memory; with `force`, only warn."""
    from glassgpt.planning.memory import check_memory
    from glassgpt.utils.device import find_device, find_precision

    device, processes = find_device(config.device), launcher_number("WORLD_SIZE", 1)
    if device.type == "cuda" and processes > 1:
        device = find_device(f"cuda:{launcher_number('LOCAL_RANK')}")
    problem = check_memory(config, processes, device, find_precision(config.precision, device))
    if problem is not None and not force:
        raise UserError(f"this run does not fit: {problem} (--force trains anyway)")
    if problem is not None and is_main_process():
        say_aside(f"warning: this run may not fit: {problem}")


def _expand_short_forms(arguments: Sequence[str]) -> list[str]:
    """Replace `--data` by `--data.source`, and so on. Raises `UserError` if one is given twice."""
    for short, long in SHORT_FORMS.items():
        if sum(option_of(argument) in (short, long, long.replace(".", ".no-")) for argument in arguments) > 1:
            raise UserError(f"{short} and {long} are the same: give one of them, once")
    expanded = []
    for argument in arguments:
        option = option_of(argument)
        expanded.append(SHORT_FORMS[option] + argument[len(option) :] if option in SHORT_FORMS else argument)
    return expanded


def _without_replaced_settings(config: TrainConfig, arguments: Sequence[str]) -> TrainConfig:
    """The recipe's config without settings that exclude a given option, as its steps exclude --epochs."""
    steps, epochs = gives(arguments, "--steps"), gives(arguments, "--epochs")
    if steps != epochs:
        config = config.override(steps=1) if steps and config.steps is None else config
        config = config.override(epochs=1.0) if epochs and config.epochs is None else config
    if not gives(arguments, "--data.source"):
        return config
    if gives(arguments, "--data.mixture"):
        raise UserError("--data.source and --data.mixture exclude each other: give one source, or several with weights")
    return config.override(data={"mixture": {}})


def _progress() -> AbstractContextManager[Progress]:
    """A live display on a terminal, plain lines elsewhere; nothing on ranks other than the main one."""
    if not is_main_process():
        return nullcontext(SilentProgress())
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return nullcontext(Progress())
    from glassgpt.cli.console import RichProgress

    return RichProgress()


def _print_next_commands(run: Path) -> None:
    if not is_main_process():
        return
    name = shlex.quote(f"./{run}" if str(run).startswith("-") else str(run))
    print(f"next:\n  {program()} generate {name}   (--prompt TEXT to choose the prompt)")
    print(f"  {program()} play {name}       (look inside the model, and at its training)")
    print(f"  {program()} report {name}     (charts and samples on one page)")


class Recipes(Command):
    """List the recipes that `train` knows, or print one."""

    # Recipe to print as TOML, which you can save and change.
    recipe: Annotated[Positional[str | None], default("list all", "[NAME]")] = None

    def run(self) -> None:
        if self.recipe is not None:
            print(recipe_text(self.recipe), end="")
            return
        for name in recipe_names():
            text = recipe_text(name)
            comment = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
            print(f"{name:<22} {_model_size(recipe(name)) if 'n_embd' in text else 'any':>6}  {comment}")


def _model_size(config: TrainConfig) -> str:
    """A recipe's number of parameters, rounded, with a typical vocabulary if its own is not known yet."""
    from glassgpt.model.summary import ModelSummary

    vocab_size = config.model.vocab_size or TYPICAL_VOCAB_SIZES[config.data.tokenizer]
    count = ModelSummary(dataclasses.replace(config.model, vocab_size=vocab_size)).parameters
    return f"{count / 1e6:.0f}M" if count >= 1e7 else f"{count / 1e6:.2g}M"
