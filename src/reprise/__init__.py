"""Reprise: LLM inference with device graphs that are checked before they serve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from reprise import openmp as openmp  # before torch, wherever that is imported first
from reprise.garbage import uncollected

if TYPE_CHECKING:
    from reprise.async_llm import AsyncLLM
    from reprise.config import EngineConfig as AsyncEngineArgs
    from reprise.config import EngineConfig as EngineArgs
    from reprise.errors import RepriseError
    from reprise.llm import LLM
    from reprise.outputs import CompletionOutput, RequestOutput
    from reprise.prompts import TextPrompt, TokensPrompt
    from reprise.sampling_params import RequestOutputKind, SamplingParams
    from reprise.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "RepriseError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "reprise.llm:LLM",
    "AsyncEngineArgs": "reprise.config:EngineConfig",
    "AsyncLLM": "reprise.async_llm:AsyncLLM",
    "CompletionOutput": "reprise.outputs:CompletionOutput",
    "EngineArgs": "reprise.config:EngineConfig",
    "RepriseError": "reprise.errors:RepriseError",
    "RequestOutput": "reprise.outputs:RequestOutput",
    "RequestOutputKind": "reprise.sampling_params:RequestOutputKind",
    "SamplingParams": "reprise.sampling_params:SamplingParams",
    "StructuredOutputsParams": "reprise.structured_outputs:StructuredOutputsParams",
    "TextPrompt": "reprise.prompts:TextPrompt",
    "TokensPrompt": "reprise.prompts:TokensPrompt",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line can answer --help without loading torch.
    if name in _HOMES:
        module, _, original = _HOMES[name].partition(":")
        with uncollected():
            return getattr(importlib.import_module(module), original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
