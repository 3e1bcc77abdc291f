"""The ten model families of transformers that glassgpt reads and writes. `hf_mapping` explains the fields.

To add a family, add a row: what its models have in common, the key of each setting, transformers' defaults, and where
its tensors are.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from glassgpt.interop.hf_mapping import Family, TensorMap

Keys = Mapping[str, tuple[str, ...]]


def gpt2_tensors(*, transposed: bool) -> tuple[TensorMap, ...]:
    """The tensors of GPT-2 and of projects that use its names."""
    model = {"embedding": "wte", "positions.table": "wpe", "norm": "ln_f"}
    norms = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
    attention = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj"}
    linear = {**attention, "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
    block = [(name, False) for name in norms.items()] + [(name, transposed) for name in linear.items()]
    return (
        TensorMap("head", ("lm_head",)),
        *(TensorMap(ours, (f"transformer.{theirs}",)) for ours, theirs in model.items()),
        *(TensorMap(f"blocks.{{}}.{ours}", (f"transformer.h.{{}}.{theirs}",), t) for (ours, theirs), t in block),
    )


def _llama_tensors(renamed: Mapping[str, str] | None = None, *, swapped: bool = False) -> tuple[TensorMap, ...]:
    """The tensors of Llama; renamed: a family's own names for some modules of a block."""
    block = {
        "attention_norm": "input_layernorm", "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm", "attention.out": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm", "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj", **(renamed or {}),
    }  # fmt: skip
    model = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    qkv = tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv")
    return (
        *(TensorMap(ours, (theirs,)) for ours, theirs in model.items()),
        *(TensorMap(f"blocks.{{}}.{ours}", (f"model.layers.{{}}.{theirs}",)) for ours, theirs in block.items()),
        TensorMap("blocks.{}.attention.qkv", qkv, swapped=swapped),
    )


_GPT2_KEYS: Keys = {
    "vocab_size": ("vocab_size",), "context_length": ("n_positions",), "n_layer": ("n_layer",), "n_head": ("n_head",),
    "n_embd": ("n_embd",), "n_inner": ("n_inner",), "activation": ("activation_function",),
    "norm_eps": ("layer_norm_epsilon",), "tied_head": ("tie_word_embeddings",),
    "dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}  # fmt: skip
_LLAMA_KEYS: Keys = {
    "vocab_size": ("vocab_size",), "context_length": ("max_position_embeddings",), "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",), "n_kv_head": ("num_key_value_heads",), "head_dim": ("head_dim",),
    "n_embd": ("hidden_size",), "n_inner": ("intermediate_size",), "norm_eps": ("rms_norm_eps",),
    "tied_head": ("tie_word_embeddings",), "dropout": ("attention_dropout",),
}  # fmt: skip
_UNGATED_KEYS: Keys = {**_LLAMA_KEYS, "activation": ("hidden_act",)}
_GATED: Mapping[str, Any] = {"hidden_act": ("silu", "swish")}
_NO_BIAS: Mapping[str, Any] = {"attention_bias": (False,)}
_ROTARY: Mapping[str, Any] = {"position": "rope", "norm": "rmsnorm"}
_QK_NORM: Mapping[str, Any] = {**_ROTARY, "bias": False, "qk_norm": True}

_GPT2_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
}  # fmt: skip
_LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000, "max_position_embeddings": 2048, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "hidden_size": 4096, "intermediate_size": 11008,
    "rms_norm_eps": 1e-6, "rope_parameters": {}, "tie_word_embeddings": False, "attention_dropout": 0.0,
}  # fmt: skip

