"""Map configs and tensors between glassgpt and a model family of transformers, in both directions.

A config that asks for anything glassgpt does not support is refused, with the key: every key must be one that the
family reads, or be known to change nothing. Checked against transformers 5.23.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors

# Keys that change no logits: settings for generation, initialisation, labels and storage, and precisions that are
# float32 here.
_HARMLESS = frozenset(
    """architectures attention_softmax_in_fp32 attn_implementation begin_suppress_tokens bos_token_id
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label inference_runner initializer_range is_llama_config keys_to_ignore_at_inference label2id length_penalty
    max_batch_size max_length max_sequence_length min_length model_type n_ctx n_special no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_key_length pad_token_id pre_allocate_kv_cache predict_special_tokens prefix pretraining_tp
    problem_type remove_invalid_values reorder_and_upcast_attn repetition_penalty return_dict return_dict_in_generate
    scale_attention_softmax_in_fp32 sep_token_id suppress_tokens task_specific_params temperature
    tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id use_bfloat16 use_cache validate_runner_input""".split()
)
_HARMLESS_START = ("_", "summary_", "unsloth_")
# Keys for which null has a meaning: a width or number that follows from the others, no cap, no dropout.
_NULLABLE = {"n_inner", "num_key_value_heads", "head_dim", "final_logit_softcapping", "attention_dropout"}
# Second names of sizes, under which transformers reads them in every family.
_SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
_ROPE_MUST_BE = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1,)}
_GPT2_SMALL = ModelConfig()
# Parts of names that DDP, torch.compile, FSDP and activation checkpointing add.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # float8 would need its scales
_SLIDING, _FULL = "sliding_attention", "full_attention"
_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
    "relu": "relu", "relu2": "relu_squared", "silu": "silu", "swish": "silu",
}  # fmt: skip


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names without those of training's wrappers. Raises `UserError` if two get the same name."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in named:
            raise UserError(f"two tensors are called {plain!r}, one of them {name!r}")
        named[plain] = tensor
    while named and all(name.startswith("model.") for name in named):
        named = {name.removeprefix("model."): tensor for name, tensor in named.items()}
    return named


def _unsupported(key: str, value: object) -> UserError:
    return UserError(f"{key} = {value!r:.60} is not supported; loading it anyway would give wrong outputs")


def _normalized(config: ModelConfig) -> ModelConfig:
    """The config with defaults for everything that changes no logits or equals the default."""
    default, c = _GPT2_SMALL, config
    # A longer text than the context exists only with relative positions.
    full = c.window is None or (c.position == "learned" and c.window + c.window_globals >= c.context_length)
    pattern = "".join("L" if window is None else "S" for window in c.windows)
    shortest = next(n for n in range(1, len(pattern) + 1) if (pattern[:n] * -(-len(pattern) // n)).startswith(pattern))
    default_bias = c.norm == "rmsnorm" or c.resolved_norm_bias == c.bias
    return replace(
        c,
        vocab_multiple=default.vocab_multiple,
        residual_init=default.residual_init,
        attention=default.attention,
        n_kv_head=None if c.resolved_n_kv_head == c.n_head else c.resolved_n_kv_head,
        head_dim=None if c.resolved_head_dim * c.n_head == c.n_embd else c.resolved_head_dim,
        n_inner=None if c.resolved_n_inner == replace(c, n_inner=None).resolved_n_inner else c.resolved_n_inner,
        norm_bias=None if default_bias else c.resolved_norm_bias,
        rope_base=c.rope_base if c.position == "rope" else default.rope_base,
        window=None if full else c.window,
        window_globals=0 if full else c.window_globals,
        window_pattern="S" if full else pattern[:shortest],
    )


def _read_setting(ours: str, values: Mapping[str, Any]) -> Any:
    """One of our settings from the keys that hold it."""
    for key, value in values.items():
        if value is None and key not in _NULLABLE:
            raise _unsupported(key, None)
    key, value = next(iter(values.items()))
    if ours == "dropout":  # only matters for further training, so several rates may differ
        return value or 0.0
    if any(other != value for other in values.values()):
        listed = " and ".join(f"{k} = {v!r}" for k, v in values.items())
        raise UserError(f"{listed} differ, but they are one setting in glassgpt")
    if ours != "activation":
        return value
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise _unsupported(key, value)
    return _ACTIVATIONS[value]


def _with_windows(config: ModelConfig, values: Mapping[str, Any]) -> ModelConfig:
    """Add sliding windows: of all layers, of those from `max_window_layers` on, or of those in `layer_types`."""
    window: Any = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    types = values.get("layer_types")
    if window is None and types is None:
        return config
    first = values.get("max_window_layers", 0)
    for key, value in (("sliding_window", window), ("max_window_layers", first)):
        if value is not None and type(value) is not int:
            raise _unsupported(key, value)
    if types is None:
        types = [_SLIDING if i >= first else _FULL for i in range(config.n_layer)]
    if isinstance(types, list) and len(types) != config.n_layer:
        raise UserError(f"layer_types has {len(types)} entries, but the model {config.n_layer} layers; make them equal")
    known = isinstance(types, list) and all(t in (_SLIDING, _FULL) for t in types)
    if not known or (_SLIDING in types and window is None):
        raise _unsupported("layer_types", types)
    if window is None or _SLIDING not in types:
        return config
    return replace(config, window=window, window_pattern="".join("S" if t == _SLIDING else "L" for t in types))


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model family stores a `ModelConfig` and the tensors of a `GPT`. Settings not here have our defaults."""

    name: str
    model_type: str = ""  # like `architecture`, of transformers; empty for others
    architecture: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that all models share, without a key
    # Values of settings in `keys` if a config.json has no such key; an activation is in transformers' spelling.
    defaults: Mapping[str, Any]
    zeros: frozenset[str] = frozenset()  # `bias` and `norm_bias` if the family always has them: zeros without
    keys: Mapping[str, str]  # our setting -> the key that holds it, or several
    windows: Mapping[str, Any] = field(default_factory=dict)  # keys for sliding windows, with transformers' defaults
    # Keys with the only supported values; the first is transformers' default, and is written.
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rope_type: str = "default"  # transformers' default if no key holds it
    rope_theta: float | None = None  # transformers' default if no key holds it; None: no rotary positions
    unread: frozenset[str] = frozenset()  # keys of published configs that transformers does not read
    heads_divide: bool = False  # transformers requires that n_head divides n_embd, even if head_dim is given
    prefix: str  # of all tensors except the head's; files of the bare model leave it out
    layers: str  # the name before the number of a block
    tensors: Mapping[str, str]  # our module, within its block -> theirs: one name, or three for the parts of qkv
    transposed: bool = False  # GPT-2's Conv1D stores the weights of linear layers as (in, out)
    swapped: bool = False  # NanoChat rotates a head in the other direction, so the halves of q and k are exchanged
    buffers: str  # regular expression for tensors of old files that are not parameters

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """config.json -> our config. Raises `UserError` with the first key that is not supported."""
        for key, value in config.items():
            if not self._is_supported(key, value):
                raise _unsupported(key, value)
        settings = dict(self.fixed)
        for ours, keys in self.keys.items():
            default = self.defaults.get(ours, getattr(_GPT2_SMALL, ours))
            settings[ours] = _read_setting(ours, {key: config.get(key, default) for key in keys.split()})
        if self.rope_theta is not None:
            settings["rope_base"] = self._rope_base(config)
        windows = {key: config.get(key, default) for key, default in self.windows.items()}
        return _normalized(_with_windows(ModelConfig(**settings), windows))

    def _is_supported(self, key: str, value: object) -> bool:
        """Whether a key is read, has a required value, changes nothing, or asks for nothing (null, false or empty)."""
        must_be = {**self.must_be, "is_causal": (True,)}
        known = {*" ".join(self.keys.values()).split(), *self.windows, *self.unread, *_HARMLESS}
        if self.rope_theta is not None:
            must_be["partial_rotary_factor"] = (1, None)
            known |= {"rope_theta", "rope_scaling", "rope_parameters"}
        if key in must_be:
            return value in must_be[key]
        if key in _SIZES:
            return key in known
        return not value or key in known or key.startswith(_HARMLESS_START)

    def _rope_base(self, config: Mapping[str, Any]) -> Any:
        """The base from any of the three keys, in transformers' order."""
        holder = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope = config.get(holder)
        rope = {"rope_type": self.rope_type} if rope is None else rope
        if not isinstance(rope, Mapping):
            raise _unsupported(holder, rope)
        for key, value in sorted(rope.items(), key=lambda item: item[0] not in _ROPE_MUST_BE):  # kind of scaling first
            is_asked = value or key in _ROPE_MUST_BE
            if is_asked and key != "rope_theta" and value not in _ROPE_MUST_BE.get(key, ()):
                raise _unsupported(f"{holder}.{key}", value)
        return rope.get("rope_theta", config.get("rope_theta", self.rope_theta))

    def stored_config(self, config: ModelConfig) -> ModelConfig:
        """The config of the model in a file of the family: with biases (zeros) if the family always has them."""
        if config.norm == "layernorm":
            norm_bias = config.resolved_norm_bias or "norm_bias" in self.zeros
            config = replace(config, bias=config.bias or "bias" in self.zeros, norm_bias=norm_bias)
        return _normalized(config)

    def obstacles(self, config: ModelConfig) -> list[str]:
        """The settings, as `name = value`, that the family cannot hold."""
        stored = self.stored_config(config)
        windows = {"sliding_window": "window", "layer_types": "window_pattern"}
        free = {*self.keys, *self.zeros, "rope_base", *(windows[key] for key in windows.keys() & self.windows.keys())}
        required = {f.name: self.fixed.get(f.name, f.default) for f in fields(stored) if f.name not in free}
        wrong = [name for name, value in required.items() if getattr(stored, name) != value]
        if "activation" in self.keys and stored.activation not in _ACTIVATIONS.values():
            wrong.append("activation")
        if self.heads_divide and stored.n_embd % stored.n_head:
            wrong.append("head_dim")
        return [f"{name} = {getattr(stored, name)!r}" for name in wrong]

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """Our config, without `obstacles` -> config.json with every key that `read_config` reads."""
        stored = self.stored_config(config)
        values = {key: allowed[0] for key, allowed in self.must_be.items()}
        resolved = {name: getattr(stored, f"resolved_{name}") for name in ("n_kv_head", "head_dim", "n_inner")}
        for ours, keys in self.keys.items():
            value = resolved.get(ours, getattr(stored, ours))
            if ours == "activation":  # in the family's own spelling, if it means the same
                spellings = (self.defaults[ours], *_ACTIVATIONS)
                value = next(name for name in spellings if _ACTIVATIONS.get(name) == stored.activation)
            values |= dict.fromkeys(keys.split(), value)
        if self.rope_theta is not None:  # transformers 5 reads the first, older ones and other programs the second
            values["rope_parameters"] = {"rope_type": "default", "rope_theta": stored.rope_base}
            values["rope_theta"] = stored.rope_base
        types = [_FULL if window is None else _SLIDING for window in stored.windows]
        windows = {
            "sliding_window": stored.window,
            "use_sliding_window": _SLIDING in types,
            "max_window_layers": types.index(_SLIDING) if _SLIDING in types else len(types),
            "layer_types": types,
        }
        return values | {key: windows[key] for key in self.windows}

    def _parts(self, name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
        """Views of one of our parameters, by their names in a file: one, or three if the family splits qkv."""
        module, _, suffix = name.rpartition(".")  # the suffix is `weight` or `bias`
        if module == "head":
            return {f"lm_head.{suffix}": tensor}
        prefix = self.prefix
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            prefix = f"{self.prefix}{self.layers}.{number}."
            if self.transposed and tensor.ndim == 2:
                tensor = tensor.T
        names = [f"{prefix}{theirs}.{suffix}" for theirs in self.tensors[module].split()]
        if len(names) == 1:
            return {names[0]: tensor}
        kv_rows = config.resolved_n_kv_head * config.resolved_head_dim
        return dict(zip(names, torch.split(tensor, [len(tensor) - 2 * kv_rows, kv_rows, kv_rows]), strict=True))

    def _rotated(self, theirs: str, tensor: Tensor, config: ModelConfig) -> Tensor:
        """A tensor with the other direction of rotation, if the family has that; its own inverse."""
        if not self.swapped or re.search(r"\.[qk]_proj\.", theirs) is None:
            return tensor
        halves = tensor.reshape(-1, 2, config.resolved_head_dim // 2, *tensor.shape[1:])
        return halves.flip(1).reshape(tensor.shape)

    def export_tensors(self, model: GPT, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All tensors of a file, of a model without `obstacles`. Raises `UserError` for numbers beyond the dtype."""
        config, parameters = self.stored_config(model.config), dict(model.named_parameters())
        result: dict[str, Tensor] = {}
        for name, stored in GPT.empty(config, "meta").named_parameters():
            if name in parameters:  # without the rows that pad the embedding and the head
                tensor = parameters[name].detach()[: len(stored)].cpu().to(dtype)
                if tensor.isinf().any() and parameters[name].isfinite().all():
                    raise UserError(f"{name} has numbers that are too large for {dtype}; export in float32 or bfloat16")
            else:  # a bias that only the file has
                tensor = torch.zeros(stored.shape, dtype=dtype)
            for theirs, part in self._parts(name, tensor, config).items():
                result[theirs] = self._rotated(theirs, part, config)
        return result

    def named_parameters(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters among a file's tensors, by full names: with the prefix if it was left out.

        Raises `UserError` for tensors without plain data, and unless they have as many layers as the config.
        """
        tensors = plain_names(tensors)
        for name, tensor in tensors.items():
            is_plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"
            if not is_plain or tensor.untyped_storage().nbytes() < tensor.nbytes:  # repeated by a stride of 0
                raise UserError(f"the tensor {name!r} is sparse, nested, repeated or without data, not a plain array")
        prefix = "" if any(name.startswith(self.prefix) for name in tensors) else self.prefix
        named = {name if name.startswith("lm_head.") else f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        is_buffer = re.compile(self.buffers).fullmatch
        named = {name: tensor for name, tensor in named.items() if not is_buffer(name.removeprefix(self.prefix))}
        if self._embedding not in named:
            own = self._embedding.removeprefix(self.prefix)
            other = next((name.removesuffix(own) for name in tensors if name.endswith(f".{own}")), "")
            hint = f"; its names begin with {other!r}" if other not in ("", self.prefix) else ""
            raise UserError(f"the tensor {self._embedding!r} of a {self.name} model is missing{hint}")
        number = re.compile(rf"{re.escape(self.prefix + self.layers)}\.(\d+)\.").match
        layers = len({match[1] for match in map(number, named) if match})
        if layers != config.n_layer:
            raise UserError(f"its config has {config.n_layer:,} layers, and its weights have {layers:,}")
        return named

    def load_tensors(self, model: GPT, tensors: Mapping[str, Tensor]) -> None:
        """Fill a model from `named_parameters`. Raises `UserError`, and fills nothing, unless these are exactly its."""
        unused = dict(tensors)
        embedding = self._embedding
        head = unused.pop("lm_head.weight", None) if model.config.tied_head else None
        if head is not None and embedding in unused and not torch.equal(head, unused[embedding]):
            raise UserError(f"lm_head.weight differs from {embedding}, although the config ties them")
        plan = []
        for name, parameter in model.named_parameters():
            for theirs, part in self._parts(name, parameter.detach(), model.config).items():
                tensor = unused.pop(theirs, None)
                if tensor is None:
                    raise UserError(f"the tensor {theirs!r} of a {self.name} model is missing")
                if tensor.shape != part.shape or tensor.dtype not in _DTYPES:
                    expected = f"floating-point numbers of shape {tuple(part.shape)}"
                    raise UserError(f"the tensor {theirs!r} is {tensor.dtype} {tuple(tensor.shape)}, not {expected}")
                plan.append((theirs, part, tensor))
        if unused:
            raise UserError(f"{len(unused)} tensors do not belong to a {self.name} model, for example {min(unused)!r}")
        for theirs, part, tensor in plan:
            part.copy_(self._rotated(theirs, tensor, model.config))

    @property
    def _embedding(self) -> str:
        return f"{self.prefix}{self.tensors['embedding']}.weight"


@dataclass(frozen=True)
class ExternalModel:
    """A model that another program wrote, whose config is supported. Tokenizer and weights are read when needed."""

    path: Path
    family: Family
    model_config: ModelConfig  # `vocab_size` included
    facts: tuple[tuple[str, str], ...]  # names and values that `glassgpt info` prints
    read_tensors: Callable[[], Mapping[str, Tensor]]
    read_tokenizer: Callable[[], Tokenizer | None]
    end_ids: tuple[int, ...] | None = None  # as `GPT.end_ids`

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None. Raises `UserError` if it is damaged."""
        return self.read_tokenizer()

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The parameters in all files by name, of as many layers as the config has. Raises `UserError`."""
        with explain_os_errors("read", self.path):
            tensors = self.read_tensors()
        with self._explained():
            return self.family.named_parameters(self.model_config, tensors)

    def load_model(self, model: GPT) -> None:
        """Fill a model's parameters in place, in their own dtype. Raises `UserError` with the first wrong tensor."""
        tensors = self.tensors
        with self._explained():
            self.family.load_tensors(model, tensors)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"cannot load {self.path}: {error}") from None
