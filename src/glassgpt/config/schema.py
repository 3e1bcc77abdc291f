"""What determines a run: frozen dataclasses, strict, in and out of TOML, and the recipes shipped with the package.

Derived values (steps of an epoch, padded vocabulary, width of a head) are properties or functions, never stored, so an
override cannot leave one of them stale.
"""

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import tomli_w

from glassgpt.config.validation import StrictConfig, build
from glassgpt.utils.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class ModelConfig(StrictConfig):
    """The shape of a model. The defaults are GPT-2 small (Radford et al., 2019), its vocabulary aside."""

    vocab_size: int | None = None
    """Number of token ids. Left out, it is the tokenizer's."""
    vocab_multiple: int = 1
    """The embedding is padded to a multiple of this (128 suits GPUs); padded ids get no probability."""
    context_length: int = 1024
    """Longest text the model is trained on at once, in tokens."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads a block."""
    n_kv_head: int | None = None
    """Key and value heads a block, each shared by n_head / n_kv_head query heads. Left out, n_head."""
    head_dim: int | None = None
    """Width of a head. Left out, n_embd / n_head."""
    n_embd: int = 768
    """Width of the residual stream."""
    position: Literal["learned", "rope", "sinusoidal", "none"] = "learned"
    """Position embeddings, learned or sinusoidal; rotary ones inside attention; or none at all."""
    rope_base: float = 10000.0
    """Base of the rotary angles; larger turns slower."""
    window: int | None = None
    """Tokens that a sliding-window layer sees, the token itself included. Left out, every layer sees all before it."""
    window_globals: int = 0
    """First tokens of a text that windowed layers see from however far."""
    window_pattern: str = "S"
    """A letter a layer, repeated over the layers: S for a sliding window, L for all of the text. SSSL: every fourth sees all."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the feed-forward block and before the head."""
    norm_weight: bool = True
    """RMSNorms have a weight, those of queries and keys too."""
    norm_bias: bool | None = None
    """LayerNorms have a bias. Left out, as `bias` says."""
    norm_eps: float = 1e-5
    """Added to the variance in every normalisation."""
    embedding_norm: bool = False
    """Another normalisation, behind the embedding."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys."""
    activation: Literal["gelu_tanh", "gelu", "relu", "relu_squared", "silu", "swiglu"] = "gelu_tanh"
    """Nonlinearity of the feed-forward block; swiglu has a gate besides: a third matrix."""
    n_inner: int | None = None
    """Width of the feed-forward block. Left out, 4 n_embd; with swiglu 8/3 n_embd (as many parameters), up to a multiple of 8."""
    bias: bool = True
    """Biases in linear layers."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """First values of the projections into the residual stream: normal(0, 0.02 / sqrt(2 n_layer)), or zero."""
    tied_head: bool = True
    """The output head shares the token embedding's weights."""
    logit_softcap: float | None = None
    """Squash logits into (-cap, cap) by cap x tanh(logits / cap), as Gemma 2 does. Left out, no cap."""
    dropout: float = 0.0
    """Dropout after the embedding, on attention weights and on both residual branches."""
    attention: Literal["sdpa", "explicit", "flex"] = "sdpa"
    """Attention kernel: PyTorch's fused one, the formula written out, or FlexAttention (training with it needs CUDA)."""

    def check(self) -> None:
        for name in ("vocab_multiple", "context_length", "n_layer", "n_head", "n_embd"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("vocab_size", "head_dim", "n_inner"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "at least 1")
        self.require("logit_softcap", self.logit_softcap is None or self.logit_softcap > 0, "above 0")
        self.require("rope_base", self.rope_base > 1, "above 1")
        self.require("norm_eps", self.norm_eps > 0, "above 0")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self._check_heads()
        self._check_windows()
        if self.attention == "flex" and self.dropout:
            raise UserError(
                f"model.attention = 'flex' has no dropout on attention weights; set model.dropout to 0, got {self.dropout}"
            )
        if self.norm == "layernorm" and not self.norm_weight:
            raise UserError("model.norm_weight = false is for norm = 'rmsnorm' only: a LayerNorm has a weight here")
        if self.norm == "rmsnorm" and self.norm_bias:
            raise UserError("model.norm_bias = true is for norm = 'layernorm' only: an RMSNorm has no bias")

    def _check_heads(self) -> None:
        if self.head_dim is None and self.n_embd % self.n_head:
            nearest = _nearest_divisors(self.n_embd, self.n_head)
            raise UserError(
                f"model.n_head = {self.n_head} does not divide model.n_embd = {self.n_embd}; nearest: {nearest} (or set head_dim)"
            )
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            nearest = _nearest_divisors(self.n_head, self.n_kv_head)
            raise UserError(
                f"model.n_kv_head = {self.n_kv_head} does not divide model.n_head = {self.n_head}; the nearest: {nearest}"
            )
        if self.position == "rope" and self.head_width % 2:
            raise UserError(
                f"rotary positions turn pairs, so a head's width, {self.head_width}, must be even; change model.n_head or model.head_dim"
            )

    def _check_windows(self) -> None:
        self.require("window_globals", self.window_globals >= 0, "at least 0")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"model.window_pattern must be of the letters S and L, got {self.window_pattern!r}")
        if self.window is None:
            for name in ("window_globals", "window_pattern"):
                if getattr(self, name) != _default(type(self), name):
                    raise UserError(f"model.{name} is for sliding windows: give model.window too")
            return
        largest = self.context_length - self.window_globals
        self.require("window", 1 <= self.window <= largest, f"from 1 to context_length - window_globals = {largest}")
        if len(self.window_pattern) > self.n_layer or "S" not in self.window_pattern:
            raise UserError(
                f"model.window_pattern {self.window_pattern!r} needs an S, and no more letters than the {self.n_layer} layers"
            )

    def cropped(self, context_length: int) -> "ModelConfig":
        """The config for texts of at most `context_length`, where it is longer. A window that covers all of these is none."""
        if context_length >= self.context_length:
            return self
        if self.window is None or self.window + self.window_globals <= context_length:
            return dataclasses.replace(self, context_length=context_length)
        return dataclasses.replace(
            self, context_length=context_length, window=None, window_globals=0, window_pattern="S"
        )

    @property
    def kv_heads(self) -> int:
        """Key and value heads a block."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def inner_width(self) -> int:
        """Width of the feed-forward block."""
        if self.n_inner is not None:
            return self.n_inner
        return math.ceil(self.n_embd / 3) * 8 if self.activation == "swiglu" else 4 * self.n_embd

    @property
    def norms_have_bias(self) -> bool:
        """Whether the LayerNorms have a bias."""
        return self.norm == "layernorm" and (self.bias if self.norm_bias is None else self.norm_bias)

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer, None where the layer sees all."""
        letters = itertools.islice(itertools.cycle(self.window_pattern), self.n_layer)
        return [self.window if letter == "S" else None for letter in letters]

    @property
    def has_no_limit(self) -> bool:
        """Whether text may grow without end: no layer looks back over all of it, and no rotary distance outgrows the window.

        That to a global token does: beyond the context it is one that was never trained.
        """
        relative = self.position == "none" or (self.position == "rope" and self.window_globals == 0)
        return relative and None not in self.windows

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of `vocab_multiple`."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set; it is taken from the tokenizer when a run starts")
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:3])))