_GPT2 = Family(
    name="GPT2", model_type="gpt2", architecture="GPT2LMHeadModel", prefix="transformer.",
    zeros=frozenset({"bias", "norm_bias"}),
    keys=_GPT2_KEYS,
    defaults=_GPT2_DEFAULTS,
    must_be={
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    tensors=gpt2_tensors(transposed=True),
    buffers=r"bias|h\.\d+\.attn\.(masked_)?bias",
)  # fmt: skip
_GPT_BIGCODE = replace(
    _GPT2,
    name="GPTBigCode", model_type="gpt_bigcode", architecture="GPTBigCodeForCausalLM",
    fixed={"n_kv_head": 1},
    defaults={**_GPT2_DEFAULTS, "activation_function": "gelu_pytorch_tanh"},
    # Without multi_query, q, k and v alternate head by head, which no TensorMap describes.
    must_be={**_GPT2.must_be, "multi_query": (True,), "num_key_value_heads": (1,)},
    tensors=gpt2_tensors(transposed=False),
)  # fmt: skip
_LLAMA = Family(
    name="Llama", model_type="llama", architecture="LlamaForCausalLM", prefix="model.",
    fixed={**_ROTARY, "activation": "swiglu"},
    keys={**_LLAMA_KEYS, "bias": ("attention_bias", "mlp_bias")},
    defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    must_be=_GATED,
    heads_divide=True,
    tensors=_llama_tensors(),
    buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)  # fmt: skip
_MISTRAL = replace(
    _LLAMA,
    name="Mistral", model_type="mistral", architecture="MistralForCausalLM",
    fixed={**_LLAMA.fixed, "bias": False},
    keys=_LLAMA_KEYS,
    defaults={
        **_LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "intermediate_size": 14336,
        "sliding_window": 4096,
    },
    heads_divide=False,
)  # fmt: skip
_MINISTRAL = replace(
    _MISTRAL,
    name="Ministral", model_type="ministral", architecture="MinistralForCausalLM",
    defaults={**_MISTRAL.defaults, "layer_types": None},
)  # fmt: skip
_QWEN3 = replace(
    _MISTRAL,
    name="Qwen3", model_type="qwen3", architecture="Qwen3ForCausalLM",
    fixed={**_MISTRAL.fixed, "qk_norm": True},
    defaults={
        **_LLAMA_DEFAULTS, "vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32,
        "head_dim": 128, "intermediate_size": 22016, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "layer_types": None,
    },
    must_be={**_GATED, **_NO_BIAS},
)  # fmt: skip
_STARCODER2 = replace(
    _LLAMA,
    name="Starcoder2", model_type="starcoder2", architecture="Starcoder2ForCausalLM",
    fixed={"position": "rope", "norm_bias": True},
    zeros=frozenset({"norm_bias"}),
    keys={
        **_UNGATED_KEYS, "norm_eps": ("norm_epsilon",), "bias": ("use_bias",),
        "dropout": ("residual_dropout", "embedding_dropout", "attention_dropout"),
    },
    defaults={
        **{key: value for key, value in _LLAMA_DEFAULTS.items() if key != "rms_norm_eps"},
        "vocab_size": 49152, "max_position_embeddings": 4096, "num_hidden_layers": 30, "num_attention_heads": 24,
        "num_key_value_heads": 2, "hidden_size": 3072, "intermediate_size": 12288, "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5, "use_bias": True, "sliding_window": None, "tie_word_embeddings": True,
        "residual_dropout": 0.0, "embedding_dropout": 0.0,
    },
    must_be={"mlp_type": ("default",), "norm_type": ("layer_norm",), "scale_attn_weights": (True,)},
    unread=frozenset({"activation_function", "layer_norm_epsilon", "rms_norm_eps"}),
    heads_divide=False,
    tensors=_llama_tensors({"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}),
)  # fmt: skip
_ARCEE = replace(
    _LLAMA,
    name="Arcee", model_type="arcee", architecture="ArceeForCausalLM",
    fixed=_ROTARY,
    keys={**_LLAMA.keys, "activation": ("hidden_act",)},
    defaults={
        **_LLAMA.defaults, "max_position_embeddings": 4096, "hidden_size": 2560, "intermediate_size": 18432,
        "hidden_act": "relu2", "rms_norm_eps": 1e-5,
    },
    must_be={},
)  # fmt: skip
_APERTUS = replace(
    _MISTRAL,
    name="Apertus", model_type="apertus", architecture="ApertusForCausalLM",
    fixed=_QK_NORM,
    keys=_UNGATED_KEYS,
    defaults={
        **_LLAMA_DEFAULTS, "vocab_size": 131072, "max_position_embeddings": 65536, "intermediate_size": 14336,
        "hidden_act": "xielu", "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "llama3"},
    },
    must_be=_NO_BIAS,
    rope_theta=12000000.0,
    tensors=_llama_tensors({"attention_norm": "attention_layernorm", "feed_forward_norm": "feedforward_layernorm"}),
)  # fmt: skip
_NANOCHAT = replace(
    _MISTRAL,
    name="NanoChat", model_type="nanochat", architecture="NanoChatForCausalLM",
    # It normalises queries and keys after the rotation; without a weight that equals normalising before it.
    fixed={**_QK_NORM, "norm_weight": False, "embedding_norm": True},
    keys={**_UNGATED_KEYS, "logit_softcap": ("final_logit_softcapping",)},
    defaults={
        **_LLAMA_DEFAULTS, "vocab_size": 50304, "num_hidden_layers": 12, "num_attention_heads": 6, "hidden_size": 768,
        "intermediate_size": 8192, "hidden_act": "relu2", "final_logit_softcapping": 15.0,
    },
    must_be=_NO_BIAS,
    tensors=_llama_tensors({"feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2"}, swapped=True),
)  # fmt: skip
# A model is exported to the first family that can hold it.
FAMILIES = (_GPT2, _GPT_BIGCODE, _STARCODER2, _LLAMA, _MISTRAL, _MINISTRAL, _QWEN3, _ARCEE, _APERTUS, _NANOCHAT)
