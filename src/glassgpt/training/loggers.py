"""Where a run's numbers and samples go besides its own directory, if it asks: TensorBoard, Weights & Biases.

Neither library is imported unless a run asks for it, and nothing that goes wrong there ends a run.
"""

import html
import importlib.util
import os
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from glassgpt.config.schema import TrainConfig
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import write_atomic

# Seconds that W&B gets to reach its server when a run begins, and at its end for what is not uploaded yet. Its files keep that.
INIT_SECONDS = 60
FINISH_SECONDS = 60


class LogTarget(Protocol):
    """Takes what a run has to tell. Its methods may raise anything."""

    @property
    def place(self) -> str:
        """Where to look at it: an address, or a command."""
        ...

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of this step by name; steps come in order, and one may come several times with other names."""

    def write_samples(self, step: int, samples: Sequence[str]) -> None:
        """What the model wrote after `step` updates."""

    def flush(self) -> None:
        """Have all of it on the disk, as a checkpoint counts on it."""

    def close(self, failed: bool) -> None:
        """The run has ended; `failed`: by an error."""


class TensorBoard:
    """Event files in the run's `tensorboard` directory. Whatever an earlier process wrote from `first_step` on is taken back."""

    def __init__(self, run: RunDirectory, config: TrainConfig, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second

        self._writer: Any = SummaryWriter(str(run.tensorboard), purge_step=first_step)
        self._writer.add_text("config", _as_code(config.to_toml()), first_step)
        self.place = f"tensorboard --logdir {shlex.quote(str(run.tensorboard))}"

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `LogTarget`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def write_samples(self, step: int, samples: Sequence[str]) -> None:
        """See `LogTarget`."""
        for number, sample in enumerate(samples, start=1):
            self._writer.add_text(f"samples/{number}", _as_code(sample), step)

    def flush(self) -> None:
        """See `LogTarget`."""
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """See `LogTarget`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, its files in the run's `wandb` directory. A run that goes on is the same one there.

    The server cannot take back what it has: it keeps the first word on a step, and the same step told again is passed over.
    """

    def __init__(self, run: RunDirectory, config: TrainConfig, first_step: int) -> None:
        import wandb

        self._html = wandb.Html
        settings = wandb.Settings(console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, silent=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "glassgpt"),
            name=run.path.resolve().name,
            id=_lasting_id(run),
            dir=str(run.path),
            config=config.to_dict(),
            allow_val_change=True,
            resume="allow" if _is_online() else None,
            reinit="create_new",  # a notebook's own run of W&B is left alone
            settings=settings,
        )
        self._first_step = self._run.starting_step
        if self._run.disabled:
            self.place = "switched off by WANDB_MODE=disabled, so nothing is logged there"
        else:
            self.place = (
                f"wandb sync {shlex.quote(self._run.settings.sync_dir)}" if self._run.offline else str(self._run.url)
            )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `LogTarget`."""
        if step >= self._first_step:
            self._run.log(dict(numbers), step=step)

    def write_samples(self, step: int, samples: Sequence[str]) -> None:
        """See `LogTarget`."""
        if step >= self._first_step:
            pages = (f"<pre style='white-space: pre-wrap'>\n{html.escape(sample)}</pre>" for sample in samples)
            self._run.log(
                {f"samples/{n}": self._html(page, data_is_not_path=True) for n, page in enumerate(pages, start=1)},
                step=step,
            )

    def flush(self) -> None:
        """Nothing to do: a process of its own writes what it was told, even if this one is killed."""

    def close(self, failed: bool) -> None:
        """See `LogTarget`."""
        self._run.finish(exit_code=int(failed))


_Opener = Callable[[RunDirectory, TrainConfig, int], LogTarget]
_OPENERS: dict[str, tuple[str, _Opener]] = {
    "tensorboard": ("TensorBoard", TensorBoard),
    "wandb": ("Weights & Biases", WeightsAndBiases),
}


def _named(log: str) -> list[str]:
    """The libraries that a config's `log` asks for."""
    return list(_OPENERS) if log == "both" else [name for name in _OPENERS if name == log]