def _halved(end: int, quantum: int) -> list[int]:
    """A number halved, halved again, and so on, as long as that is a multiple of the quantum."""
    found = []
    while end % (2 * quantum) == 0:
        end //= 2
        found.append(end)
    return found


def _doubled(start: int | None, end: int, progress: float) -> int:
    """What doubles from `start` to `end` at even distances while `progress` goes from 0 to 1."""
    if start is None or progress >= 1:
        return end
    doublings = (end // start).bit_length() - 1
    return start << int(progress * doublings)


def _nearest_multiples(number: int, quantum: int) -> list[int]:
    lower = number // quantum * quantum
    return [n for n in (lower, lower + quantum) if n]


def _default(config_class: type, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(config_class) if f.name == name)


TOKENIZERS = ("characters", "bytes", "gpt2")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How one text becomes a prepared dataset. StrictConfig as part of a `DataConfig`."""

    source: str
    """A registered name, a file, a folder or pattern of files, or a dataset of the Hugging Face hub."""
    column: str = "text"
    """Column of .parquet and .csv files, or key of JSON lines, that holds the text."""
    tokenizer: str = "characters"
    """How text becomes token ids: characters, bytes, gpt2, or a tokenizer's .json file."""
    validation: Literal["fraction", "first_shard"] = "fraction"
    """What is kept for validation: a fraction of the documents, or the first shard."""
    validation_fraction: float = 0.1
    """Share of the documents for validation, evenly spaced; of a text that is one document, its end."""
    validation_source: str | None = None
    """Another source for validation; then all of the first one is trained on."""
    deduplicate: bool = False
    """Leave out documents whose text has come before."""
    skip_bad: bool = False
    """Leave out rows that hold no text (null, a number, broken JSON) instead of stopping there."""
    shard_tokens: int = 100_000_000
    """Largest number of tokens in a file of the dataset."""
    encoding: str = "utf-8"
    """Encoding of text, .csv and JSON lines."""
    errors: Literal["strict", "replace", "ignore"] = "strict"
    """What to do with bytes that are not valid in the encoding."""


# Ids of a tokenizer before its text is there; of characters a guess, since Shakespeare has 65 and source code some hundreds.
USUAL_VOCABULARIES = {"gpt2": 50257, "bytes": 256, "characters": 100}


@dataclass(frozen=True, kw_only=True)
class DataConfig(TextConfig, StrictConfig):
    """Where the text comes from and how it becomes batches."""

    source: str = "python-docs"
    """A registered name (python-docs, shakespeare, fineweb-edu, ...), a file, a folder or pattern of files, a prepared dataset (which
    brings its own tokenizer), or a dataset of the Hugging Face hub (owner/name:subset)."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Several sources with their weights, instead of `source`: each is prepared by itself, and keeps its own part for validation."""
    order: Literal["shuffled", "sequential", "random"] = "shuffled"
    """Windows of a batch: each once an epoch in shuffled order, in the text's order, or anywhere at random. (With a context_start each
    length has a shuffled order of its own; a smaller update, by batch_start, passes over the rest of its windows.)"""

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that are trained on: those of the mixture, else the one."""
        return tuple(self.mixture) or (self.source,)

    def check(self) -> None:
        if self.tokenizer not in TOKENIZERS and not self.tokenizer.endswith(".json"):
            valid = f"{', '.join(map(repr, TOKENIZERS))} or the path of a tokenizer's .json file"
            raise UserError(
                f"data.tokenizer must be {valid}, got {self.tokenizer!r}{did_you_mean(self.tokenizer, TOKENIZERS)}"
            )
        self.require("validation_fraction", 0 < self.validation_fraction < 1, "above 0 and below 1")
        self.require("shard_tokens", self.shard_tokens >= 1, "at least 1")
        for source, weight in self.mixture.items():
            if weight <= 0:
                raise UserError(f"data.mixture must have weights above 0, got {weight} for {source!r}")
        if self.mixture and self.validation_source is not None:
            raise UserError(
                "data.validation_source is for one source: of a mixture each text keeps its own part for validation"
            )
        if self.validation_source is not None and self.validation != "fraction":
            raise UserError(
                "data.validation = 'first_shard' and data.validation_source exclude each other: give one of them"
            )
        try:
            "".encode(self.encoding)
        except LookupError:
            raise UserError(f"data.encoding {self.encoding!r} is unknown; try 'utf-8', 'latin-1' or 'cp1252'") from None


@dataclass(frozen=True, kw_only=True)
class OptimConfig(StrictConfig):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""
    lr: float = 6e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warmup, down to min_lr_ratio x lr at the last step."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    beta1: float = 0.9
    """Decay of the gradient's running mean in AdamW."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean in AdamW."""
    eps: float = 1e-8
    """Added to the denominator of AdamW's update."""
    momentum: float = 0.95
    """Decay of the gradient's running mean in Muon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    skip_outliers: float = 0.0
    """Leave out an update whose loss or gradient norm is so many standard deviations above those of the 128 steps before; 0 is never."""

    def check(self) -> None:
        self.require("lr", self.lr > 0, "above 0")
        self.require("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "from 0 to 1")
        self.require("warmup_steps", self.warmup_steps >= 0, "at least 0")
        for name in ("beta1", "beta2", "momentum"):
            self.require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self.require("eps", self.eps > 0, "above 0")
        self.require("weight_decay", self.weight_decay >= 0, "at least 0")
        for name in ("grad_clip", "skip_outliers"):
            self.require(name, getattr(self, name) >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(StrictConfig):
    """What the model writes into samples.md at every evaluation."""

    prompt: str | None = None
    """Text that the samples continue. Left out, they begin as a document does."""
    count: int = 2
    """Samples at each evaluation; 0 turns them off."""
    max_new_tokens: int = 256
    """Tokens a sample."""
    temperature: float = 0.8
    """Divides the logits: below 1 is safer, above 1 wilder, 0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens only."""
    top_p: float | None = None
    """Keep the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Keep tokens at least this share as likely as the likeliest."""

    def check(self) -> None:
        self.require("count", self.count >= 0, "at least 0")
        self.require("prompt", self.prompt != "", "at least one character")
        self.require("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        self.require("temperature", self.temperature >= 0, "at least 0")
        self.require("top_k", self.top_k is None or self.top_k >= 1, "at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            self.require(name, value is None or 0 < value <= 1, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(StrictConfig):
    """What is kept of the model's inside in probes/ while it learns: its attention, what each depth expects, its kinds of heads."""

    prompts: list[str] = field(default_factory=list)
    """Texts that the model is looked into with. Left out, the beginning of each validation text."""
    tokens: int = 32
    """First tokens of each prompt that it reads, as far as the context reaches; 0 turns these snapshots off. The files grow with their
    square: of GPT-2 small's 144 heads a prompt takes 0.2 MB, of XL's 1,200 1.3 MB; at 1,024 tokens 151 MB
    and 1.3 GB."""
    every: int = 0
    """Steps between snapshots, besides those of the evaluations; 0 is none."""

    def check(self) -> None:
        self.require("every", self.every >= 0, "at least 0")
        self.require("prompts", "" not in self.prompts, "texts of at least one character")
        self.require("tokens", self.tokens >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StrictConfig):
    """A run: with the data's fingerprint, this determines every bit of it on one machine."""

    name: str = "run"
    """Name of the run, whose directory is runs/NAME unless another is given."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    init_from: str | None = None
    """A model reference whose weights to start from; its shape then replaces [model], which may crop the context."""
    steps: int | None = None
    """Number of optimizer updates. Give this or epochs."""
    epochs: float | None = None
    """Passes over the training tokens. Give this or steps."""
    batch_tokens: int = 524288
    """Tokens an update, of all processes together; a multiple of context_length x processes, reached by gradient accumulation."""
    micro_batch_size: int = 16
    """Largest number of sequences in a forward pass: lower it when memory runs out; the result stays the same up to rounding."""
    batch_start: int | None = None
    """Begin with smaller updates: of so many tokens, doubled until they are of batch_tokens. Needs steps."""
    batch_warmup: float = 0.5
    """Share of the steps with smaller updates, where there is a batch_start."""
    context_start: int | None = None
    """Begin with shorter sequences, and so many more of them: of so many tokens, doubled until they are of context_length."""
    context_warmup: float = 0.5
    """Share of the steps with shorter sequences, where there is a context_start."""
    seed: int = 1337
    """Seed of initialisation, batches, dropout and samples."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "native", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Arithmetic of matrix products; auto is bfloat16 on GPUs that have it, else float32; native is bfloat16 on CPUs that have it too."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for CUDA only (on small CPU models it costs more than it gains)."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: each process holds all weights (ddp) or a share of them (fsdp); auto is ddp as long as that leaves room."""
    cpu_offload: bool = False
    """With fsdp: keep weights, gradients and optimizer in the host's memory. A GPU still holds the whole model now and then: when it is
    made, and in evaluations."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Keep less of each block for the backward pass, and compute it again there: full keeps its input only, selective also the
    results of matrix products and attention."""
    eval_every: int = 250
    """Steps between evaluations and samples; 0 is only before the first and after the last step."""
    eval_tokens: int | None = None
    """Validation tokens to evaluate on; left out, the whole split."""
    hellaswag_every: int = 0
    """Steps between evaluations on HellaSwag, a multiple of eval_every; 0 is never."""
    hellaswag_items: int = 1000
    """Items of HellaSwag to evaluate on; 10042 are all."""
    hellaswag_file: str | None = None
    """HellaSwag's items as a .jsonl file; left out, they are downloaded once."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0 is only at the last step and at each new best validation loss."""
    keep_checkpoints: int = 2
    """Checkpoints kept besides the best one."""
    log: Literal["none", "tensorboard", "wandb", "both"] = "none"
    """Where else numbers and samples go, besides the run's own files: TensorBoard (in RUN/tensorboard), Weights & Biases, or both. Needs
    pip install 'glassgpt[log]'."""

    def check(self) -> None:
        plain = self.name == self.name.strip() and self.name.isprintable() and not set(self.name) & set('/\\:*?"<>|')
        self.require("name", plain and self.name not in ("", ".", ".."), "a plain file name")
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give steps or epochs: exactly one of the two")
        self.require("steps", self.steps is None or self.steps >= 1, "at least 1")
        self.require("epochs", self.epochs is None or self.epochs > 0, "above 0")
        for name in ("batch_tokens", "micro_batch_size", "keep_checkpoints", "hellaswag_items"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("eval_every", "hellaswag_every", "checkpoint_every", "seed"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        if self.hellaswag_every and (self.eval_every == 0 or self.hellaswag_every % self.eval_every):
            raise UserError(
                f"hellaswag_every = {self.hellaswag_every} must be a multiple of eval_every = {self.eval_every}"
            )
        self.require("eval_tokens", self.eval_tokens is None or self.eval_tokens >= 1, "at least 1")
        if self.batch_tokens % self.model.context_length:
            nearest = " or ".join(map(str, _nearest_multiples(self.batch_tokens, self.model.context_length)))
            raise UserError(
                f"batch_tokens = {self.batch_tokens} is no multiple of model.context_length = {self.model.context_length}; "
                f"the nearest that works: {nearest}"
            )
        self._require_halved("context_start", self.model.context_length, 1)
        self._require_halved("batch_start", self.batch_tokens, self.model.context_length)
        if self.batch_start is not None and self.steps is None:
            raise UserError("batch_start needs steps: give --steps N in place of epochs")
        if self.cpu_offload and self.strategy != "fsdp":
            raise UserError("cpu_offload is a part of fsdp: give --strategy fsdp beside it")

    def _require_halved(self, name: str, end: int, quantum: int) -> None:
        """Refuse a start that doubling does not lead from to the end, and a share of the steps that is none."""
        start, warmup = getattr(self, name), name.replace("start", "warmup")
        if start is not None and start not in (possible := _halved(end, quantum)):
            whole = "model.context_length" if name == "context_start" else "batch_tokens"
            raise UserError(
                f"{name} must be {whole} = {end} halved once or more ({', '.join(map(str, possible)) or 'which nothing is'}), got {start}"
            )
        self.require(warmup, 0 < getattr(self, warmup) <= 1, "above 0 and at most 1")

    def sequence_length(self, progress: float) -> int:
        """Tokens of a sequence in an update, by the share of the updates before it: `context_start`, doubled at even distances."""
        return _doubled(self.context_start, self.model.context_length, progress / self.context_warmup)

    def update_tokens(self, progress: float) -> int:
        """Tokens of an update, by the share of the updates before it: `batch_start`, doubled at even distances."""
        return _doubled(self.batch_start, self.batch_tokens, progress / self.batch_warmup)

    def share_of_batch(self, processes: int) -> int:
        """Sequences an update on each of so many processes. Raises `UserError` where they do not divide the batch."""
        if self.batch_size % processes:
            quantum = self.model.context_length * processes
            nearest = " or ".join(map(str, _nearest_multiples(self.batch_tokens, quantum)))
            raise UserError(
                f"batch_tokens = {self.batch_tokens} are {self.batch_size} sequences, which {processes} processes cannot share evenly; "
                f"the nearest that works: --batch-tokens {nearest}"
            )
        if self.batch_start is not None and self.batch_start // self.model.context_length % processes:
            raise UserError(
                f"batch_start = {self.batch_start} are too few sequences for {processes} processes: give a larger one, or leave it out"
            )
        return self.batch_size // processes

    def compiles_on(self, device_type: str) -> bool:
        """Whether training is compiled there."""
        return self.compile == "on" or (self.compile == "auto" and device_type == "cuda")

    @property
    def possible_processes(self) -> list[int]:
        """The numbers of processes that can share every update's sequences."""
        smallest = (
            self.batch_start or self.batch_tokens
        ) // self.model.context_length  # of which all updates are multiples
        return [n for n in range(1, smallest + 1) if smallest % n == 0]

    def micro_steps(self, processes: int, tokens: int | None = None) -> int:
        """Forward and backward passes on each of so many processes, as even as they can be: of an update of so many tokens, of all."""
        share = self.share_of_batch(processes) if tokens is None else tokens // self.model.context_length // processes
        return math.ceil(share / self.micro_batch_size)

    @property
    def batch_size(self) -> int:
        """Sequences an update."""
        return self.batch_tokens // self.model.context_length

    def to_dict(self) -> dict[str, Any]:
        """The config as nested mappings; what is left out (`None`) is not in them."""
        return _without_none(dataclasses.asdict(self))

    def to_toml(self) -> str:
        """The config as TOML."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str, origin: str = "config") -> Self:
        """Read a config. Raises `UserError` for broken TOML, an unknown key, a wrong type or an impossible value."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{origin} is not valid TOML: {error}") from None
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from nested mappings; see `from_toml` for the errors."""
        return build(cls, values)

    def override(self, **changes: Any) -> Self:
        """A copy with fields replaced: `config.override(steps=100, optim={"lr": 1e-3})`.

        `steps` and `epochs` exclude each other, so giving one withdraws the other.
        """
        if changes.get("steps") is not None:
            changes.setdefault("epochs", None)
        if changes.get("epochs") is not None:
            changes.setdefault("steps", None)
        return build(type(self), changes, base=self)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None and v != {}}
