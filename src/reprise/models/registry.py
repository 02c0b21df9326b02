"""Architecture name, as checkpoints spell it, to the file that builds it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch

from reprise.errors import ModelError
from reprise.layers import CausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENTRY_POINT_GROUP = "reprise.models"

_BUILT_IN = {
    "LlamaForCausalLM": "reprise.models.llama",
    "MistralForCausalLM": "reprise.models.mistral",
    "Qwen2ForCausalLM": "reprise.models.qwen2",
    "Qwen3ForCausalLM": "reprise.models.qwen3",
    "SmolLM3ForCausalLM": "reprise.models.smollm3",
}
_SENSES = ("vision_config", "audio_config", "thinker_config", "vision_tower", "mm_vision_tower")
"""Fields of configs of models that see or hear."""


def architectures() -> list[str]:
    """Names of every architecture that can be built, plug-ins included."""
    plug_ins = (entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))
    return sorted({*_BUILT_IN, *plug_ins})


def require_known(raw: Mapping[str, Any]) -> None:
    """Refuse a config, as its JSON file has it, if none of its ``architectures`` can be built.

    Raises:
        ModelError: Says what kind of model it is, and lists the architectures that are known.
    """
    if _first_known(raw["architectures"]) is None:
        senses = [name for name in _SENSES if raw.get(name) is not None]
        kind = f", a multimodal model ({', '.join(senses)})," if senses else ""
        raise _not_supported(raw["architectures"], kind)


def build(
    config: PretrainedConfig, *, max_model_len: int, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    """Build the model of the first architecture in ``config.architectures`` that is known.

    Raises:
        ModelError: None is known; the message lists those that are.
    """
    builder = _first_known(config.architectures or ())
    if builder is None:
        raise _not_supported(config.architectures or ())
    return builder(config, max_model_len=max_model_len, dtype=dtype, device=device)


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
