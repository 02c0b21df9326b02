"""Every option of the engine: one home, validated once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from reprise.errors import ConfigError

LoadFormat = Literal["auto", "safetensors", "dummy"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. The names are the command line's flags and ``LLM``'s arguments.

    Raises:
        ConfigError: A value is out of range, or two options contradict each other.
    """

    model: str | None = None
    """Local directory, Hugging Face id, or None for the bundled demo model."""
    tokenizer: str | None = None
    """Directory or id of the tokenizer; None: the model's."""
    revision: str | None = None
    """Branch, tag or commit on the Hugging Face hub."""
    device: str = "auto"
    """Platform name, optionally with an index (``cuda:1``); ``auto`` takes the best one here."""
    dtype: Dtype = "auto"
    """Compute dtype; ``auto`` takes the checkpoint's where the device computes in it."""
    load_format: LoadFormat = "auto"
    """``dummy`` needs a config alone and fills the weights with random values."""
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face config to replace; objects are merged, and RoPE may be spelled as
    in transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``)."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None: what the model was trained for."""
    max_num_seqs: int = 256
    """Requests that compute at the same time."""
    max_num_batched_tokens: int | None = None
    """New tokens in one step; longer prompts are computed in chunks. None: the platform's."""
    block_size: int | None = None
    """Tokens in one block of the KV cache, a power of two; None: the platform's."""
    gpu_memory_utilization: float = 0.9
    """Share of an accelerator's memory that this engine may use. On a CPU the cache has a fixed
    size unless one of the next two options is given."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache; None: what ``gpu_memory_utilization`` leaves."""
    num_blocks: int | None = None
    """Blocks of the KV cache, the null block included; overrides the two options above."""
    enable_prefix_caching: bool = True
    """Share the cache blocks of equal prompt beginnings."""
    graph_mode: str = "auto"
    """Executor of each phase: ``auto``, ``none``, ``full``, ``breakable``, ``compiled``, or
    ``decode=full,mixed=breakable``; vLLM's names (``FULL_AND_PIECEWISE``, ...) work too."""
    graph_verify: str = "startup"
    """When graphs are compared with eager execution: ``off``, ``startup``, or ``canary:N``, which
    also recomputes one in N live steps."""
    graph_buckets: str | None = None
    """Sizes to capture, ``1,2,4,8`` or ``decode=1,2,4;mixed=64,128``; None: by the limits."""
    graph_memory_profile: Literal["auto", "off"] = "auto"
    """Predict the memory of graphs before the cache takes the rest, where the platform can."""
    seed: int = 0
    """Seed of requests that bring none."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: prompts are token ids and outputs have no text."""
    ops: Mapping[str, str] = field(default_factory=dict)
    """Op name to the implementation to use instead of the platform's choice."""

    def __post_init__(self) -> None:
        for names, kind, wanted in _KINDS:
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise ConfigError(f"{name}={getattr(self, name)!r} must be {wanted}")
        self._one_of("dtype", get_args(Dtype))
        self._one_of("load_format", get_args(LoadFormat))
        self._one_of("graph_memory_profile", ("auto", "off"))
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "block_size",
                     "kv_cache_memory_bytes", "num_blocks"):  # fmt: skip
            self._positive(name)
        size = self.block_size
        if size is not None and size & (size - 1):
            raise ConfigError(f"block_size={size} must be a power of two, such as 16")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization={share!r} must be above 0 and at most 1")
        if self.num_blocks is not None:
            if self.num_blocks < 2:
                raise ConfigError(
                    f"num_blocks={self.num_blocks} must be at least 2: "
                    "block 0 is the null block and belongs to no request"
                )
            if self.kv_cache_memory_bytes is not None:
                raise ConfigError(
                    f"num_blocks={self.num_blocks} and kv_cache_memory_bytes="
                    f"{self.kv_cache_memory_bytes} both set the cache's size; give one of them"
                )
        if self.load_format == "dummy" and self.model is None:
            raise ConfigError(
                "load_format='dummy' needs model= a directory with a config.json; "
                "without it, model=None loads the bundled demo model's real weights"
            )

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some options changed, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_arguments(cls, **arguments: Any) -> EngineConfig:
        """Build from keyword arguments; unknown names get an error that lists the known ones."""
        _translate(arguments)
        known = {each.name for each in dataclasses.fields(cls)}
        unknown = sorted(set(arguments) - known)
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        for name, value in arguments.items():
            if isinstance(value, os.PathLike):
                arguments[name] = os.fspath(value)
        return cls(**arguments)

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name != "max_num_seqs":
            return
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{name}={value!r} must be a positive whole number")


def _translate(arguments: dict[str, Any]) -> None:
    """Take vLLM's names for what has another one here or needs none, in place."""
    if arguments.pop("enforce_eager", False):
        arguments.setdefault("graph_mode", "none")
    # No checkpoint's code is ever run: what an architecture computes stands in reprise/models.
    arguments.pop("trust_remote_code", None)
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if arguments.get(name) == 1:
            del arguments[name]
    _take_model_len(arguments)
    if arguments.get("dtype") in _DTYPE_ALIASES:
        arguments["dtype"] = _DTYPE_ALIASES[arguments["dtype"]]


def _take_model_len(arguments: dict[str, Any]) -> None:
    """Out of ``hf_overrides``, where vLLM's example of context extension has it, in place."""
    overrides = arguments.get("hf_overrides")
    if not isinstance(overrides, Mapping) or "max_model_len" not in overrides:
        return
    length = overrides["max_model_len"]
    if arguments.get("max_model_len") not in (None, length):
        raise ConfigError(
            f"max_model_len={arguments['max_model_len']} and max_model_len={length} in "
            "hf_overrides contradict each other; give one of them"
        )
    arguments["max_model_len"] = length
    arguments["hf_overrides"] = {k: v for k, v in overrides.items() if k != "max_model_len"}


_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
_KINDS: list[tuple[tuple[str, ...], type | tuple[type, ...], str]] = [
    (("model", "tokenizer", "revision"), (str, type(None)), "a string or None"),
    (("device",), str, "a string, such as 'auto' or 'cuda:1'"),
    (("hf_overrides", "ops"), Mapping, "a dictionary"),
    (("seed",), int, "a whole number"),
    (("enable_prefix_caching", "skip_tokenizer_init"), bool, "True or False"),
]
