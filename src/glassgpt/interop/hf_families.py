"""How transformers' model families write a model: each is a row that maps its config and its tensors, both ways.

What a config asks and glassgpt's slots cannot do is refused by name: every key must be one that the family reads, or be
known to change nothing. The rows were checked against transformers 5.23.
"""

import itertools
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.model.gpt import GPT
from glassgpt.utils.errors import UserError

# Keys that change no logits: how to generate, initialise, label or store; precision of what is computed here in float32.
_HARMLESS = frozenset(
    """architectures attention_softmax_in_fp32 attn_implementation begin_suppress_tokens bos_token_id decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label inference_runner initializer_range
    is_llama_config keys_to_ignore_at_inference label2id length_penalty max_batch_size max_length max_sequence_length min_length model_type
    n_ctx n_special no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states
    output_past output_scores pad_key_length pad_token_id pre_allocate_kv_cache predict_special_tokens prefix pretraining_tp
    problem_type remove_invalid_values reorder_and_upcast_attn repetition_penalty return_dict return_dict_in_generate
    scale_attention_softmax_in_fp32 sep_token_id suppress_tokens task_specific_params temperature tie_last_hidden_states
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id use_bfloat16
    use_cache validate_runner_input""".split()
)
_HARMLESS_START = ("_", "summary_", "unsloth_")
# Keys for which null has a meaning: the width or number that follows from the others, no cap, no dropout.
_NULLABLE = frozenset({"n_inner", "num_key_value_heads", "head_dim", "final_logit_softcapping", "attention_dropout"})
_ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_ROPE_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1,),
}
_SLIDING, _FULL = "sliding_attention", "full_attention"

_ACTIVATIONS: Mapping[str, str] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}


def _refusal(key: str, value: object) -> UserError:
    return UserError(
        f"{key} = {reprlib.repr(value)} asks for what glassgpt has no slot for: the model would come out wrong"
    )


def _shortest_pattern(letters: str) -> str:
    """The fewest letters that give these when they are repeated."""
    return next(
        letters[:n]
        for n in range(1, len(letters) + 1)
        if all(a == b for a, b in zip(letters, itertools.cycle(letters[:n])))
    )


def _normal(config: ModelConfig) -> ModelConfig:
    """The config without what changes no logits, and with defaults wherever these say the same."""
    no_window = config.window is None or config.window + config.window_globals >= config.context_length
    defaults = ModelConfig()
    return replace(
        config,
        vocab_multiple=defaults.vocab_multiple,
        residual_init=defaults.residual_init,
        attention=defaults.attention,
        n_kv_head=None if config.resolved_n_kv_head == config.n_head else config.resolved_n_kv_head,
        head_dim=None if config.resolved_head_dim * config.n_head == config.n_embd else config.resolved_head_dim,
        n_inner=None
        if config.resolved_n_inner == replace(config, n_inner=None).resolved_n_inner
        else config.resolved_n_inner,
        norm_bias=None
        if config.norm == "rmsnorm" or config.resolved_norm_bias == config.bias
        else config.resolved_norm_bias,
        rope_base=config.rope_base if config.position == "rope" else defaults.rope_base,
        window=None if no_window else config.window,
        window_globals=0 if no_window else config.window_globals,
        window_pattern="S"
        if no_window
        else _shortest_pattern("".join("L" if w is None else "S" for w in config.windows)),
    )


