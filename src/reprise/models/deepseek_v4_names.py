"""What a DeepSeek-V4 checkpoint calls its tensors, whichever tool wrote it."""

from __future__ import annotations

_MODULES = {
    "self_attn.q_a_proj.": "attn.wq_a.",
    "self_attn.q_a_norm.": "attn.q_norm.",
    "self_attn.q_b_proj.": "attn.wq_b.",
    "self_attn.kv_proj.": "attn.wkv.",
    "self_attn.kv_norm.": "attn.kv_norm.",
    "attn.norm.": "attn.kv_norm.",
    "self_attn.o_a_proj.": "attn.wo_a.",
    "self_attn.o_b_proj.": "attn.wo_b.",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.": "attn.compressor.",
    "self_attn.compressor.kv_proj.": "attn.compressor.wkv.",
    "self_attn.compressor.gate_proj.": "attn.compressor.wgate.",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm.": "attn.compressor.norm.",
    "self_attn.compressor.indexer.kv_proj.": "attn.indexer.compressor.wkv.",
    "self_attn.compressor.indexer.gate_proj.": "attn.indexer.compressor.wgate.",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm.": "attn.indexer.compressor.norm.",
    "self_attn.compressor.indexer.q_b_proj.": "attn.indexer.wq_b.",
    "self_attn.compressor.indexer.scorer.weights_proj.": "attn.indexer.weights_proj.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "attn_hc.": "hc_attn_",
    "ffn_hc.": "hc_ffn_",
    "mlp.": "ffn.",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.": "ffn.shared_experts.w1.",
    "mlp.shared_experts.up_proj.": "ffn.shared_experts.w3.",
    "mlp.shared_experts.down_proj.": "ffn.shared_experts.w2.",
}
"""transformers' modules of a layer, and what released checkpoints call them; one of its own names
is what it writes for the norm of keys."""


def next_renames() -> dict[str, str]:
    """The same of the layer that drafts, which has transformers' names where a tool wrote them."""
    found = {f"mtp.0.{theirs}": f"mtp.0.{ours}" for theirs, ours in _MODULES.items()}
    return {**found, "mtp.0.hc_head.hc_": "mtp.0.hc_head_"}


def renames(layers: int) -> dict[str, str]:
    """Of the names of released checkpoints, of what transformers makes of them when it saves, and
    of its modules."""
    found = {
        "embed.": "model.embed_tokens.",
        "head.": "lm_head.",
        "norm.": "model.norm.",
        "hc_head_": "model.hc_head_",
        "layers.": "model.layers.",
        "model.hc_head.hc_": "model.hc_head_",
    }
    for number in range(layers):
        for theirs, ours in _MODULES.items():
            for prefix in ("layers", "model.layers"):
                found[f"{prefix}.{number}.{theirs}"] = f"model.layers.{number}.{ours}"
    return found
