"""Configs that say everything themselves, read without transformers.

Importing transformers takes longer than all else in the start of a small model but torch. It is
left out where a config's file leaves nothing to it: every field is known here, has a value of the
usual kind, and means what it says. Everything else is transformers' to read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

_GIVEN: Any = object()


class _Field(NamedTuple):
    usual: Callable[[Any], bool]
    """Whether a value is of the kind that is taken as it is."""
    default: Any = _GIVEN
    """Of transformers' class; left out: the file must say it."""


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_fraction(value: Any) -> bool:
    return type(value) is float and 0 <= value < 1


def _is_id(value: Any) -> bool:
    return value is None or type(value) is int


def _are_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(type(each) is int for each in value))


def _is_dtype(value: Any) -> bool:
    return value in ("float32", "bfloat16", "float16")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def _is_whole_rope(value: Any) -> bool:
    """Whether these are parameters of no scaling, or of that of Llama 3, with all of them. A type
    that is not said is the default one, as in files of transformers 4."""
    if not isinstance(value, Mapping) or not all(
        _is_number(each) and each > 0 for name, each in value.items() if name != "rope_type"
    ):
        return False
    names = value.keys() - {"rope_type"}
    kinds = {"default": {"rope_theta"}, "llama3": {"rope_theta", *_LLAMA3}}
    kind = value.get("rope_type", "default")
    return isinstance(kind, str) and names == kinds.get(kind)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(each == "full_attention" for each in value)


_COMMON = {
    "vocab_size": _Field(_is_size),
    "hidden_size": _Field(_is_size),
    "intermediate_size": _Field(_is_size),
    "num_hidden_layers": _Field(_is_size),
    "num_attention_heads": _Field(_is_size),
    "num_key_value_heads": _Field(_is_size),
    "max_position_embeddings": _Field(_is_size),
    "hidden_act": _Field(_is_text),
    "rms_norm_eps": _Field(_is_fraction),
    "rope_parameters": _Field(_is_whole_rope),
    "rope_theta": _Field(_is_number, None),
    "eos_token_id": _Field(_are_ids),
    "bos_token_id": _Field(_is_id, None),
    "pad_token_id": _Field(_is_id, None),
    "tie_word_embeddings": _Field(_is_flag, False),
    "architectures": _Field(lambda value: isinstance(value, list)),
    "quantization_config": _Field(lambda value: isinstance(value, Mapping), None),
    "dtype": _Field(_is_dtype, None),
    "torch_dtype": _Field(_is_dtype, None),
    # What nothing reads here.
    "_name_or_path": _Field(_is_text, None),
    "attention_dropout": _Field(_is_fraction, None),
    "initializer_range": _Field(_is_fraction, None),
    "transformers_version": _Field(_is_text, None),
    "use_cache": _Field(_is_flag, None),
}
_NO_FLAG = _Field(lambda value: value is False, None)
_BIAS = _Field(_is_flag, False)
_SHARE_OF_HIDDEN = {"head_dim": _Field(_is_size, None)}
_FEW_WINDOWS = {
    "use_sliding_window": _Field(lambda value: value is False, False),
    "sliding_window": _Field(lambda value: value is None or _is_size(value), None),
    "max_window_layers": _Field(_is_size, None),
}
_NO_WINDOWS = {**_FEW_WINDOWS, "layer_types": _Field(_are_whole, None)}
_KINDS: dict[str, dict[str, _Field]] = {
    "llama": {
        **_COMMON, **_SHARE_OF_HIDDEN, "attention_bias": _BIAS, "mlp_bias": _BIAS,
        "pretraining_tp": _Field(_is_size, None), "is_llama_config": _Field(_is_flag, None),
        "rope_interleaved": _NO_FLAG,
    },
    "mistral": {
        **_COMMON, **_SHARE_OF_HIDDEN,
        "sliding_window": _Field(lambda value: value is None or _is_size(value)),
    },
    "qwen2": {**_COMMON, **_SHARE_OF_HIDDEN, **_NO_WINDOWS, "use_mrope": _NO_FLAG},
    "qwen3": {**_COMMON, **_NO_WINDOWS, "head_dim": _Field(_is_size), "attention_bias": _BIAS},
    "qwen3_moe": {
        **_COMMON, **_FEW_WINDOWS, "head_dim": _Field(_is_size), "attention_bias": _BIAS,
        "decoder_sparse_step": _Field(_is_size), "moe_intermediate_size": _Field(_is_size),
        "num_experts": _Field(_is_size), "num_experts_per_tok": _Field(_is_size),
        "norm_topk_prob": _Field(_is_flag),
        "mlp_only_layers": _Field(lambda value: isinstance(value, list) and _are_ids(value)),
        "output_router_logits": _NO_FLAG, "router_aux_loss_coef": _Field(_is_fraction, None),
    },
}  # fmt: skip
"""By ``model_type``."""


def plain_config(kind: str, raw: Mapping[str, Any]) -> SimpleNamespace | None:
    """The fields that an architecture reads, as transformers' config of this kind has them.

    Args:
        kind: ``model_type``.
        raw: The config, with everything about RoPE in ``rope_parameters``.

    Returns:
        None if the config is transformers' to read.
    """
    fields = _KINDS.get(kind)
    if fields is None or not raw.keys() <= fields.keys():
        return None
    found: dict[str, Any] = {"model_type": kind}
    for name, field in fields.items():
        value = raw.get(name, field.default)
        if value is _GIVEN or (name in raw and not field.usual(value)):
            return None
        found[name] = value
    hidden, heads, layers = (
        raw[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if hidden % heads:
        return None
    if found["head_dim"] is None:
        found["head_dim"] = hidden // heads
    if found["head_dim"] % 2:
        return None
    found["rope_parameters"] = {"rope_type": "default", **found["rope_parameters"]}
    if "use_sliding_window" in fields:
        found["sliding_window"] = None
    if "layer_types" in fields:
        if found["layer_types"] is None:
            found["layer_types"] = ["full_attention"] * layers
        if len(found["layer_types"]) != layers:
            return None
    older = found.pop("torch_dtype")
    named = found["dtype"] or older
    found["dtype"] = None if named is None else getattr(torch, named)
    return SimpleNamespace(**found)
