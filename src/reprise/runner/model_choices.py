"""What config and options decide before weights are loaded: dtype, context, the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from typing import Any

import torch

from reprise import models
from reprise.config import EngineConfig
from reprise.distributed import ALONE, Group
from reprise.errors import CapacityError, ConfigError, ModelError, describe
from reprise.layers import Build, CausalLM, context_length, default_length, describe_rotary
from reprise.platforms import MemoryInfo, Platform

logger = logging.getLogger(__name__)

MOST_RANKS = 16
"""Numbers of ranks up to here are tried when a message lists those that a model can have."""


def choose_dtype(requested: str, config: Any, platform: Platform) -> torch.dtype:
    """The compute dtype: as requested, else the checkpoint's where the device computes in it.

    Raises:
        ModelError: The platform does not compute in the requested dtype.
    """
    if requested != "auto":
        dtype = getattr(torch, requested)
        if not platform.supports_dtype(dtype):
            raise ModelError(f"dtype={requested!r} is not supported by device {platform.name!r}")
        return dtype
    stored = getattr(config, "dtype", None) or torch.float32
    if isinstance(stored, str):
        stored = getattr(torch, stored, stored)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        raise ModelError(f"config field dtype={stored!r} is no floating-point type; give dtype=")
    if platform.prefers_dtype(stored):
        return stored
    chosen = platform.default_dtype
    logger.info("dtype: %s -> %s (faster on %s)", stored, chosen, platform.name)
    return chosen


def choose_cache_dtype(requested: str, config: Any, platform: Platform) -> torch.dtype | None:
    """Of keys and values in the cache, if they are eight-bit codes; None: as the compute dtype.

    Raises:
        ModelError: The device has no such numbers.
    """
    dtype = platform.fp8_dtype
    if requested != "auto":
        if dtype is None:
            raise ModelError(
                f"kv_cache_dtype={requested!r}: {platform.device_name} has no eight-bit "
                "floating-point numbers; leave it out"
            )
        logger.info("kv_cache_dtype: %s, a scale for each token and head", _short(dtype))
        return dtype
    quantization = getattr(config, "quantization_config", None)
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    if not scheme:  # what it may say is checked where the formats of weights are read
        return None
    if dtype is None:
        logger.info(
            "kv_cache_dtype: as the compute dtype (kv_cache_scheme is of eight-bit floating-point "
            "numbers, and %s has none)", platform.device_name,
        )  # fmt: skip
        return None
    logger.info("kv_cache_dtype: %s (the checkpoint's kv_cache_scheme)", _short(dtype))
    return dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_model_len(requested: int | None, config: Any) -> int:
    """The longest context in tokens: at most what the positions are made for.

    Raises:
        ModelError: The request exceeds that.
    """
    trained = models.whole_number(config, "max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    length = default_length(rope, trained) if requested is None else requested
    most = context_length(rope, trained)
    if length > most:
        remedy = {
            "rope_type": "yarn",
            "factor": float(-(-length // trained)),
            "original_max_position_embeddings": trained,
        }
        raise ModelError(
            f"max_model_len={length} exceeds the {most} positions of the model "
            f"(max_position_embeddings={trained}, {describe_rotary(rope, trained, length)}); "
            f"lower it, or stretch the positions: hf_overrides={{'rope_parameters': {remedy}}}"
        )
    if rope:
        logger.info("RoPE: %s; context %d", describe_rotary(rope, trained, length), length)
    return length


def choose_max_tokens(config: EngineConfig, platform: Platform, max_model_len: int) -> int:
    """Most tokens of a step: what is asked for, but no more than all requests can bring; unless it
    is said, the platform's default, and at least what all of them decode at once."""
    decodes = config.max_num_seqs * (1 + config.num_drafts)
    asked = config.max_num_batched_tokens
    if asked is None:
        return max(platform.default_batched_tokens, decodes)
    most = max(config.max_num_seqs * max_model_len, decodes)
    if asked > most:
        logger.info(
            "max_num_batched_tokens: %d -> %d (max_num_seqs=%d requests of max_model_len=%d)",
            asked, most, config.max_num_seqs, max_model_len,
        )  # fmt: skip
    return min(asked, most)


