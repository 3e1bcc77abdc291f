"""The config of a run: frozen dataclasses, strict, in and out of TOML.

`NumericsConfig` holds what determines the numbers of a run, `ExecutionConfig` how the run is executed; `TrainConfig` is
both. This is the one place that decides which setting is which.
"""

import codecs
import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import tomli_w

from glassgpt.config.model import ModelConfig, nearest_divisors
from glassgpt.config.validation import (
    BelowOne,
    Count,
    Length,
    Name,
    NotNegative,
    Positive,
    PositiveCount,
    Range,
    Seed,
    Share,
    StrictConfig,
    above,
    between,
    flatten,
)
from glassgpt.utils.errors import UserError, did_you_mean, shown
from glassgpt.utils.files import parse_toml

# Tokenizers with vocabulary sizes before they exist; for characters a guess: Shakespeare has 65, source code hundreds.
TYPICAL_VOCAB_SIZES = {"characters": 100, "bytes": 256, "gpt2": 50257}
TOKENIZERS = tuple(TYPICAL_VOCAB_SIZES)


def _is_text_encoding(name: str) -> bool:
    """Whether text can be encoded with it, and decoded in pieces."""
    text = "Some words in several lines of text, ...\n" * 3
    try:
        content, decoder = text.encode(name), codecs.getincrementaldecoder(name)()
        return decoder.decode(content[:9]) + decoder.decode(content[9:], final=True) == text
    except (LookupError, ValueError):  # unknown, or between bytes (hex); several errors of codecs for domain names
        return False


