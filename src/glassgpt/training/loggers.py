"""TensorBoard and Weights & Biases, if a run's `log` asks for them.

Neither is imported otherwise, and nothing that fails in them ends a run.
"""

import html
import importlib.util
import os
import secrets
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glassgpt.config.schema import TrainConfig
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import write_atomic

WANDB_TIMEOUT = 60  # seconds that W&B may take to reach its server at the start, and to upload the rest at the end
CODE_INDENT = "    "  # a block of code in Markdown, which TensorBoard renders


class TensorBoard:
    """Event files in the run's `tensorboard` directory. Those of an earlier process are purged from `first_step` on."""

    def __init__(self, run: RunDirectory, config: TrainConfig, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second

        self._writer: Any = SummaryWriter(str(run.tensorboard), purge_step=first_step)
        self._writer.add_text("config", textwrap.indent(config.to_toml(), CODE_INDENT), first_step)
        # Where the user can look at them: a command or an address.
        self.place = f"tensorboard --logdir {shlex.quote(str(run.tensorboard))}"

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def write_samples(self, step: int, samples: Sequence[str]) -> None:
        for number, sample in enumerate(samples, start=1):
            self._writer.add_text(f"samples/{number}", textwrap.indent(sample, CODE_INDENT), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, its files in the run's `wandb` directory. A resumed run continues the same one.

    The server cannot purge anything: a step that it already has is skipped.
    """

    def __init__(self, run: RunDirectory, config: TrainConfig, first_step: int) -> None:
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "glassgpt"),
            name=run.path.resolve().name,
            id=_run_id(run.wandb / "glassgpt-id"),
            dir=str(run.path),
            config=config.to_dict(),
            allow_val_change=True,
            resume="allow" if _is_online() else None,
            reinit="create_new",  # a notebook's own run of W&B is left alone
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=WANDB_TIMEOUT, finish_timeout=WANDB_TIMEOUT
            ),
        )
        self._first_step = self._run.starting_step
        if self._run.disabled:
            self.place = "disabled by WANDB_MODE"
        elif self._run.offline:
            self.place = f"wandb sync {shlex.quote(self._run.settings.sync_dir)}"
        else:
            self.place = str(self._run.url)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step >= self._first_step:
            self._run.log(dict(numbers), step=step)

    def write_samples(self, step: int, samples: Sequence[str]) -> None:
        if step >= self._first_step:
            pages = [f"<pre style='white-space: pre-wrap'>\n{html.escape(sample)}</pre>" for sample in samples]
            parts = (self._html(page, data_is_not_path=True) for page in pages)
            self._run.log({f"samples/{number}": part for number, part in enumerate(parts, start=1)}, step=step)

    def flush(self) -> None:
        """Nothing to do: W&B writes from its own process, which survives a kill of this one."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


Logger = TensorBoard | WeightsAndBiases
_OPENERS: dict[str, tuple[str, type[Logger]]] = {
    "tensorboard": ("TensorBoard", TensorBoard),
    "wandb": ("Weights & Biases", WeightsAndBiases),
}


def _libraries(log: str) -> list[str]:
    """The libraries that a config's `log` asks for."""
    return [name for name in _OPENERS if log in (name, "both")]


def require_loggers(log: str) -> None:
    """Raise `UserError` if a library that `log` asks for is not installed, or if W&B has no key."""
    for library in _libraries(log):
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:  # a folder of its name (W&B makes one) looks like a package
            raise UserError(f"log = {log!r} needs {library}, which is not installed: pip install 'glassgpt[log]'")
    if "wandb" in _libraries(log) and _is_online():
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError("not logged in to Weights & Biases: run `wandb login`, or set WANDB_MODE=offline")


def _is_online() -> bool:
    try:
        import wandb

        return bool(wandb.setup().settings.mode == "online")
    except Exception as error:  # damaged settings, a folder that cannot be written
        raise UserError(f"Weights & Biases cannot be set up ({_reason(error)}); fix it, or use another --log") from None


def numbers_of(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """A record's numbers by their names in a log: `train/loss`, `val/loss`, `hellaswag/acc`, `grad_norms/embedding`."""
    own_section = "val" if "val_loss" in record else "train"
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{group}", float(each)) for group, each in value.items())
        elif key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            section, _, name = key.partition("_")
            yield f"{section}/{name}" if section in ("val", "hellaswag") else f"{own_section}/{key}", float(value)


class Loggers:
    """The loggers of a run that starts, or resumes after `step` updates.

    One that fails is reported once and closed: a run of days must not end because of a log.
    """

    def __init__(self, run: RunDirectory, config: TrainConfig, step: int, notify: Callable[[str], None]) -> None:
        self._metrics_path, self._notify = run.metrics_path, notify
        self._loggers: dict[str, Logger] = {}
        for library in _libraries(config.log):
            title, opener = _OPENERS[library]
            try:
                self._loggers[title] = logger = opener(run, config, step + 1 if step else 0)
                notify(f"{title}: {logger.place}")
            except Exception as error:
                self._warn_of(title, error)

    def close(self, failed: bool) -> None:
        """Close all loggers, which may take as long as an upload does."""
        self.each(lambda logger: logger.close(failed))
        self._loggers.clear()

    def each(self, action: Callable[[Logger], None]) -> None:
        """Run an action with each logger."""
        for title, logger in list(self._loggers.items()):
            try:
                action(logger)
            except Exception as error:  # anything of a library, its network, or a full disk
                self._loggers.pop(title, None)
                self._warn_of(title, error)

    def _warn_of(self, title: str, error: Exception) -> None:
        without = f"training continues without it, and {self._metrics_path} has everything"
        self._notify(f"warning: {title} failed ({_reason(error)}); {without}")


def _reason(error: Exception) -> str:
    """An error in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _run_id(path: Path) -> str:
    """The run's permanent id at W&B, drawn when it is first needed."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