def require_log_targets(log: str) -> None:
    """Raise `UserError` where a config's `log` asks for a library that is not installed, or for W&B without its key."""
    for library in _named(log):
        if not _is_installed(library):
            raise UserError(f"log = {log!r} needs {library}, which is not installed: pip install 'glassgpt[log]'")
    if "wandb" in _named(log) and _is_online():
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                "Weights & Biases does not know you: run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
            )


def _is_installed(library: str) -> bool:
    """Whether it can be imported. A folder of its name, as W&B makes one where it runs, passes for a package without an origin."""
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None


def _is_online() -> bool:
    try:
        import wandb

        return bool(wandb.setup().settings.mode == "online")
    except Exception as error:  # settings that are damaged, a folder that cannot be written
        raise UserError(
            f"Weights & Biases cannot be set up ({_reason(error)}); mend that, or log to tensorboard or none"
        ) from None


def numbers_of(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """A record's numbers by the names they have in a log: `train/loss`, `val/loss`, `hellaswag/acc`, `grad_norms/embedding`.

    What is no number (a truth value, or None for not measured) is left out; one that is not finite stays.
    """
    evaluation = "val_loss" in record
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{part}", float(each)) for part, each in value.items())
        elif key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            section, name = _section(key, evaluation)
            yield f"{section}/{name}", float(value)


def _section(key: str, evaluation: bool) -> tuple[str, str]:
    for prefix in ("val", "hellaswag"):
        if key.startswith(f"{prefix}_"):
            return prefix, key.removeprefix(f"{prefix}_")
    return "val" if evaluation else "train", key


class Logs:
    """The log targets of a run. One that fails is told of once and left out from then on: a run of days does not end for a log's sake."""

    def __init__(self, run: RunDirectory, config: TrainConfig, tell: Callable[[str], None]) -> None:
        self._run = run
        self._config = config
        self._tell = tell
        self._targets: dict[str, LogTarget] = {}

    def open(self, step: int) -> None:
        """The run begins, or goes on after `step` updates."""
        first = step + 1 if step else 0
        for library in _named(self._config.log):
            title, opener = _OPENERS[library]
            try:
                self._targets[title] = target = opener(self._run, self._config, first)
                self._tell(f"{title}: {target.place}")
            except Exception as error:
                self._warn_of(title, error)

    def record(self, record: Mapping[str, Any]) -> None:
        """An update or an evaluation, as in `metrics.jsonl`."""
        if self._targets:
            numbers = dict(numbers_of(record))
            self._each(lambda target: target.write(int(record["step"]), numbers))

    def sampled(self, step: int, samples: Sequence[str]) -> None:
        """What the model wrote after `step` updates."""
        self._each(lambda target: target.write_samples(step, samples))

    def flush(self) -> None:
        """Have all of it on the disk."""
        self._each(lambda target: target.flush())

    def close(self, failed: bool) -> None:
        """The run has ended. May take as long as uploading does. What fails is told of; nothing reaches a target afterwards."""
        self._each(lambda target: target.close(failed))
        self._targets.clear()

    def _each(self, action: Callable[[LogTarget], None]) -> None:
        for title, target in list(self._targets.items()):
            try:
                action(target)
            except Exception as error:  # whatever a library of others raises, of its network or a full disk
                self._targets.pop(title, None)
                self._warn_of(title, error)

    def _warn_of(self, title: str, error: Exception) -> None:
        self._tell(
            f"warning: {title} failed ({_reason(error)}); the run goes on without it, and all is in {self._run.metrics_path}"
        )


def _reason(error: Exception) -> str:
    """An error in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _lasting_id(run: RunDirectory) -> str:
    """The run's name at W&B, drawn when it is first asked for."""
    path = run.wandb / "glassgpt-id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()


def _as_code(text: str) -> str:
    """Text as a block of code in Markdown, which TensorBoard shows texts as."""
    return "\n".join(f"    {line}" for line in text.splitlines())
