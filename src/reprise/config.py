"""Every option of the engine: one home, validated once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from reprise.arguments import is_finite, is_whole, plain, shown, takes_names
from reprise.errors import ConfigError
from reprise.neutral import drop_neutral
from reprise.speculation import Speculation, parse_speculation, room_for
from reprise.vllm_names import ENGINE

LoadFormat = Literal["auto", "safetensors", "dummy"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ExecutorBackend = Literal["mp", "ray"]
CacheDtype = Literal["auto", "fp8", "fp8_e4m3"]


def _translate(arguments: dict[str, Any]) -> dict[str, Any]:
    """vLLM's names and values as this configuration's."""
    left = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else plain(value)
        for name, value in drop_neutral(
            arguments, ENGINE, _NAMES, "option", ConfigError, also=_OTHER_NAMES
        ).items()
        if value is not None or name not in _VLLM_HAS_NONE
    }
    eager = left.pop("enforce_eager", None)
    if eager is not None and not isinstance(eager, bool):
        raise ConfigError(f"enforce_eager={shown(eager)} must be True or False")
    if eager and left.setdefault("graph_mode", "none") not in ("none", "NONE"):
        raise ConfigError(
            f"enforce_eager=True and graph_mode={shown(left['graph_mode'])} contradict each other; "
            "give one of them"
        )
    without = left.pop("disable_custom_all_reduce", None)
    if without is not None:
        if not isinstance(without, bool):
            raise ConfigError(f"disable_custom_all_reduce={shown(without)} must be True or False")
        if left.setdefault("custom_all_reduce", not without) is without:
            raise ConfigError(
                f"disable_custom_all_reduce={without} and custom_all_reduce={without} contradict "
                "each other; give one of them"
            )
    if left.get("distributed_executor_backend") == "uni":
        ranks = left.get("tensor_parallel_size", 1)
        if ranks not in (None, 1):
            raise ConfigError(
                f"distributed_executor_backend='uni' and tensor_parallel_size={ranks} contradict "
                "each other: give 'mp' or 'ray'"
            )
        left["distributed_executor_backend"] = "mp"
    blocks = left.pop("num_gpu_blocks_override", None)
    if blocks is not None:
        if "num_blocks" in left:
            raise ConfigError(
                f"num_gpu_blocks_override={blocks} and num_blocks={left['num_blocks']} are the "
                "same option; give one of them"
            )
        left["num_blocks"] = blocks
    if left.get("max_model_len") in (-1, "auto"):
        del left["max_model_len"]  # what it is without
    _take_model_len(left)
    if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
        left.setdefault("batch_invariant", True)
    dtype = str(left.get("dtype")).removeprefix("torch.")  # as torch's own dtypes are written
    dtype = _DTYPE_ALIASES.get(dtype, dtype)
    if dtype in get_args(Dtype):
        left["dtype"] = dtype
    return left


@takes_names(_translate, ConfigError)
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. The names are the command line's flags and ``LLM``'s arguments.

    vLLM's other names are accepted where they ask for nothing: see :mod:`reprise.vllm_names`.

    Raises:
        ConfigError: A name is unknown, a value is out of range, or two options contradict each
            other.
    """

    model: str | None = None
    """Local directory, Hugging Face id, or None for the bundled demo model."""
    tokenizer: str | None = None
    """Directory or id of the tokenizer; None: the model's."""
    revision: str | None = None
    """Branch, tag or commit on the Hugging Face hub."""
    tokenizer_revision: str | None = None
    """The same for the tokenizer; None: the model's."""
    device: str = "auto"
    """Platform name, optionally with an index (``cuda:1``); ``auto`` takes the best one here."""
    dtype: Dtype = "auto"
    """Compute dtype; ``auto`` takes the checkpoint's where the device computes in it."""
    load_format: LoadFormat = "auto"
    """``dummy`` needs a config alone and fills the weights with random values."""
    quantization: str | None = None
    """The method that the checkpoint's weights must be quantised with, such as ``awq``; None: as
    the checkpoint says. Nothing is quantised while it is loaded."""
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face config to replace; objects are merged, and RoPE may be spelled as
    in transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``)."""
    tensor_parallel_size: int = 1
    """Devices that compute the model together, each with a part of every layer. Each has a process
    of its own."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None: what the model was trained for."""
    max_num_seqs: int = 256
    """Requests that compute at the same time."""
    max_num_batched_tokens: int | None = None
    """New tokens in one step; longer prompts are computed in chunks. None: the platform's."""
    block_size: int | None = None
    """Tokens in one block of the KV cache, a power of two; None: the platform's."""
    gpu_memory_utilization: float = 0.92
    """Share of an accelerator's memory that this engine may use. On a CPU the cache has a fixed
    size unless one of the next two options is given."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache; None: what ``gpu_memory_utilization`` leaves."""
    kv_cache_dtype: CacheDtype = "auto"
    """Of keys and values in the cache. ``fp8`` (``fp8_e4m3``): eight-bit numbers with a scale for
    each token and head, half the bytes; scales that the checkpoint has are used. ``auto``: the
    compute dtype, or ``fp8`` where the checkpoint's ``kv_cache_scheme`` asks for it."""
    num_blocks: int | None = None
    """Blocks of the KV cache, the null block included: ``block_size`` tokens fit into each of the
    others, more where layers have windows. Overrides the two options above."""
    enable_prefix_caching: bool = True
    """Share the cache blocks of equal prompt beginnings."""
    graph_mode: str = "auto"
    """Executor of each phase: ``auto``, ``none``, ``full``, ``breakable``, ``compiled``, or
    ``decode=full,mixed=breakable``; vLLM's names (``FULL_AND_PIECEWISE``, ...) work too."""
    graph_verify: str = "auto"
    """When graphs are compared with eager execution: ``off``; ``startup``, and the first live step
    of each kind that start-up has not met; ``auto``, which also compares as many live steps as cost
    less than 1 %; or ``canary:N``, one in N replays of each graph (``canary:1``: every one, and all
    memory with it)."""
    graph_buckets: str | None = None
    """Sizes to capture, ``1,2,4,8`` or ``decode=1,2,4;mixed=64,128``; None: by the limits."""
    graph_memory_profile: Literal["auto", "off"] = "auto"
    """Predict the memory of graphs before the cache takes the rest, where the platform can."""
    speculative_config: Mapping[str, Any] = field(default_factory=dict)
    """Draft tokens and verify several in one step, vLLM's names: ``{"method": "ngram",
    "num_speculative_tokens": 4}`` (at most 7), and how many last tokens are looked for earlier in
    the text: ``prompt_lookup_max``, ``prompt_lookup_min``; or ``{"method": "draft_model", "model":
    ...}``, a small model of the same tokens, or ``"eagle3"``, a head that was trained for this one.
    The tokens are those without drafts."""
    max_logprobs: int | None = None
    """Most log probabilities that a request may ask for at one position; -1: any number. None: 20,
    or the whole vocabulary at once."""
    seed: int = 0
    """Seed of requests that bring none."""
    batch_invariant: bool = False
    """The same bits every time: logits and tokens of a request do not depend on other requests, on
    the sizes of steps, chunks, prefix hits, graphs or drafts. Only implementations of ops that
    promise it are used; what has none is refused. Slower. Where nothing is said, vLLM's
    ``VLLM_BATCH_INVARIANT=1`` in the environment says it."""
    custom_all_reduce: bool = True
    """Let kernels of several ranks read each other's memory, where devices can and it was proven at
    the start; off: ranks exchange by the backend's collectives alone."""
    enable_expert_parallel: bool = False
    """Spread whole experts over devices: those of ``tensor_parallel_size``, instead of a part of
    each expert on every one; or those of ``data_parallel_size``, whose engines then have all other
    weights each and compute their steps at the same time."""
    count_expert_load: bool = False
    """Count how many tokens each expert of each layer gets, for metrics; it costs a few small
    kernels a layer."""
    data_parallel_size: int = 1
    """Engines with all weights each, on as many devices and in processes of their own; a request
    goes to the one that has its prefix, or the least to do."""
    distributed_executor_backend: ExecutorBackend = "mp"
    """Where the processes of several devices run: ``mp``, on this machine; ``ray``, one actor for
    each device of a Ray cluster, so on several machines."""
    distributed_timeout_seconds: float | None = None
    """For so long a process of several waits for the others, and an engine for its place in a
    cluster; None: 300."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: prompts are token ids and outputs have no text."""
    ops: Mapping[str, str] = field(default_factory=dict)
    """Op name to the implementation to use instead of the platform's choice."""

    def __post_init__(self) -> None:
        for names, kind, wanted in _KINDS:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                    raise ConfigError(f"{name}={shown(value)} must be {wanted}")
        if not all(isinstance(each, str) for pair in self.ops.items() for each in pair):
            raise ConfigError(
                f"ops={shown(self.ops)} must map names of ops to names of implementations"
            )
        for name in ("model", "tokenizer", "revision", "tokenizer_revision"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name}='' is empty: give a name, or leave it out")
        parse_speculation(self.speculative_config)
        self._one_of("dtype", get_args(Dtype))
        self._one_of("load_format", get_args(LoadFormat))
        self._one_of("kv_cache_dtype", get_args(CacheDtype))
        self._one_of("graph_memory_profile", ("auto", "off"))
        self._one_of("distributed_executor_backend", get_args(ExecutorBackend))
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "block_size",
                     "kv_cache_memory_bytes", "num_blocks", "data_parallel_size",
                     "tensor_parallel_size"):  # fmt: skip
            self._positive(name)
        seconds = self.distributed_timeout_seconds
        if seconds is not None and (not is_finite(seconds) or not seconds > 0):
            raise ConfigError(
                f"distributed_timeout_seconds={shown(seconds)} must be above 0, or None for 300"
            )
        if not self.custom_all_reduce:
            for op, name in self.ops.items():
                if name == "triton" and op in ("all_reduce", "all_reduce_add"):
                    raise ConfigError(
                        f"custom_all_reduce=False and ops={{{op!r}: 'triton'}} contradict each "
                        "other; give one of them"
                    )
        limit = self.max_logprobs
        if limit is not None and (not is_whole(limit) or limit < -1):
            raise ConfigError(
                f"max_logprobs={shown(limit)} must be a whole number of at least 0, or -1 for any "
                "number"
            )
        size = self.block_size
        if size is not None and size & (size - 1):
            raise ConfigError(f"block_size={size} must be a power of two, such as 16")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={shown(share)} must be above 0 and at most 1"
            )
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

    @property
    def speculation(self) -> Speculation | None:
        """What ``speculative_config`` asks for; None: nothing is drafted."""
        return parse_speculation(self.speculative_config)

    @property
    def computes_elsewhere(self) -> bool:
        """Engines are in processes of their own, and none in this one."""
        return self.data_parallel_size > 1 or self.distributed_executor_backend == "ray"

    @property
    def patience(self) -> float:
        """Seconds that ranks wait for each other; the first step compiles, and may take minutes."""
        given = self.distributed_timeout_seconds
        return 300.0 if given is None else given

    @property
    def num_drafts(self) -> int:
        """Tokens that a decode verifies beside its newest one."""
        asked = self.speculation
        return 0 if asked is None else asked.width

    @property
    def decode_widths(self) -> list[int]:
        """Tokens of a request that decodes, its drafts included, now or then; ascending."""
        asked = self.speculation
        return [1] if asked is None else sorted({1 + room_for(each) for each in asked.levels})

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some options changed, validated again."""
        return dataclasses.replace(self, **changes)

    def arguments(self) -> dict[str, Any]:
        """The constructor's keyword arguments that make an equal one."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{name}={shown(value)} must be one of {', '.join(choices)}")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        always = ("max_num_seqs", "data_parallel_size", "tensor_parallel_size")
        if value is None and name not in always:
            return
        if not is_whole(value) or value <= 0:
            raise ConfigError(f"{name}={shown(value)} must be a positive whole number")


