"""EAGLE-3 heads of random weights, in every form that checkpoints have, and the oracle for them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from helpers import TinyModel
from safetensors.torch import save_file
from torch import Tensor

DEPTHS = (1, 2, 3)
DRAFT_VOCAB = 100
"""Of the 160 tokens of tiny models."""
EACH = {"fc_norm": True}
JOINT = {"norm_before_fc": True}


def oracle() -> ModuleType:
    """``tools/draft_head.py``: the head in plain torch, which knows nothing of Reprise."""
    tools = str(Path(__file__).parent.parent / "tools")
    if tools not in sys.path:
        sys.path.append(tools)
    return importlib.import_module("draft_head")


def write_head(
    path: Path,
    target: TinyModel,
    *,
    form: str = "specforge",
    seed: int = 0,
    hidden_size: int | None = None,
    num_layers: int = 1,
    draft_vocab: int | None = DRAFT_VOCAB,
    depths: Sequence[int] | None = DEPTHS,
    first: str = "midlayer.",
    prefix: str = "",
    kind: str = "llama",
    own_embedding: bool = False,
    own_head: bool = True,
    imitates: bool = False,
    leave_out: Sequence[str] = (),
    stored_too: str | None = None,
    layer_fields: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Write a head for a model.

    Args:
        path: Directory to make.
        target: What it drafts for.
        form: ``specforge`` or ``speculators``.
        seed: Of the weights.
        hidden_size: The head's width; None: the model's.
        num_layers: Of the head.
        draft_vocab: Tokens that it drafts; None: all, without a table of them.
        depths: What it reads, as numbers of layers before; None: the config says nothing.
        first: What the first layer's names begin with.
        prefix: Before all names.
        kind: ``model_type`` of the layers.
        own_embedding: It has one.
        own_head: Likewise.
        imitates: It says what the model would if no token mattered but the last one.
        leave_out: Names of tensors that the file lacks.
        stored_too: One that it has though no head does.
        layer_fields: Further fields of the layers' config.
        fields: Further fields of the head's config.
    """
    config = target.reference.config.get_text_config()
    wide, vocab = config.hidden_size, config.vocab_size
    size = hidden_size or wide
    heads, kv_heads, head_dim, inner = 4, 2, 32, 96
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, std: float = 0.3) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    def around_one(width: int) -> Tensor:
        return 1 + random(width)

    tensors: dict[str, Tensor] = {
        "fc.weight": random(size, len(depths or DEPTHS) * wide, std=0.1),
        "norm.weight": around_one(size),
    }
    small = 0.01 if imitates else 0.3
    for index in range(num_layers):
        name = f"layers.{index}." if index else first
        read = size if index else 2 * size
        tensors |= {
            f"{name}self_attn.q_proj.weight": random(heads * head_dim, read),
            f"{name}self_attn.k_proj.weight": random(kv_heads * head_dim, read),
            f"{name}self_attn.v_proj.weight": random(kv_heads * head_dim, read),
            f"{name}self_attn.o_proj.weight": random(size, heads * head_dim, std=small),
            f"{name}mlp.gate_proj.weight": random(inner, size),
            f"{name}mlp.up_proj.weight": random(inner, size),
            f"{name}mlp.down_proj.weight": random(size, inner, std=small),
            f"{name}input_layernorm.weight": around_one(size),
            f"{name}post_attention_layernorm.weight": around_one(size),
        }
        if index == 0:
            tensors[f"{name}hidden_norm.weight"] = around_one(size)
        biased = (layer_fields or {}).get("attention_bias", False)
        for part in "qkvo" if biased else "":
            weight = tensors[f"{name}self_attn.{part}_proj.weight"]
            tensors[f"{name}self_attn.{part}_proj.bias"] = random(len(weight))
        if kind == "qwen3":
            tensors[f"{name}self_attn.q_norm.weight"] = 2 * around_one(head_dim)
            tensors[f"{name}self_attn.k_norm.weight"] = 2 * around_one(head_dim)
    ids = torch.randperm(vocab, generator=generator)[: draft_vocab or vocab].sort().values
    if draft_vocab is not None:
        known = torch.zeros(vocab, dtype=torch.bool)
        known[ids] = True
        tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": known}
    if own_head:
        tensors["lm_head.weight"] = random(len(ids), size)
    if own_embedding:
        tensors["embed_tokens.weight"] = random(vocab, size)
    if fields.get("fc_norm"):
        tensors |= {f"fc_norm.{n}.weight": around_one(wide) for n in range(len(depths or DEPTHS))}
    if fields.get("norm_before_fc"):
        tensors["input_norm.weight"] = around_one(len(depths or DEPTHS) * wide)
    if imitates:
        # Each row sees itself alone, and of that the embedding: q and k are the same everywhere.
        # What the model's last product makes of it is often what the model says.
        name = f"{first}self_attn."
        for part, count in (("q", heads), ("k", kv_heads)):
            tensors[f"{name}{part}_proj.weight"].mul_(0.01)
            tensors[f"{name}{part}_proj.bias"] = torch.full((count * head_dim,), 6.0)
        value, out = torch.zeros(kv_heads * head_dim, 2 * size), torch.zeros(size, heads * head_dim)
        for number in range(size):
            value[number, number] = 1
            head, channel = divmod(number, head_dim)
            out[number, head * heads // kv_heads * head_dim + channel] = 1
        tensors |= {
            f"{name}v_proj.weight": value, f"{name}v_proj.bias": torch.zeros(len(value)),
            f"{name}o_proj.weight": out, f"{name}o_proj.bias": torch.zeros(size),
            f"{first}input_layernorm.weight": torch.ones(size),
            "norm.weight": target.reference.get_decoder().norm.weight.clone(),
            "lm_head.weight": target.reference.lm_head.weight[ids].clone(),
        }  # fmt: skip
        tensors["fc.weight"].mul_(0.02)
        tensors[f"{first}hidden_norm.weight"].mul_(0.1)
        layer_fields = {"attention_bias": True, **(layer_fields or {})}
    layers = {
        "model_type": kind, "hidden_size": size, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "num_hidden_layers": num_layers, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "vocab_size": vocab, "rope_theta": 10000.0, "max_position_embeddings": 64,
        **(layer_fields or {}),
    }  # fmt: skip
    own: dict[str, Any] = {
        "draft_vocab_size": len(ids), "tie_word_embeddings": False, "target_hidden_size": wide,
        **fields,
    }  # fmt: skip
    ids_name = "eagle_aux_hidden_state_layer_ids"
    if form == "speculators":
        content = {
            "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
            "speculators_version": "0.3.0", "transformer_layer_config": layers,
            ids_name: None if depths is None else list(depths),
            "norm_before_residual": False, **own,
        }  # fmt: skip
    else:
        content = {"architectures": ["LlamaForCausalLMEagle3"], **layers, **own}
        if depths is not None:
            content["eagle_config"] = {ids_name: [each - 1 for each in depths]}
    if stored_too is not None:
        tensors[stored_too] = random(size)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(content))
    stored = {f"{prefix}{k}": v.contiguous() for k, v in tensors.items() if k not in leave_out}
    save_file(stored, path / "model.safetensors")
    return path


def of_few_words(model: TinyModel, path: Path) -> TinyModel:
    """The model with layers that say little beside the embedding, so that its tokens follow from
    the one before more often than not."""
    other = TinyModel(model.path).reference
    for layer in other.get_decoder().layers:
        layer.self_attn.o_proj.weight.mul_(0.004)
        layer.mlp.down_proj.weight.mul_(0.004)
    other.save_pretrained(path)
    return TinyModel(path)
