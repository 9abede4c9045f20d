"""Hugging Face tensor names -> ours: the only place where they are written down."""

from __future__ import annotations

from .source import Names

_LAYER = "model.layers.{}."
_MATRICES = {
    "self_attn.q_proj": "wq",
    "self_attn.k_proj": "wk",
    "self_attn.v_proj": "wv",
    "self_attn.o_proj": "wo",
    "mlp.gate_proj": "w1",
    "mlp.down_proj": "w2",
    "mlp.up_proj": "w3",
}

HF_NAMES = Names(
    {
        "model.embed_tokens.weight": "tok_embeddings",
        "model.norm.weight": "norm",
        "lm_head.weight": "output",
        f"{_LAYER}input_layernorm.weight": "layers.{}.attention_norm",
        f"{_LAYER}post_attention_layernorm.weight": "layers.{}.ffn_norm",
        **{f"{_LAYER}{theirs}.weight": f"layers.{{}}.{ours}" for theirs, ours in _MATRICES.items()},
        **{f"{_LAYER}{theirs}.bias": f"layers.{{}}.{ours}.bias" for theirs, ours in _MATRICES.items()},
    }
)

# Buffers of old checkpoints: the frequencies follow from the configuration
IGNORED_SUFFIX = "rotary_emb.inv_freq"