_Encoding = Annotated[str, Range("a known encoding of text, such as 'utf-8', 'latin-1' or 'cp1252'", _is_text_encoding)]
# The command line has no tab, so its two characters stand for it.
_is_delimiter = re.compile(r'\\t|[^"\r\n\0]').fullmatch
_Delimiter = Annotated[str | None, Range("one character that is not a quote, or \\t for a tab", _is_delimiter)]


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How text files are read. The one definition, for configs, `prepare`, `eval` and the library."""

    column: str = "text"  # Column of .parquet and .csv files, or key of JSON lines, that holds the text.
    encoding: _Encoding = "utf-8"  # Encoding of text, .csv and JSON lines.
    # Handling of bytes that are not valid in the encoding: refuse them, replace each by U+FFFD, or leave them out.
    errors: Literal["strict", "replace", "ignore"] = "strict"
    skip_bad: bool = False  # Leave out rows without text (null, a number, broken JSON) instead of stopping there.
    delimiter: _Delimiter = None  # Character between the fields of .csv and .tsv files; none: found by the header.
    # Text between the documents of a text file, such as <|endoftext|>; none: one document.
    split_on: Annotated[str | None, Range("at least one character", bool)] = None


@dataclass(frozen=True, kw_only=True)
class TextConfig(ReadingConfig):
    """How one text becomes a prepared dataset. Checked as part of a `DataConfig`."""

    source: Name[str]  # A registered name, a file, a folder or pattern of files, or a dataset of the Hugging Face hub.
    # How text becomes token ids: characters, bytes, gpt2, or the path of a tokenizer's .json file.
    tokenizer: Name[str] = "characters"
    # What is kept for validation: a fraction of the documents, or the first shard.
    validation: Literal["fraction", "first_shard"] = "fraction"
    # Share of the documents for validation, evenly spaced; for a single document, its end.
    validation_fraction: Annotated[float, Range("above 0 and below 1", lambda value: 0 < value < 1)] = 0.1
    # Another source for validation; training then uses all of the first one.
    validation_source: Name[str | None] = None
    deduplicate: bool = False  # Leave out documents whose text occurred before.
    shard_tokens: PositiveCount[int] = 100_000_000  # Largest number of tokens in a file of the dataset.


@dataclass(frozen=True, kw_only=True)
class DataConfig(TextConfig, StrictConfig):
    """Where the text comes from and how it becomes batches."""

    # A registered name (python-docs, shakespeare, fineweb-edu, ...), a file, a folder or pattern of files, a prepared
    # dataset (which brings its own tokenizer), or a dataset of the Hugging Face hub (owner/name:subset).
    source: Name[str] = "python-docs"
    # Several sources with their weights, instead of `source`. Each one keeps its own part for validation.
    mixture: dict[str, float] = field(default_factory=dict)
    # Order of the training windows: each once per epoch in shuffled order, in the text's order, or drawn at random.
    # (Each sequence length of a context_start has its own shuffled order.)
    order: Literal["shuffled", "sequential", "random"] = "shuffled"

    @property
    def sources(self) -> tuple[str, ...]:
        """The training sources: those of the mixture, or the single one."""
        return tuple(self.mixture) or (self.source,)

    def check(self) -> None:
        known = self.tokenizer in TOKENIZERS or self.tokenizer.endswith(".json")
        valid = f"{', '.join(map(repr, TOKENIZERS))} or the path of a tokenizer's .json file"
        self.require("tokenizer", known, valid, hint=did_you_mean(self.tokenizer, TOKENIZERS))
        are_valid = all(0 < weight <= 1e15 for weight in self.mixture.values())
        self.require("mixture", are_valid, "sources with weights above 0 and at most 1e15")
        self.require("mixture", not any("\0" in name for name in self.mixture), "sources without NUL characters")
        if self.mixture and self.validation_source is not None:
            raise UserError("data.validation_source works with a single source, not with data.mixture")
        if self.validation_source is not None and self.validation != "fraction":
            raise UserError("data.validation = 'first_shard' and data.validation_source exclude each other")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(StrictConfig):
    """The optimizer and its learning rate."""

    # AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.
    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive[float] = 6e-4  # Peak learning rate.
    # Decay after warmup, down to min_lr_ratio x lr at the last step.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # Final learning rate as a share of the peak.
    min_lr_ratio: Annotated[float, between(0, 1)] = 0.1
    warmup_steps: Count[int] = 0  # Steps of linear warmup.
    beta1: BelowOne[float] = 0.9  # Decay of the gradient's running mean in AdamW.
    beta2: BelowOne[float] = 0.95  # Decay of the squared gradient's running mean in AdamW.
    eps: Positive[float] = 1e-8  # Added to the denominator of AdamW's update.
    momentum: BelowOne[float] = 0.95  # Decay of the gradient's running mean in Muon.
    weight_decay: NotNegative[float] = 0.1  # Decoupled weight decay, on matrices only.
    grad_clip: NotNegative[float] = 1.0  # Largest global gradient norm; 0 disables clipping.
    # Skip an update whose loss or gradient norm is more than this many standard deviations above the mean of the last
    # 128 steps; 0 disables it.
    skip_outliers: NotNegative[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(StrictConfig):
    """How tokens are drawn from a model's predictions."""

    max_new_tokens: PositiveCount[int] = 256  # Tokens per sample.
    # Divides the logits: below 1 is safer, above 1 more varied, 0 always takes the most likely token.
    temperature: NotNegative[float] = 0.8
    top_k: PositiveCount[int | None] = None  # Keep only the k most likely tokens.
    top_p: Share[float | None] = None  # Keep the most likely tokens that together have this probability.
    min_p: Share[float | None] = None  # Keep tokens that are at least this share as likely as the most likely one.


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    """The samples in samples.md, generated at every evaluation."""

    # Text that the samples continue; none: the beginning of a document.
    prompt: Annotated[str | None, Range("at least one character", bool)] = None
    count: Annotated[int, between(0, 10_000)] = 2  # Samples per evaluation; 0 disables them.


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(StrictConfig):
    """Snapshots of the model in probes/ during training: attention, the logit lens of each layer, head scores."""

    # Texts that the snapshots run the model on; none: the beginning of each validation text.
    prompts: list[str] = field(default_factory=list)
    # First tokens of each prompt to use, up to the context; 0 disables snapshots. Their size grows with the square:
    # GPT-2 small takes 0.2 MB per prompt and XL 1.3 MB; at 1,024 tokens they take 151 MB and 1.3 GB.
    tokens: Count[int] = 32
    every: Count[int] = 0  # Also take a snapshot every N steps, in addition to every evaluation; 0 disables it.

    def check(self) -> None:
        is_valid = "" not in self.prompts and len(self.prompts) <= 1000
        self.require("prompts", is_valid, "at most 1,000 texts of at least one character")


