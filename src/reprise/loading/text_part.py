"""The part of a multimodal checkpoint's config that describes the language model in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from reprise import models
from reprise.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

_TEXT = "text_config"
_INHERITED = (
    "architectures", "dtype", "torch_dtype", "quantization_config", "bos_token_id", "eos_token_id",
    "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
"""Fields that may stand outside and mean the language model."""
_NESTED_PATHS = (("model.language_model.", "model."), ("language_model.model.", "model."))
"""Names of its modules in the whole, and in the part."""


def text_part(
    given: dict[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A config and its overrides as a model of text alone would have them.

    Nothing changes unless the architecture is one whose language model can be built alone.
    Overrides may name a field of the language model as they do elsewhere, or within
    ``text_config``, as the whole config has it.

    Args:
        given: The config's file.
        overrides: To be laid over it.

    Raises:
        ConfigError: An override concerns the part that is left out.
        ModelError: The config has no such part.
    """
    names = overrides.get("architectures", given.get("architectures"))
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        return given, overrides
    if not models.has_text_part(names):
        return given, overrides
    text = given.get(_TEXT)
    if not isinstance(text, Mapping) or not text:
        raise ModelError(
            f"config field {_TEXT}={text!r} must describe the language model of {', '.join(names)}"
        )
    part = {name: given[name] for name in _INHERITED if name in given}
    part.setdefault("model_type", f"{given.get('model_type')}_text")
    tied = given.get("tie_word_embeddings") is True or text.get("tie_word_embeddings") is True
    part.update({name: value for name, value in text.items() if value is not None})
    part["architectures"] = names
    if "tie_word_embeddings" in part:
        part["tie_word_embeddings"] = tied
    if "quantization_config" in part:
        part["quantization_config"] = _with_our_paths(part["quantization_config"])
    left_out = sorted(name for name in given if name.endswith("_config") and name not in part)
    left_out.remove(_TEXT)
    logger.info(
        "architecture: the language model of %s; images and videos are not read%s",
        ", ".join(names), f" ({', '.join(left_out)})" if left_out else "",
    )  # fmt: skip
    wrong = [name for name in overrides if name in left_out]
    if wrong:
        raise ConfigError(
            f"hf_overrides has {wrong[0]!r}, which concerns a part of {', '.join(names)} that is "
            "not computed: text alone is"
        )
    inner = overrides.get(_TEXT)
    flat = {name: value for name, value in overrides.items() if name != _TEXT}
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"hf_overrides has {_TEXT}={inner!r}, which must be an object")
    return part, {**flat, **(inner or {})}


def _with_our_paths(value: Any) -> Any:
    """A quantisation's config with modules called as in the language model alone."""
    if isinstance(value, Mapping):
        return {_with_our_paths(name): _with_our_paths(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_our_paths(each) for each in value]
    if isinstance(value, str):
        for whole, part in _NESTED_PATHS:
            # In patterns as well, where a dot may be escaped.
            for escaped in ("", "\\"):
                value = value.replace(whole.replace(".", f"{escaped}."),
                                      part.replace(".", f"{escaped}."))  # fmt: skip
    return value