def build_model(
    config: Any,
    *,
    max_model_len: int,
    table_blocks: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    platform: Platform,
    step_tokens: int = 0,
    num_drafts: int = 0,
    group: Group = ALONE,
    exchange: Group | None = None,
) -> CausalLM:
    """The model with unset weights, after it has been made sure that the device can hold it.

    Args:
        config: transformers' ``PretrainedConfig``.
        max_model_len: Longest context in tokens.
        table_blocks: Entries of all requests' block tables.
        dtype: Of the weights.
        cache_dtype: See :func:`choose_cache_dtype`.
        platform: Drives the device.
        step_tokens: Most tokens of a step, whose hidden states have to fit beside it.
        num_drafts: See :class:`reprise.layers.Build`.
        group: The ranks that own it together; what is built is this one's part.
        exchange: See :class:`reprise.layers.Build`.

    Raises:
        ModelError: The config describes no model that can be built, or none that so many ranks can
            share.
        CapacityError: The device has not so much memory.
    """
    try:
        # Sizes alone, in no memory: an absurd config must not claim the machine's.
        shape = shape_of(config, dtype, group, exchange)
        parameters = list(shape.parameters())
        weights = sum(each.nbytes for each in parameters)
        position = _bytes_of_a_position(shape)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise ModelError(f"a model of {_sizes(config)} cannot be built: {error}") from error
    # What is tabulated for each position, and int32 block tables.
    tables = max_model_len * position + 4 * table_blocks
    step = step_tokens * shape.hidden_size * dtype.itemsize
    memory = _known_memory(platform)
    has = "" if memory is None else (
        f", which has {memory.total / 2**30:.2f} GiB, {memory.free / 2**30:.2f} GiB of them free"
    )  # fmt: skip
    too_much = (
        f"{weights / 2**30:.2f} GiB of weights ({_sizes(config)}) and {tables / 2**30:.2f} GiB of "
        f"tables (max_model_len={max_model_len}) do not fit on {platform.device}{has}; use a "
        "smaller model, dtype or max_model_len"
    )
    if memory is not None and step > memory.free:
        raise CapacityError(
            f"{step / 2**30:.2f} GiB of hidden states of a step (max_num_batched_tokens="
            f"{step_tokens}) do not fit on {platform.device}{has}; lower max_num_batched_tokens, "
            "and longer prompts are computed in chunks"
        )
    if memory is not None and (weights > memory.total or tables > memory.free):
        raise CapacityError(too_much)
    try:
        build = Build(
            dtype, platform.device, max_model_len, cache_dtype=cache_dtype, num_drafts=num_drafts,
            group=group, exchange=exchange,
        )  # fmt: skip
        with platform.weights_memory(parameters):
            return models.build(config, build)
    except (RuntimeError, MemoryError) as error:
        raise CapacityError(f"{too_much} ({str(error).splitlines()[0]})") from error


def shape_of(config: Any, dtype: torch.dtype, group: Group, exchange: Group | None) -> CausalLM:
    """A rank's part of the model, without memory.

    Raises:
        ModelError: The config describes no model, or none that so many ranks can share.
    """

    def build(group: Group) -> CausalLM:
        made = Build(dtype, torch.device("meta"), 1, group=group, exchange=exchange)
        return models.build(config, made)

    try:
        found = build(group)
    except ModelError as error:
        if group.size == 1:
            raise
        sizes = [
            n for n in range(1, MOST_RANKS + 1) if _builds(build, replace(group, rank=0, size=n))
        ]
        if not sizes:
            raise  # it is not the number of ranks
        raise ModelError(
            f"{error}; this model can be shared by {', '.join(map(str, sizes))} rank(s)"
        ) from error
    if exchange is not None and not found.routed:
        raise ModelError(
            f"enable_expert_parallel=True: {_architecture(config)} has no experts; leave it out"
        )
    return found


def _architecture(config: Any) -> str:
    """The architecture of a config, for people."""
    return str((getattr(config, "architectures", None) or ["the model"])[0])


def _builds(build: Callable[[Group], CausalLM], group: Group) -> bool:
    try:
        build(group)
    except ModelError:
        return False
    return True


def refuse_unshared(config: EngineConfig) -> None:
    """Raise a ConfigError for what ranks that share one engine's attention do not compute yet."""
    asked, ranks = config.speculation, config.tensor_parallel_size
    if ranks > 1 and asked is not None and asked.method not in ("ngram", "mtp"):
        raise ConfigError(
            f"speculative_config: method {asked.method!r} with tensor_parallel_size={ranks} is not "
            "supported; use 'ngram', or 'mtp' where the checkpoint has such a layer"
        )


def _bytes_of_a_position(shape: CausalLM) -> int:
    """Bytes of the rotary tables of a model for contexts of one token."""
    tables = {
        id(value): value
        for module in shape.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
    }
    return sum(each.nbytes for each in tables.values())


def _known_memory(platform: Platform) -> MemoryInfo | None:
    """None: the device does not tell it, or tells what cannot be."""
    try:
        memory = platform.memory_info()
    except Exception as error:  # drivers fail with errors of many types
        logger.warning(
            "whether the model fits is not known before it is there: the memory of %s cannot be "
            "measured (%s)", platform.device, describe(error),
        )  # fmt: skip
        return None
    told = isinstance(memory, MemoryInfo) and all(isinstance(each, int) for each in astuple(memory))
    if told and 0 < memory.free <= memory.total:
        return memory
    logger.warning(
        "whether the model fits is not known before it is there: %s reports %s as its memory",
        platform.device, memory,
    )  # fmt: skip
    return None


def _sizes(config: Any) -> str:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
             "rope_parameters")  # fmt: skip
    found = ((name, getattr(config, name, None)) for name in names)
    return ", ".join(f"{name}={value}" for name, value in found if value is not None)