@dataclass(frozen=True, kw_only=True)
class NumericsConfig(StrictConfig):
    """The settings that determine the numbers of a run. They are fixed once it has started.

    Together with the data they fix every bit of a CPU run that has the same execution settings, the same number of
    threads and processes, the same CPU type and the same torch build.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    # Model reference whose weights to start from; its shape then replaces [model], which may shorten the context.
    init_from: Name[str | None] = None
    steps: PositiveCount[int | None] = None  # Number of optimizer updates. Give this or epochs. Resuming may extend it.
    epochs: Annotated[float | None, above(0, 10**6)] = None  # Passes over the training tokens. Give this or steps.
    # Tokens per update over all processes, a multiple of context_length x processes. Gradients are accumulated.
    batch_tokens: Length[int] = 524288
    # Start with updates of this many tokens, doubled until they reach batch_tokens. Needs steps.
    batch_start: Count[int | None] = None
    batch_warmup: Share[float] = 0.5  # Share of the steps with smaller updates, if batch_start is set.
    # Start with sequences of this many tokens, doubled until they reach context_length; updates keep their tokens.
    context_start: Count[int | None] = None
    context_warmup: Share[float] = 0.5  # Share of the steps with shorter sequences, if context_start is set.
    seed: Seed[int] = 1337  # Seed of initialisation, batches, dropout and samples.
    # Arithmetic of matrix products. auto: bfloat16 on GPUs that have it, otherwise float32. native: also on CPUs.
    # A resumed run keeps what these two chose when it began.
    precision: Literal["auto", "native", "float32", "tf32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig(StrictConfig):
    """The settings that say how a run is executed. They may change on every resume.

    They change the losses of updates by rounding only. With dropout, `micro_batch_size`, `device`, `compile` and
    `compile_backend` (like the number of processes) also change the masks.
    """

    name: str = "run"  # Name of the run; its directory is runs/NAME unless another one is given.
    # Most sequences per forward pass. Lower it if memory runs out: it changes rounding and dropout's masks only.
    micro_batch_size: PositiveCount[int] = 16
    device: Name[str] = "auto"  # auto, cpu, cuda, cuda:1, mps.
    # torch.compile; auto compiles on CUDA only (small models on a CPU lose more than they gain).
    compile: Literal["auto", "on", "off"] = "auto"
    compile_backend: str = "inductor"  # Backend of torch.compile.
    # Under torchrun, each process holds all weights (ddp) or a share of them (fsdp). auto: ddp if it fits.
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    # With fsdp: keep weights, gradients and optimizer state in host memory. A GPU still holds the whole model during
    # initialisation and evaluation.
    cpu_offload: bool = False
    # With fsdp: sum gradients over the processes after each micro-step, or once per update. update sends less, but
    # each process then holds all gradients (4 bytes per parameter).
    fsdp_gradient_sync: Literal["micro_step", "update"] = "micro_step"
    # Save memory by recomputing blocks in the backward pass: full keeps only each block's input, selective also keeps
    # the results of matrix products and attention.
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    # Steps between evaluations and samples; 0 evaluates only before the first and after the last step.
    eval_every: Count[int] = 250
    eval_tokens: PositiveCount[int | None] = None  # Validation tokens to evaluate on; none: the whole split.
    # Steps between evaluations on HellaSwag, a multiple of eval_every; 0 disables them.
    hellaswag_every: Count[int] = 0
    hellaswag_items: PositiveCount[int] = 1000  # Items of HellaSwag to evaluate on; 10042 are all.
    hellaswag_file: Name[str | None] = None  # HellaSwag's items as a .jsonl file; none: downloaded once.
    # Steps between checkpoints; 0 saves only at the last step and at each new best validation loss.
    checkpoint_every: Count[int] = 250
    keep_checkpoints: PositiveCount[int] = 2  # Checkpoints to keep besides the best one.
    # Also log to TensorBoard (in RUN/tensorboard), Weights & Biases, or both. Needs pip install 'glassgpt[log]'.
    log: Literal["none", "tensorboard", "wandb", "both"] = "none"
    sample: SampleConfig = field(default_factory=SampleConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


NUMERICS_SETTINGS = tuple(each.name for each in dataclasses.fields(NumericsConfig))
EXECUTION_SETTINGS = tuple(each.name for each in dataclasses.fields(ExecutionConfig))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ExecutionConfig, NumericsConfig):
    """The config of a run, as in its config.toml: `NumericsConfig` and `ExecutionConfig` in one."""

    def check(self) -> None:
        plain = self.name == self.name.strip() and self.name.isprintable() and not set(self.name) & set('/\\:*?"<>|')
        self.require("name", plain and self.name not in ("", ".", ".."), "a plain file name")
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give steps or epochs: exactly one of the two")
        if self.hellaswag_every:
            valid = f"a multiple of eval_every = {self.eval_every}"
            self.require("hellaswag_every", self.eval_every > 0 and self.hellaswag_every % self.eval_every == 0, valid)
        if self.cpu_offload and self.strategy != "fsdp":
            raise UserError("cpu_offload needs --strategy fsdp")
        if self.batch_start is not None and self.steps is None:
            raise UserError("batch_start needs steps: use --steps N instead of epochs")
        # Updates hold whole sequences, and doubling leads from each start to its end.
        context, batch = self.model.context_length, self.batch_tokens
        valid = f"a multiple of model.context_length = {context}; nearest: {_nearest_multiples(batch, context)}"
        self.require("batch_tokens", batch % context == 0, valid)
        for start, end_name, end, quantum in (
            ("context_start", "model.context_length", context, 1),
            ("batch_start", "batch_tokens", batch, context),
        ):
            valid_starts = [end >> n for n in range(1, end.bit_length()) if end % (quantum << n) == 0]
            starts = ", ".join(map(str, valid_starts)) or "none exists"
            is_valid = getattr(self, start) in (None, *valid_starts)
            self.require(start, is_valid, f"{end_name} = {end} halved once or more ({starts})")
        try:
            self.to_toml().encode()
        except UnicodeEncodeError as error:  # such as a file's name that is not UTF-8
            text = shown(error.object[: error.end].rpartition("\n")[2])
            raise UserError(f"a config cannot hold {text}, which is not valid Unicode; rename the file") from None

    def sequence_length(self, progress: float) -> int:
        """Tokens per sequence of an update; `progress` is the share of the updates done before it."""
        return _doubled(self.context_start, self.model.context_length, progress / self.context_warmup)

    def update_tokens(self, progress: float) -> int:
        """Tokens of an update; `progress` is the share of the updates done before it."""
        return _doubled(self.batch_start, self.batch_tokens, progress / self.batch_warmup)

    @property
    def batch_size(self) -> int:
        """Sequences per update."""
        return self.batch_tokens // self.model.context_length

    def sequences_per_process(self, processes: int) -> int:
        """Sequences per update on each process. Raises `UserError` if the processes cannot share them evenly."""
        smallest = self.batch_start or self.batch_tokens  # all later updates are multiples of the first one
        sequences = smallest // self.model.context_length
        if sequences % processes:
            valid = nearest_divisors(sequences, processes)
            setting = "batch_tokens" if self.batch_start is None else "batch_start"
            problem = f"{processes} processes cannot share {setting} = {smallest} evenly; use {valid} processes"
            nearest = _nearest_multiples(smallest, self.model.context_length * processes)
            raise UserError(f"{problem}, or in a new run another {setting} (nearest: {nearest})")
        return self.batch_size // processes

    def micro_steps(self, processes: int, tokens: int | None = None) -> int:
        """Forward and backward passes per process in an update (of `tokens` tokens, default batch_tokens)."""
        share = self.sequences_per_process(processes)
        sequences = share if tokens is None else tokens // self.model.context_length // processes
        return math.ceil(sequences / self.micro_batch_size)

    def micro_batch(self, processes: int) -> int:
        """Sequences per forward pass in the largest micro-batch of an update, which is divided evenly."""
        return math.ceil(self.sequences_per_process(processes) / self.micro_steps(processes))

    def compiles_on(self, device_type: str) -> bool:
        """Whether training is compiled on a type of device."""
        return self.compile == "on" or (self.compile == "auto" and device_type == "cuda")

    def to_dict(self) -> dict[str, Any]:
        """The config as nested mappings, without settings that are None."""
        return _without_none(dataclasses.asdict(self))

    def to_toml(self) -> str:
        """The config as TOML."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str, origin: str = "config") -> Self:
        """Read a config. Raises `UserError` for broken TOML, an unknown key, a wrong type or an impossible value."""
        table = parse_toml(text, origin)
        try:
            return cls.from_dict(table)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None

    def override(self, **changes: Any) -> Self:
        """A copy with other settings: `config.override(steps=100, optim={"lr": 1e-3})`.

        `steps` and `epochs` exclude each other: setting one clears the other.
        """
        if changes.get("steps") is not None:
            changes.setdefault("epochs", None)
        if changes.get("epochs") is not None:
            changes.setdefault("steps", None)
        return self.from_dict(changes, base=self)

    def differences(self, other: "TrainConfig") -> dict[str, tuple[Any, Any]]:
        """The settings that differ from another config's, as `{"optim.lr": (other's value, own value)}`."""
        own, others = (dict(flatten(dataclasses.asdict(config), keep=("mixture",))) for config in (self, other))
        return {name: (others[name], own[name]) for name in own if own[name] != others[name]}


def _nearest_multiples(number: int, quantum: int) -> str:
    """The positive multiples of a quantum around a number."""
    lower = number // quantum * quantum
    return " or ".join(str(n) for n in (lower, lower + quantum) if n)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None and v != {}}


def _doubled(start: int | None, end: int, progress: float) -> int:
    """A number that doubles from `start` to `end` at even distances while `progress` goes from 0 to 1."""
    if start is None or progress >= 1:
        return end
    return start << int(progress * ((end // start).bit_length() - 1))