def _halves_swapped(rows: Tensor, head_width: int) -> Tensor:
    """Rows (heads x D, ...) with the two halves of each head's D exchanged."""
    return torch.flip(rows.reshape(-1, 2, head_width // 2, *rows.shape[1:]), [1]).reshape(rows.shape)


@dataclass(frozen=True)
class Row:
    """Where the weight and bias of a module here are in a family's files; `{}` is the number of a block."""

    ours: str
    theirs: tuple[str, ...]
    """Three for the rows of our fused qkv, else one."""
    transposed: bool = False
    """GPT-2's Conv1D holds a weight as (in, out)."""
    swapped: bool = False
    """NanoChat turns the halves of a head the other way round, so those of its q and k change places."""

    def pieces(self, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
        """Our tensor -> theirs, one for each name."""
        tensor = tensor.T if self.transposed and tensor.ndim == 2 else tensor
        if len(self.theirs) == 1:
            return [tensor]
        D = config.resolved_head_dim
        end_of_q, end_of_k = config.n_head * D, (config.n_head + config.resolved_n_kv_head) * D
        q, k, v = tensor[:end_of_q], tensor[end_of_q:end_of_k], tensor[end_of_k:]
        return [_halves_swapped(q, D), _halves_swapped(k, D), v] if self.swapped else [q, k, v]

    def whole(self, pieces: list[Tensor], config: ModelConfig) -> Tensor:
        """Their tensors -> ours: undoes `pieces`."""
        if self.swapped:
            pieces = [_halves_swapped(piece, config.resolved_head_dim) for piece in pieces[:2]] + pieces[2:]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return tensor.T if self.transposed and tensor.ndim == 2 else tensor


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one of transformers' model families writes what `ModelConfig` and `GPT` hold."""

    name: str
    model_type: str
    architecture: str
    prefix: str
    """Of all tensors but the head's; files of the bare model leave it out."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Slots that every model of the family has in common, where they are not ModelConfig's defaults."""
    zeros: frozenset[str] = frozenset()
    """`bias` and `norm_bias`, where the family always has them: zeros for a model that has none."""
    keys: Mapping[str, tuple[str, ...]]
    """Our setting -> the keys that hold it."""
    defaults: Mapping[str, Any]
    """Every key that is read, with what transformers takes where it is left out."""
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys with the only values that have a slot; the first of them is transformers' default, and written."""
    rope_theta: float = 10000.0
    """What transformers takes where no key holds it."""
    unread: frozenset[str] = frozenset()
    """Keys of published configs that transformers' own class for the family does not look at."""
    heads_divide: bool = False
    """transformers insists that n_head divides n_embd, even where a head's width is given."""
    rows: tuple[Row, ...]
    buffers: str
    """Tensors of old files (a regular expression) that are no parameters."""

    def read(self, config: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ours. Raises `UserError` naming the first key that asks for what there is no slot for."""
        for key, given in config.items():
            if not self._is_understood(key, given):
                raise _refusal(key, given)
        value = {key: config.get(key, default) for key, default in self.defaults.items()}
        for key in itertools.chain(*self.keys.values()):
            if value[key] is None and key not in _NULLABLE:
                raise _refusal(key, None)
        settings = {ours: self._setting(ours, {key: value[key] for key in keys}) for ours, keys in self.keys.items()}
        if self._rope_keys:
            settings["rope_base"] = self._rope_base(config)
        shape = ModelConfig(**{**self.fixed, **settings})
        return _normal(self._with_windows(shape, value))

    def _is_understood(self, key: str, given: object) -> bool:
        """Whether a key is read, says what it must, changes nothing, or asks for nothing (null, false or empty)."""
        must_be = {**self.must_be, "is_causal": (True, None)} | (
            {"partial_rotary_factor": (1, None)} if self._rope_keys else {}
        )
        if key in must_be:
            return given in must_be[key]
        harmless = key in _HARMLESS or key in self.unread or key.startswith(_HARMLESS_START)
        return not given or harmless or key in self.defaults or key in self._rope_keys

    def _setting(self, ours: str, given: Mapping[str, Any]) -> Any:
        key, value = next(iter(given.items()))
        if ours == "dropout":
            # Where there are several they may differ: it is a setting for further training and no part of what was learned.
            return value or 0.0
        if any(other != value for other in given.values()):
            raise UserError(
                f"{' and '.join(f'{k} = {v!r}' for k, v in given.items())} differ: they are one setting of a glassgpt model"
            )
        if ours == "activation":
            if not isinstance(value, str) or value not in _ACTIVATIONS:
                raise _refusal(key, value)
            return _ACTIVATIONS[value]
        return value

    @property
    def _rope_keys(self) -> frozenset[str]:
        return _ROPE_KEYS if self.fixed.get("position") == "rope" else frozenset()

    def _rope_base(self, config: Mapping[str, Any]) -> Any:
        """The base from any of the three keys, in the order in which transformers looks."""
        holder = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope = config.get(holder)
        rope = self.defaults["rope_parameters"] if rope is None else rope
        if not isinstance(rope, Mapping):
            raise _refusal(holder, rope)
        for key, value in sorted(
            rope.items(), key=lambda item: item[0] not in _ROPE_MUST_BE
        ):  # the kind of scaling is named first
            if value and key != "rope_theta" and value not in _ROPE_MUST_BE.get(key, ()):
                raise _refusal(f"{holder}.{key}", value)
        return rope.get("rope_theta") or config.get("rope_theta") or self.rope_theta

    def _with_windows(self, shape: ModelConfig, value: Mapping[str, Any]) -> ModelConfig:
        """Add the sliding windows: of all layers, of those from the `max_window_layers`-th on, or of those in `layer_types`."""
        window: Any = value.get("sliding_window") if value.get("use_sliding_window", True) else None
        if window is None and not value.get("layer_types"):
            return shape
        if window is not None and type(window) is not int:
            raise _refusal("sliding_window", window)
        windowed_from = value.get("max_window_layers", 0)
        if type(windowed_from) is not int:
            raise _refusal("max_window_layers", windowed_from)
        types = value.get("layer_types") or [_SLIDING if i >= windowed_from else _FULL for i in range(shape.n_layer)]
        known = isinstance(types, list) and len(types) == shape.n_layer and all(t in (_SLIDING, _FULL) for t in types)
        if not known or (_SLIDING in types and window is None):
            raise _refusal("layer_types", types)
        if window is None or _SLIDING not in types or window >= shape.context_length:
            return shape
        return replace(shape, window=window, window_pattern="".join("S" if t == _SLIDING else "L" for t in types))

    def stored(self, config: ModelConfig) -> ModelConfig:
        """The model that a checkpoint of the family holds for this one: with zeros for biases that it must have."""
        if config.norm == "layernorm":
            norm_bias = config.resolved_norm_bias or "norm_bias" in self.zeros
            config = replace(config, bias=config.bias or "bias" in self.zeros, norm_bias=norm_bias)
        return _normal(config)

    def obstacles(self, config: ModelConfig) -> list[str]:
        """The settings, as `name = value`, that the family cannot hold."""
        stored = self.stored(config)
        free = {*self.keys, *self.zeros, "rope_base"}
        free |= {
            ours
            for ours, key in (("window", "sliding_window"), ("window_pattern", "layer_types"))
            if key in self.defaults
        }
        wrong = [
            f.name
            for f in fields(stored)
            if f.name not in free and getattr(stored, f.name) != self.fixed.get(f.name, f.default)
        ]
        if "activation" in self.keys and stored.activation not in _ACTIVATIONS.values():
            wrong.append("activation")
        if self.heads_divide and stored.n_embd % stored.n_head:
            wrong.append("head_dim")
        return [f"{name} = {getattr(stored, name)!r}" for name in wrong]

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Our config -> config.json with every key that `read` looks at. The config has no `obstacles`."""
        stored = self.stored(config)
        value = {**self.defaults, **{key: values[0] for key, values in self.must_be.items()}}
        derived = {
            "n_kv_head": stored.resolved_n_kv_head,
            "head_dim": stored.resolved_head_dim,
            "n_inner": stored.resolved_n_inner,
        }
        for ours, keys in self.keys.items():
            for key in keys:
                value[key] = derived.get(ours, getattr(stored, ours))
                if ours == "activation":  # in the family's own spelling, where it means the same
                    spellings = (self.defaults[key], *_ACTIVATIONS)
                    value[key] = next(name for name in spellings if _ACTIVATIONS.get(name) == stored.activation)
        if self._rope_keys:  # transformers 5 reads the first, older ones and other programs the second
            value |= {
                "rope_parameters": {"rope_type": "default", "rope_theta": stored.rope_base},
                "rope_theta": stored.rope_base,
            }
        types = [_FULL if window is None else _SLIDING for window in stored.windows]
        first = types.index(_SLIDING) if _SLIDING in types else len(types)
        windows = {
            "sliding_window": stored.window,
            "use_sliding_window": _SLIDING in types,
            "max_window_layers": first,
            "layer_types": types,
        }
        return value | {key: windows[key] for key in windows.keys() & value.keys()}

    def places(self, name: str) -> tuple[Row, list[str]]:
        """The row of one of our parameters, and the names of its pieces in a file."""
        module, _, kind = name.rpartition(".")
        number = "".join(re.findall(r"^blocks\.(\d+)\.", module))
        pattern = module.replace(f"blocks.{number}.", "blocks.{}.", 1)
        row = next(row for row in self.rows if row.ours == pattern)
        return row, [f"{theirs.format(number)}.{kind}" for theirs in row.theirs]

    def tensors_of(self, model: GPT) -> dict[str, Tensor]:
        """All tensors of a file of the family, in float32 on the CPU. The model's config has no `obstacles`."""
        config = self.stored(model.config)
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in GPT(config).named_parameters()}
        ours, result = dict(model.named_parameters()), dict[str, Tensor]()
        for name, shape in shapes.items():
            row, names = self.places(name)
            # Rows beyond the vocabulary are padding of the embedding and the head.
            tensor = ours[name].detach()[: shape[0]].cpu().float() if name in ours else torch.zeros(shape)
            result |= dict(zip(names, row.pieces(tensor, config), strict=True))
        return result

    def fill(self, model: GPT, tensors: Mapping[str, Tensor]) -> None:
        """Fill a model's parameters from a file's tensors. Raises `UserError`, and fills nothing, unless these are just the model's."""
        found = self._named(tensors)
        if model.config.tied_head and (head := found.pop("lm_head.weight", None)) is not None:
            (embedding,) = self.places("embedding.weight")[1]
            if embedding in found and not torch.equal(head, found[embedding]):
                raise UserError(f"its lm_head.weight is not {embedding}, although its config ties the two")
        plan, left = [], dict(found)
        for name, parameter in model.named_parameters():
            row, names = self.places(name)
            for their, piece in zip(names, row.pieces(parameter.detach().to("meta"), model.config), strict=True):
                tensor = left.pop(their, None)
                if tensor is None:
                    raise UserError(f"it lacks the tensor {their!r} of a {self.name} model with its config")
                if tensor.shape != piece.shape or not tensor.is_floating_point():
                    expected = f"{tuple(piece.shape)} of floating-point numbers"
                    raise UserError(
                        f"its tensor {their!r} is {tuple(tensor.shape)} of {tensor.dtype}, where its config asks for {expected}"
                    )
            plan.append((parameter, row, names))
        if left:
            raise UserError(
                f"it has {len(left)} tensors that a {self.name} model with its config does not have, {min(left)!r} for one"
            )
        with torch.no_grad():
            for parameter, row, names in plan:
                parameter.copy_(row.whole([found[their] for their in names], model.config))

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters among a file's tensors, with the prefix where it was left out."""
        prefix = "" if any(name.startswith(self.prefix) for name in tensors) else self.prefix
        named = {name if name.startswith("lm_head.") else f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        return {
            name: tensor
            for name, tensor in named.items()
            if not re.fullmatch(self.buffers, name.removeprefix(self.prefix))
        }


def gpt2_rows(*, transposed: bool) -> tuple[Row, ...]:
    whole = {
        "embedding": "transformer.wte",
        "positions.table": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }
    norms = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
    linear = {
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    return (
        *(Row(ours, (theirs,)) for ours, theirs in whole.items()),
        *(Row(f"blocks.{{}}.{ours}", (f"transformer.h.{{}}.{theirs}",)) for ours, theirs in norms.items()),
        *(Row(f"blocks.{{}}.{ours}", (f"transformer.h.{{}}.{theirs}",), transposed) for ours, theirs in linear.items()),
    )


def _llama_rows(renamed: Mapping[str, str] | None = None, *, swapped: bool = False) -> tuple[Row, ...]:
    whole = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    block = {
        "attention_norm": "input_layernorm",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "attention.out": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
        **(renamed or {}),
    }
    return (
        *(Row(ours, (theirs,)) for ours, theirs in whole.items()),
        *(Row(f"blocks.{{}}.{ours}", (f"model.layers.{{}}.{theirs}",)) for ours, theirs in block.items()),
        Row(
            "blocks.{}.attention.qkv",
            tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
            swapped=swapped,
        ),
    )


_GPT2_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("n_positions",),
    "n_layer": ("n_layer",),
    "n_head": ("n_head",),
    "n_embd": ("n_embd",),
    "n_inner": ("n_inner",),
    "activation": ("activation_function",),
    "norm_eps": ("layer_norm_epsilon",),
    "tied_head": ("tie_word_embeddings",),
    "dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
_GPT2_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}

_LLAMA_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_kv_head": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "n_embd": ("hidden_size",),
    "n_inner": ("intermediate_size",),
    "norm_eps": ("rms_norm_eps",),
    "tied_head": ("tie_word_embeddings",),
    "dropout": ("attention_dropout",),
}
_LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {},
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_GATED: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
_NO_BIAS: Mapping[str, tuple[Any, ...]] = {"attention_bias": (False,)}
_ROTARY = {"position": "rope", "norm": "rmsnorm"}
_UNGATED_KEYS = {**_LLAMA_KEYS, "activation": ("hidden_act",)}

_GPT2 = Family(
    name="GPT2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fixed={},
    zeros=frozenset({"bias", "norm_bias"}),
    keys=_GPT2_KEYS,
    defaults=_GPT2_DEFAULTS,
    must_be={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    rows=gpt2_rows(transposed=True),
    buffers=r"bias|h\.\d+\.attn\.(masked_)?bias",
)
_GPT_BIGCODE = replace(
    _GPT2,
    name="GPTBigCode",
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    fixed={"n_kv_head": 1},
    defaults={**_GPT2_DEFAULTS, "activation_function": "gelu_pytorch_tanh"},
    # Without multi_query, q, k and v lie in turn, head by head: no row does that.
    must_be={**_GPT2.must_be, "multi_query": (True,), "num_key_value_heads": (1,)},
    rows=gpt2_rows(transposed=False),
)
_LLAMA = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    fixed={**_ROTARY, "activation": "swiglu"},
    keys={**_LLAMA_KEYS, "bias": ("attention_bias", "mlp_bias")},
    defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    must_be=_GATED,
    heads_divide=True,
    rows=_llama_rows(),
    buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
_MISTRAL = replace(
    _LLAMA,
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    fixed={**_LLAMA.fixed, "bias": False},
    keys=_LLAMA_KEYS,
    defaults={
        **_LLAMA_DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "sliding_window": 4096,
    },
    heads_divide=False,
)
_MINISTRAL = replace(
    _MISTRAL,
    name="Ministral",
    model_type="ministral",
    architecture="MinistralForCausalLM",
    defaults={**_MISTRAL.defaults, "layer_types": None},
)
_QWEN3 = replace(
    _MISTRAL,
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={**_MISTRAL.fixed, "qk_norm": True},
    defaults={
        **_LLAMA_DEFAULTS,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    must_be={**_GATED, **_NO_BIAS},
)
_STARCODER2 = replace(
    _LLAMA,
    name="Starcoder2",
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    fixed={"position": "rope", "norm_bias": True},
    zeros=frozenset({"norm_bias"}),
    keys={
        **_UNGATED_KEYS,
        "norm_eps": ("norm_epsilon",),
        "bias": ("use_bias",),
        "dropout": ("residual_dropout", "embedding_dropout", "attention_dropout"),
    },
    defaults={
        **{key: value for key, value in _LLAMA_DEFAULTS.items() if key != "rms_norm_eps"},
        "vocab_size": 49152,
        "max_position_embeddings": 4096,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
    must_be={"mlp_type": ("default",), "norm_type": ("layer_norm",), "scale_attn_weights": (True,)},
    unread=frozenset({"activation_function", "layer_norm_epsilon", "rms_norm_eps"}),
    heads_divide=False,
    rows=_llama_rows({"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}),
)
_ARCEE = replace(
    _LLAMA,
    name="Arcee",
    model_type="arcee",
    architecture="ArceeForCausalLM",
    fixed=_ROTARY,
    keys={**_LLAMA.keys, "activation": ("hidden_act",)},
    defaults={
        **_LLAMA.defaults,
        "max_position_embeddings": 4096,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
    },
    must_be={},
)
_APERTUS = replace(
    _MISTRAL,
    name="Apertus",
    model_type="apertus",
    architecture="ApertusForCausalLM",
    fixed={**_ROTARY, "bias": False, "qk_norm": True},
    keys=_UNGATED_KEYS,
    defaults={
        **_LLAMA_DEFAULTS,
        "vocab_size": 131072,
        "max_position_embeddings": 65536,
        "intermediate_size": 14336,
        "hidden_act": "xielu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "llama3"},
    },
    must_be=_NO_BIAS,
    rope_theta=12000000.0,
    rows=_llama_rows({"attention_norm": "attention_layernorm", "feed_forward_norm": "feedforward_layernorm"}),
)
_NANOCHAT = replace(
    _MISTRAL,
    name="NanoChat",
    model_type="nanochat",
    architecture="NanoChatForCausalLM",
    # It normalises queries and keys after the rotation, which without a weight is the same as before it.
    fixed={**_APERTUS.fixed, "norm_weight": False, "embedding_norm": True},
    keys={**_UNGATED_KEYS, "logit_softcap": ("final_logit_softcapping",)},
    defaults={
        **_LLAMA_DEFAULTS,
        "vocab_size": 50304,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "hidden_size": 768,
        "intermediate_size": 8192,
        "hidden_act": "relu2",
        "final_logit_softcapping": 15.0,
    },
    must_be=_NO_BIAS,
    rows=_llama_rows({"feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2"}, swapped=True),
)
# A model goes to the first family that can hold it.
FAMILIES = (_GPT2, _GPT_BIGCODE, _STARCODER2, _LLAMA, _MISTRAL, _MINISTRAL, _QWEN3, _ARCEE, _APERTUS, _NANOCHAT)
