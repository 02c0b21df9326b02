"""Architecture name, as checkpoints spell it, to the file that builds it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import torch

from reprise.errors import ModelError
from reprise.layers import CausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENTRY_POINT_GROUP = "reprise.models"

_BUILT_IN = {
    "LlamaForCausalLM": "reprise.models.llama",
    "Qwen3ForCausalLM": "reprise.models.qwen3",
}


def architectures() -> list[str]:
    """Names of every architecture that can be built, plug-ins included."""
    plug_ins = (entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))
    return sorted({*_BUILT_IN, *plug_ins})


def build(
    config: PretrainedConfig, *, max_model_len: int, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    """Build the model of the first architecture in ``config.architectures`` that is known.

    Raises:
        ModelError: None is known; the message lists those that are.
    """
    for name in config.architectures or ():
        builder = _find(name)
        if builder is not None:
            return builder(config, max_model_len=max_model_len, dtype=dtype, device=device)
    raise ModelError(
        f"architecture {', '.join(config.architectures or ['(none given)'])} is not supported; "
        f"supported: {', '.join(architectures())}. docs/adding-a-model.md tells how to add one"
    )


def _find(name: str) -> Callable[..., CausalLM] | None:
    if name in _BUILT_IN:
        return importlib.import_module(_BUILT_IN[name]).build
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return entry.load()
    return None
