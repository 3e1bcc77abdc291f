"""The ten model families of transformers that glassgpt reads and writes. `hf_mapping` explains the fields.

To add a family, add a row: what its models have in common, transformers' defaults, the key of each setting, and the
names of its tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from glassgpt.interop.hf_mapping import Family

GPT2_TENSORS = {
    "embedding": "wte", "positions.table": "wpe", "norm": "ln_f", "attention_norm": "ln_1", "feed_forward_norm": "ln_2",
    "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
    "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj",
}  # fmt: skip
_LLAMA_TENSORS = {
    "embedding": "embed_tokens", "norm": "norm",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj",
}  # fmt: skip
_LLAMA_KEYS = {
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "n_embd": "hidden_size", "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings", "dropout": "attention_dropout",
}  # fmt: skip
_LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000, "context_length": 2048, "n_layer": 32, "n_head": 32, "n_embd": 4096, "n_inner": 11008,
    "norm_eps": 1e-6, "tied_head": False,
}  # fmt: skip
_ROPE_RMSNORM: Mapping[str, Any] = {"position": "rope", "norm": "rmsnorm"}
_UNGATED_KEYS = {**_LLAMA_KEYS, "activation": "hidden_act"}
_GATED: Mapping[str, Any] = {"hidden_act": ("silu", "swish")}
_NO_BIAS: Mapping[str, Any] = {"attention_bias": (False,)}

_GPT2 = Family(
    name="GPT2", model_type="gpt2", architecture="GPT2LMHeadModel", prefix="transformer.", layers="h",
    defaults={"vocab_size": 50257, "activation": "gelu_new", "dropout": 0.1},
    zeros=frozenset({"bias", "norm_bias"}),
    keys={
        "vocab_size": "vocab_size", "context_length": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
        "n_embd": "n_embd", "n_inner": "n_inner", "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon", "tied_head": "tie_word_embeddings",
        "dropout": "resid_pdrop embd_pdrop attn_pdrop",
    },
    must_be={
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    tensors=GPT2_TENSORS, transposed=True, buffers=r"bias|h\.\d+\.attn\.(masked_)?bias",
)  # fmt: skip
_GPT_BIGCODE = replace(
    _GPT2, name="GPTBigCode", model_type="gpt_bigcode", architecture="GPTBigCodeForCausalLM",
    fixed={"n_kv_head": 1}, defaults={**_GPT2.defaults, "activation": "gelu_pytorch_tanh"},
    # Without multi_query, q, k and v alternate head by head, which `Family.tensors` cannot describe.
    must_be={**_GPT2.must_be, "multi_query": (True,), "num_key_value_heads": (1,)},
    transposed=False,
)  # fmt: skip
_LLAMA = Family(
    name="Llama", model_type="llama", architecture="LlamaForCausalLM", prefix="model.", layers="layers",
    fixed={**_ROPE_RMSNORM, "activation": "swiglu"}, defaults={**_LLAMA_DEFAULTS, "bias": False},
    keys={**_LLAMA_KEYS, "bias": "attention_bias mlp_bias"},
    must_be=_GATED, rope_theta=10000.0, heads_divide=True,
    tensors=_LLAMA_TENSORS, buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)  # fmt: skip
_MISTRAL = replace(
    _LLAMA, name="Mistral", model_type="mistral", architecture="MistralForCausalLM",
    fixed={**_LLAMA.fixed, "bias": False},
    defaults={**_LLAMA_DEFAULTS, "context_length": 131072, "n_kv_head": 8, "n_inner": 14336},
    keys=_LLAMA_KEYS, windows={"sliding_window": 4096}, heads_divide=False,
)  # fmt: skip
_MINISTRAL = replace(
    _MISTRAL, name="Ministral", model_type="ministral", architecture="MinistralForCausalLM",
    windows={"sliding_window": 4096, "layer_types": None},
)  # fmt: skip
_QWEN3 = replace(
    _MISTRAL, name="Qwen3", model_type="qwen3", architecture="Qwen3ForCausalLM",
    fixed={**_MISTRAL.fixed, "qk_norm": True},
    defaults={
        **_LLAMA_DEFAULTS, "vocab_size": 151936, "context_length": 32768, "n_kv_head": 32, "head_dim": 128,
        "n_inner": 22016,
    },
    windows={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None},
    must_be={**_GATED, **_NO_BIAS},
)  # fmt: skip
_STARCODER2 = replace(
    _LLAMA, name="Starcoder2", model_type="starcoder2", architecture="Starcoder2ForCausalLM",
    fixed={"position": "rope", "norm_bias": True},
    defaults={
        "activation": "gelu_pytorch_tanh", "vocab_size": 49152, "context_length": 4096, "n_layer": 30, "n_head": 24,
        "n_kv_head": 2, "n_embd": 3072, "n_inner": 12288,
    },
    zeros=frozenset({"norm_bias"}),
    keys={
        **_UNGATED_KEYS, "norm_eps": "norm_epsilon", "bias": "use_bias",
        "dropout": "residual_dropout embedding_dropout attention_dropout",
    },
    windows={"sliding_window": None}, heads_divide=False,
    must_be={"mlp_type": ("default",), "norm_type": ("layer_norm",), "scale_attn_weights": (True,)},
    unread=frozenset({"activation_function", "layer_norm_epsilon", "rms_norm_eps"}),
    tensors={**_LLAMA_TENSORS, "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"},
)  # fmt: skip
_ARCEE = replace(
    _LLAMA, name="Arcee", model_type="arcee", architecture="ArceeForCausalLM",
    fixed=_ROPE_RMSNORM,
    defaults={
        **_LLAMA.defaults, "activation": "relu2", "context_length": 4096, "n_embd": 2560, "n_inner": 18432,
        "norm_eps": 1e-5,
    },
    keys={**_LLAMA.keys, "activation": "hidden_act"}, must_be={},
)  # fmt: skip
_APERTUS = replace(
    _MISTRAL, name="Apertus", model_type="apertus", architecture="ApertusForCausalLM",
    fixed={**_ROPE_RMSNORM, "bias": False, "qk_norm": True},
    defaults={
        **_LLAMA_DEFAULTS, "activation": "xielu", "vocab_size": 131072, "context_length": 65536, "n_inner": 14336,
        "norm_eps": 1e-5,
    },
    keys=_UNGATED_KEYS, windows={}, must_be=_NO_BIAS, rope_type="llama3", rope_theta=12000000.0,
    tensors={**_LLAMA_TENSORS, "attention_norm": "attention_layernorm", "feed_forward_norm": "feedforward_layernorm"},
)  # fmt: skip
_NANOCHAT = replace(
    _MISTRAL, name="NanoChat", model_type="nanochat", architecture="NanoChatForCausalLM",
    # It normalises queries and keys after the rotation; without a weight that equals normalising before it.
    fixed={**_APERTUS.fixed, "norm_weight": False, "embedding_norm": True},
    defaults={
        **_LLAMA_DEFAULTS, "activation": "relu2", "vocab_size": 50304, "n_layer": 12, "n_head": 6, "n_embd": 768,
        "n_inner": 8192, "logit_softcap": 15.0,
    },
    keys={**_UNGATED_KEYS, "logit_softcap": "final_logit_softcapping"}, windows={}, must_be=_NO_BIAS,
    tensors={**_LLAMA_TENSORS, "feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2"}, swapped=True,
)  # fmt: skip
# A model is exported to the first family that can hold it.
FAMILIES = (_GPT2, _GPT_BIGCODE, _STARCODER2, _LLAMA, _MISTRAL, _MINISTRAL, _QWEN3, _ARCEE, _APERTUS, _NANOCHAT)
