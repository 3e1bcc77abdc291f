"""train, its --resume, and recipes."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, arg

from glassgpt.cli.options import Command, description, gives, is_first_rank, parse
from glassgpt.cli.parsing import parse_options
from glassgpt.config.recipes import recipe, recipe_names, recipe_text
from glassgpt.config.schema import TYPICAL_VOCAB_SIZES, TrainConfig
from glassgpt.training.progress import PlainProgress, Progress, SilentProgress
from glassgpt.utils.errors import UserError, program

DEFAULT_RECIPE = "demo"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `glassgpt train`."""

    data: Annotated[str | None, arg(metavar="SRC", help_behavior_hint="(default: --data.source)")] = None
    """Short for --data.source: a registered name (python-docs, shakespeare), a text file, or a folder of them."""
    column: Annotated[str | None, arg(help_behavior_hint="(default: --data.column)")] = None
    """Short for --data.column: the column of .parquet and .csv files, or key of JSON lines, that holds the text."""
    encoding: Annotated[str | None, arg(help_behavior_hint="(default: --data.encoding)")] = None
    """Short for --data.encoding: how text files are encoded."""
    errors: Annotated[
        Literal["strict", "replace", "ignore"] | None, arg(help_behavior_hint="(default: --data.errors)")
    ] = None
    """Short for --data.errors: what to do with bytes that are not valid in the encoding."""
    skip_bad: Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="(default: --data.skip-bad)")] = False
    """Short for --data.skip-bad: leave out rows that hold no text."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/NAME)")] = None
    """Directory of the run."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace the run that is there already."""
    resume: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(takes only --steps, --strategy and --log beside it)")
    ] = None
    """Go on with the run in this directory, to more --steps if given."""
    config: Annotated[TrainConfig, arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Options of `glassgpt train --resume`."""

    resume: Annotated[Path, arg(metavar="DIR")]
    """Directory of the run to go on with."""
    steps: Annotated[int | None, arg(help_behavior_hint="(default: as the run was set)")] = None
    """Number of optimizer updates at the end."""
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp"] | None, arg(help_behavior_hint="(default: as the run was set)")
    ] = None
    """How the model lies over the processes of torchrun, of which there may be others than before."""
    log: Annotated[
        Literal["none", "tensorboard", "wandb", "both"] | None, arg(help_behavior_hint="(default: as the run was set)")
    ] = None
    """Where else numbers and samples go from now on."""


def train(arguments: Sequence[str]) -> None:
    """Train a model: a recipe's name or .toml file comes first.

    Without one it is `demo`; `glassgpt recipes` lists them. The defaults below are the recipe's.
    Of --steps and --epochs, the one given replaces the recipe's.
    """
    if gives(arguments, "--resume"):
        return _resume(arguments)
    options = parse_settings(TrainOptions, "train", train, arguments)
    if gives(arguments, "--data.tokenizer"):
        from glassgpt.data.prepare import require_tokenizer

        require_tokenizer(options.config.data)
    from glassgpt.training import loop as training
    from glassgpt.utils.device import keep_freed_memory

    keep_freed_memory()
    with _progress() as progress:
        run = training.train(options.config, out=options.out, overwrite=options.overwrite, progress=progress)
    _say_what_next(run)


Settings = TypeVar("Settings", bound=TrainOptions)


def parse_settings(kind: type[Settings], name: str, command: Command, arguments: Sequence[str]) -> Settings:
    """The options of a command that takes a recipe, with the recipe's values as defaults, and `data` merged into `config`."""
    config, arguments = _named_recipe(arguments)
    bare = f"a recipe comes first (glassgpt {name} RECIPE …), a value follows its option, a switch takes none"
    default = kind(config=config)
    options = parse_options(
        kind, f"glassgpt {name} [RECIPE]", description(command), arguments, default=default, bare=bare
    )
    config = options.config.override(data=_short_forms(options, arguments))
    if config.init_from is not None:
        _refuse_beside_init_from(arguments)
    return dataclasses.replace(options, config=config)


def _named_recipe(arguments: Sequence[str]) -> tuple[TrainConfig, Sequence[str]]:
    """The config of the recipe that comes first, `demo` where none does, without what a given option replaces; and the options."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else (DEFAULT_RECIPE, arguments)
    config = recipe(name)
    if config.name == TrainConfig.name:
        config = config.override(name=Path(name).stem)  # a file that does not name its runs
    return _with_room(config, rest), rest


def _with_room(config: TrainConfig, arguments: Sequence[str]) -> TrainConfig:
    """The recipe without what a given option takes the place of.

    The options' parser builds the config from the recipe's values and what was given, and one with both is refused, or heeds only one.
    """
    steps, epochs = gives(arguments, "--steps"), gives(arguments, "--epochs")
    if steps != epochs:
        config = config.override(steps=1) if steps and config.steps is None else config
        config = config.override(epochs=1.0) if epochs and config.epochs is None else config
    source = next((option for option in ("--data", "--data.source") if gives(arguments, option)), None)
    if source is None:
        return config
    if gives(arguments, "--data.mixture"):
        raise UserError(f"{source} and --data.mixture exclude each other: name one text, or several with their weights")
    return config.override(data={"mixture": {}})


def _short_forms(options: TrainOptions, arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of [data] whose short forms were given. Raises `UserError` where the long one was given too."""
    short = {"source": options.data, "column": options.column, "encoding": options.encoding, "errors": options.errors}
    given: dict[str, Any] = {field: value for field, value in short.items() if value is not None}
    given |= {"skip_bad": True} if options.skip_bad else {}
    for field in given:
        name = field.replace("_", "-")
        if gives(arguments, f"--data.{name}") or gives(arguments, f"--data.no-{name}"):
            raise UserError(
                f"--{'data' if field == 'source' else name} and --data.{name} are the same: give one of them"
            )
    return given


def _refuse_beside_init_from(arguments: Sequence[str]) -> None:
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name.startswith("--model.") and name.removeprefix("--model.") not in (
            "context-length",
            "dropout",
            "attention",
        ):
            raise UserError(
                f"{name} has no effect beside --init-from: the model has the shape of the one that it goes on from"
            )
        if name == "--data.tokenizer":
            raise UserError(
                "--data.tokenizer has no effect beside --init-from: the text is read by the tokenizer of that model"
            )


def _resume(arguments: Sequence[str]) -> None:
    hint = "with --resume only --steps, --strategy and --log may be given: all else is the run's own"
    options = parse(ResumeOptions, "train", train, arguments, bare=hint, unknown=hint)
    from glassgpt.training import loop as training
    from glassgpt.utils.device import keep_freed_memory

    keep_freed_memory()
    with _progress() as progress:
        run = training.resume(
            options.resume, steps=options.steps, strategy=options.strategy, log=options.log, progress=progress
        )
    _say_what_next(run)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A live display on a terminal, plain lines elsewhere; of several ranks the first shows."""
    if not is_first_rank():
        yield SilentProgress()
        return
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        yield PlainProgress()
        return
    from glassgpt.cli.console import RichProgress

    with RichProgress() as progress:
        yield progress


def _say_what_next(run: Path) -> None:
    if not is_first_rank():
        return
    name = shlex.quote(f"./{run}" if str(run).startswith("-") else str(run))
    print(f"next:\n  {program()} generate {name}   (--prompt TEXT sets it going)")
    print(f"  {program()} play {name}       (what it computes, and how it learned)")
    print(f"  {program()} report {name}     (charts and samples in one page)")


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """Options of `glassgpt recipes`."""

    name: Annotated[Positional[str | None], arg(metavar="[NAME]", help_behavior_hint="(default: a table of all)")] = (
        None
    )
    """A recipe to print as TOML, which is where a recipe of your own can start."""


def recipes(arguments: Sequence[str]) -> None:
    """List the recipes that `train` knows, or print one."""
    options = parse(RecipesOptions, "recipes", recipes, arguments)
    if options.name is not None:
        print(recipe_text(options.name), end="")
        return
    for name in recipe_names():
        text = recipe_text(name)
        comment = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
        print(f"{name:<22} {_size(recipe(name)) if 'n_embd' in text else 'any':>6}  {comment}")


def _size(config: TrainConfig) -> str:
    """A recipe's parameters, rounded; a character vocabulary, which is not known before its text is, counts as 100 ids."""
    from glassgpt.model.summary import ModelSummary

    vocabulary = config.model.vocab_size or TYPICAL_VOCAB_SIZES.get(
        config.data.tokenizer, TYPICAL_VOCAB_SIZES["characters"]
    )
    count = ModelSummary(config.override(model={"vocab_size": vocabulary}).model).parameters
    return f"{count / 1e6:.0f}M" if count >= 1e7 else f"{count / 1e6:.2g}M"
