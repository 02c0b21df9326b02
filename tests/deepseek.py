"""A tiny DeepSeek-V4 in which everything matters: no parameter or buffer is what it starts as."""

from __future__ import annotations

from typing import Any

import torch

FIELDS: dict[str, Any] = {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32, "qk_rope_head_dim": 8,
    "q_lora_rank": 24, "o_groups": 4, "o_lora_rank": 12,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 0], "num_hash_layers": 2, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    # 10, as released, would never clamp anything in so small a net.
    "swiglu_limit": 1.0,
    "sliding_window": 16,
    # With few heads many scores would be exactly 0, and which rows are chosen of those is open.
    "index_n_heads": 32, "index_head_dim": 16, "index_topk": 4,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256,
        "beta_fast": 32, "beta_slow": 1,
    },
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1,
}  # fmt: skip
"""Of the config; the smallest that has every kind of layer twice."""


def randomise(model: Any, seed: int = 0) -> None:
    """Fill a transformers model, its buffers too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in [*model.named_parameters(), *model.named_buffers()]:
            kind = name.rpartition(".")[2]
            if "inv_freq" in name:
                continue
            if kind == "tid2eid":
                experts = model.config.n_routed_experts
                order = torch.rand(len(each), experts, generator=generator).argsort(dim=1)
                each.copy_(order[:, : each.shape[1]])
            elif kind in ("base", "hc_base"):
                each.normal_(0.0, 0.5, generator=generator)
            elif kind in ("scale", "hc_scale"):
                each.uniform_(0.5, 1.0, generator=generator)
            elif kind == "e_score_correction_bias":
                each.normal_(0.0, 0.3, generator=generator)
            elif kind in ("sinks", "position_bias"):
                each.normal_(0.0, 1.0, generator=generator)
            elif each.dim() == 1:
                each.normal_(1.0, 0.2, generator=generator)
            else:
                each.normal_(0.0, each.shape[-1] ** -0.5, generator=generator)
