"""Reprise: LLM inference with device graphs that are checked before they serve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from reprise import openmp as openmp  # before torch, wherever that is imported first

if TYPE_CHECKING:
    from reprise.async_llm import AsyncLLM
    from reprise.errors import RepriseError
    from reprise.llm import LLM
    from reprise.outputs import CompletionOutput, RequestOutput
    from reprise.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RepriseError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "reprise.llm",
    "AsyncLLM": "reprise.async_llm",
    "CompletionOutput": "reprise.outputs",
    "RepriseError": "reprise.errors",
    "RequestOutput": "reprise.outputs",
    "SamplingParams": "reprise.sampling_params",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line can answer --help without loading torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
