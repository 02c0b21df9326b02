"""A tiny DeepSeek-V4 in which everything matters: no parameter or buffer is what it starts as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


PLAIN = ("compressor", "norm", "gate.", "weights_proj", "embed", "head", "ape", "sink", "hc_")
"""Parts of names of what releases do not quantise."""
_LARGEST = {"fp8": 448.0, "fp4": 6.0}


def as_released(source: Path, released: Path, meant: Path, *, experts: str) -> Path:
    """Quantise a checkpoint as transformers saves it: once under the names and in the formats of a
    release, once as the plain numbers that those stand for.

    Args:
        source: A checkpoint of plain numbers.
        released: Directory to write.
        meant: Likewise.
        experts: ``fp4`` or ``fp8``.

    Returns:
        ``meant``.
    """
    stored = load_file(source / "model.safetensors")
    numbers, given = {}, {}
    for name, each in stored.items():
        theirs = name.removeprefix("model.").replace("embed_tokens", "embed")
        theirs = theirs.replace("attn.norm", "attn.kv_norm").replace("hc_head.hc_", "hc_head_")
        if each.dim() != 2 or any(part in theirs for part in PLAIN):
            numbers[name] = given[theirs] = each
            continue
        four = experts == "fp4" and ".experts." in theirs
        block = (1, 32) if four else (128, 128)
        scale, wide = _scales(each, block, _LARGEST["fp4" if four else "fp8"])
        weight, codes = _rounded(each / wide, four=four)
        numbers[name] = weight * wide
        given[theirs] = codes
        given[f"{theirs.removesuffix('weight')}scale"] = scale.view(torch.float8_e8m0fnu)
    config = json.loads((source / "config.json").read_text())
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    }  # fmt: skip
    for path, tensors, more in (
        (meant, numbers, {}),
        (released, given, {"quantization_config": quantization, "expert_dtype": experts}),
    ):
        path.mkdir()
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        (path / "config.json").write_text(json.dumps({**config, **more}))
    return meant


def _scales(weight: Tensor, block: tuple[int, int], largest: float) -> tuple[Tensor, Tensor]:
    """Exponents [.., ..] uint8 of blocks, and the powers of two of every weight."""
    rows, columns = weight.shape
    blocks = [-(-rows // block[0]), -(-columns // block[1])]
    padded = weight.new_zeros(blocks[0] * block[0], blocks[1] * block[1])
    padded[:rows, :columns] = weight
    most = padded.view(blocks[0], block[0], blocks[1], block[1]).abs().amax(dim=(1, 3))
    exponents = torch.ceil(torch.log2(most.clamp(min=1e-30) / largest))
    wide = (2.0**exponents).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (exponents + 127).to(torch.uint8), wide[:rows, :columns]


def _rounded(weight: Tensor, *, four: bool) -> tuple[Tensor, Tensor]:
    """What codes stand for, and the codes: two of four bits in each byte."""
    if not four:
        codes = weight.to(torch.float8_e4m3fn)
        return codes.float(), codes
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nearest = (weight.abs().unsqueeze(-1) - table).abs().argmin(dim=-1)
    codes = (nearest + 8 * (weight < 0)).to(torch.uint8)
    packed = (codes[:, ::2] | (codes[:, 1::2] << 4)).view(torch.int8)
    return table[nearest] * torch.where(weight < 0, -1.0, 1.0), packed
