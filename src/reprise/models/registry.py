"""Architecture name, as checkpoints spell it, to the file that builds it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from reprise.errors import ModelError
from reprise.layers import Build, CausalLM
from reprise.layers.formats import formats_of
from reprise.models.config_reader import Config
from reprise.models.deepseek_v4 import NextStreams
from reprise.models.mtp import NextTokens

ENTRY_POINT_GROUP = "reprise.models"

_BUILT_IN = {
    "DeepseekV4ForCausalLM": "reprise.models.deepseek_v4",
    "LlamaForCausalLM": "reprise.models.llama",
    "MistralForCausalLM": "reprise.models.mistral",
    "MixtralForCausalLM": "reprise.models.mixtral",
    "Qwen2ForCausalLM": "reprise.models.qwen2",
    "Qwen2MoeForCausalLM": "reprise.models.qwen2_moe",
    "Qwen3ForCausalLM": "reprise.models.qwen3",
    "Qwen3MoeForCausalLM": "reprise.models.qwen3_moe",
    "Qwen3NextForCausalLM": "reprise.models.qwen3_next",
    "Qwen3_5ForCausalLM": "reprise.models.qwen3_5",
    "Qwen3_5ForConditionalGeneration": "reprise.models.qwen3_5",
    "Qwen3_5MoeForCausalLM": "reprise.models.qwen3_5_moe",
    "Qwen3_5MoeForConditionalGeneration": "reprise.models.qwen3_5_moe",
    "SmolLM3ForCausalLM": "reprise.models.smollm3",
}
_WITH_TEXT_PART = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
"""Multimodal architectures whose language model is built alone."""
_SENSES = ("vision_config", "audio_config", "thinker_config", "vision_tower", "mm_vision_tower")
"""Fields of configs of models that see or hear."""


def architectures() -> list[str]:
    """Names of every architecture that can be built, plug-ins included."""
    plug_ins = (entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))
    return sorted({*_BUILT_IN, *plug_ins})


def has_text_part(names: Sequence[str]) -> bool:
    """Whether the first of these architectures that is known is one that sees or hears, and has a
    ``text_config`` from which its language model is built alone."""
    known = next((name for name in names if _first_known([name]) is not None), None)
    return known in _WITH_TEXT_PART


def require_known(raw: Mapping[str, Any]) -> None:
    """Refuse a config, as its JSON file has it, if none of its ``architectures`` can be built.

    Raises:
        ModelError: Says what kind of model it is, and lists the architectures that are known.
    """
    if _first_known(raw["architectures"]) is None:
        senses = [name for name in _SENSES if raw.get(name) is not None]
        kind = f", a multimodal model ({', '.join(senses)})," if senses else ""
        raise _not_supported(raw["architectures"], kind)
    name = next((each for each in raw["architectures"] if _first_known([each])), None)
    if name in _BUILT_IN and name not in _WITH_TEXT_PART and raw.get("text_config"):
        raise ModelError(
            f"architectures={raw['architectures']!r} and config field text_config contradict each "
            f"other: {name} has its fields in the config itself; correct config.json, or give "
            "hf_overrides with the architecture of the whole, such as {'architectures': "
            f"[{_WITH_TEXT_PART[0]!r}]}}"
        )


def build(config: Config, build: Build) -> CausalLM:
    """The model that a config describes: of the first of its ``architectures`` that is known.

    An architecture's file has a function of the same signature.

    Args:
        config: transformers' ``PretrainedConfig``.
        build: How to make the layers; formats are those that the config's ``quantization_config``
            asks for.

    Returns:
        The model with unset weights, for contexts of up to ``build.max_model_len`` tokens.

    Raises:
        ModelError: No architecture or no method of quantisation is known, ``model_type`` is that of
            another architecture, or the config asks for something that the file of its
            architecture does not compute.
    """
    names = config.architectures or ()
    builder = _first_known(names)
    if builder is None:
        raise _not_supported(names)
    _require_kind(names, config.model_type)
    return builder(config, _formatted(config, build))


def build_mtp(config: Config, build: Build, target: CausalLM) -> NextTokens | NextStreams:
    """The layer of a model that drafts further tokens, of the first of the config's
    ``architectures`` that is known.

    An architecture's file that has one has a function of the same signature.

    Args:
        config: As of :func:`build`.
        build: As of :func:`build`.
        target: The model.

    Raises:
        ModelError: The architecture has no such layer, or one that is not computed here.
    """
    builder = _first_known(config.architectures or ())
    module = None if builder is None else inspect.getmodule(builder)
    found = getattr(module, "build_mtp", None)
    if found is None:
        raise ModelError(
            f"architectures={list(config.architectures or ())!r} has no layer that drafts further "
            "tokens (mtp); use 'method': 'ngram', which drafts from the text itself"
        )
    head: NextTokens | NextStreams = found(config, _formatted(config, build), target)
    return head


def _require_kind(names: Sequence[str], kind: str) -> None:
    """``architectures`` says what is computed, ``model_type`` which fields there are and what they
    are where the file has none: transformers goes by the one, vLLM by the other."""
    name = next((each for each in names if _first_known([each]) is not None), None)
    own = _BUILT_IN.get(name or "", "").rpartition(".")[2]
    if own and kind not in (own, f"{own}_text"):
        raise ModelError(
            f"architectures={list(names)!r} and model_type={kind!r} contradict each other: "
            f"{name} is of model_type {own!r}; correct config.json, or give hf_overrides with the "
            "one that is wrong"
        )


def _formatted(config: Config, build: Build) -> Build:
    return replace(build, formats=formats_of(getattr(config, "quantization_config", None)))


def _not_supported(names: Sequence[str], kind: str = "") -> ModelError:
    return ModelError(
        f"architectures={list(names)!r}{kind} is not supported; supported: "
        f"{', '.join(architectures())}. docs/adding-a-model.md tells how to add one"
    )


def _first_known(names: Sequence[str]) -> Callable[..., CausalLM] | None:
    for name in names:
        if name in _BUILT_IN:
            return importlib.import_module(_BUILT_IN[name]).build
        for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
            return entry.load()
    return None