def _take_model_len(arguments: dict[str, Any]) -> None:
    """Out of ``hf_overrides``, where vLLM's example of context extension has it, in place."""
    overrides = arguments.get("hf_overrides")
    if not isinstance(overrides, Mapping) or "max_model_len" not in overrides:
        return
    length = plain(overrides["max_model_len"])
    if arguments.get("max_model_len") not in (None, length):
        raise ConfigError(
            f"max_model_len={arguments['max_model_len']} and max_model_len={length} in "
            "hf_overrides contradict each other; give one of them"
        )
    arguments["max_model_len"] = length
    arguments["hf_overrides"] = {k: v for k, v in overrides.items() if k != "max_model_len"}


_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
_OTHER_NAMES = ("enforce_eager", "num_gpu_blocks_override", "disable_custom_all_reduce")
"""vLLM's names of what has another one here."""
_VLLM_HAS_NONE = (
    "seed", "max_num_seqs", "enable_prefix_caching", "hf_overrides", "speculative_config",
    "data_parallel_size", "tensor_parallel_size", "distributed_executor_backend",
)  # fmt: skip
"""Where vLLM takes None for the default."""
_NAMES = frozenset(each.name for each in dataclasses.fields(EngineConfig))
_KINDS: list[tuple[tuple[str, ...], type | tuple[type, ...], str]] = [
    (
        ("model", "tokenizer", "revision", "tokenizer_revision", "quantization"),
        (str, type(None)),
        "a string or None",
    ),
    (("device",), str, "a string, such as 'auto' or 'cuda:1'"),
    (("graph_mode", "graph_verify"), str, "a string"),
    (("graph_buckets",), (str, type(None)), "a string, such as '1,2,4', or None"),
    (("hf_overrides", "ops", "speculative_config"), Mapping, "a dictionary"),
    (("seed",), int, "a whole number"),
    (
        (
            "enable_prefix_caching",
            "skip_tokenizer_init",
            "custom_all_reduce",
            "enable_expert_parallel",
            "batch_invariant",
            "count_expert_load",
        ),
        bool,
        "True or False",
    ),
]
