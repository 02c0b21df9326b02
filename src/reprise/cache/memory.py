"""How many cache blocks fit, and the tensors that hold them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from reprise.cache.spec import LayerCache
from reprise.config import EngineConfig
from reprise.errors import CapacityError, PlatformError, RepriseError, describe
from reprise.platforms import Platform

logger = logging.getLogger(__name__)


def block_bytes(caches: Iterable[LayerCache], block_size: int) -> int:
    """Bytes of one block over all caches."""
    return sum(each.block_bytes(block_size) for each in caches)


def request_bytes(caches: Iterable[LayerCache], length: float) -> float:
    """Bytes of the rows that a request of ``length`` tokens needs to go on."""
    return sum(each.token_bytes * each.lifetime.lasting(length) for each in caches)


def plan_blocks(
    config: EngineConfig,
    platform: Platform,
    bytes_per_block: int,
    block_size: int,
    max_model_len: int,
    activation_bytes: int,
) -> int:
    """Blocks of the cache, the null block included.

    Raises:
        CapacityError: Not even a request of one block fits.
        PlatformError: The device does not tell its memory.
    """
    most_useful = math.ceil(max_model_len / block_size) * config.max_num_seqs + 1
    if config.num_blocks is not None:
        blocks, reason = config.num_blocks, "num_blocks"
    elif config.kv_cache_memory_bytes is not None:
        blocks, reason = config.kv_cache_memory_bytes // bytes_per_block, "kv_cache_memory_bytes"
    else:
        try:
            budget = platform.cache_budget(config.gpu_memory_utilization, activation_bytes)
        except RepriseError:
            raise
        except Exception as error:  # drivers fail with errors of many types
            raise PlatformError(
                f"the memory of {platform.device} cannot be measured ({describe(error)}); "
                "say how large the KV cache is to be with num_blocks or kv_cache_memory_bytes"
            ) from error
        blocks = budget // bytes_per_block
        reason = platform.cache_reason(config.gpu_memory_utilization)
    if blocks < 2:
        raise CapacityError(
            f"the KV cache ({reason}) has room for {max(blocks, 0)} block(s) of {bytes_per_block} "
            "bytes and needs at least 2; raise gpu_memory_utilization or kv_cache_memory_bytes, "
            "or use a smaller model or block_size"
        )
    if blocks > most_useful and config.num_blocks is None:
        blocks, reason = most_useful, "max_num_seqs requests of max_model_len need no more"
    logger.info(
        "KV cache: %d blocks of %d tokens, %.2f GiB (%s)",
        blocks,
        block_size,
        blocks * bytes_per_block / 2**30,
        reason,
    )
    return blocks


def fit_model_len(requested: int | None, wanted: int, num_blocks: int, block_size: int) -> int:
    """The longest context that one request can have in a cache of this size.

    Args:
        requested: ``max_model_len`` as the user gave it, or None.
        wanted: The longest context the model and the options allow.
        num_blocks: Of the cache, the null block included.
        block_size: Tokens in a block.

    Raises:
        CapacityError: The user asked for more than fits.
    """
    capacity = (num_blocks - 1) * block_size
    if wanted <= capacity:
        return wanted
    if requested is not None:
        raise CapacityError(
            f"max_model_len={requested} needs {math.ceil(requested / block_size)} cache blocks and "
            f"there are {num_blocks - 1}; lower max_model_len to {capacity}, or give the cache "
            "more memory"
        )
    logger.warning("max_model_len: %d -> %d (the KV cache holds no more)", wanted, capacity)
    return capacity


def allocate_caches(
    caches: Iterable[LayerCache], num_blocks: int, block_size: int, platform: Platform
) -> None:
    """Give every cache its tensors, [num_blocks, block_size // every, *shape] each, of zeros.

    Raises:
        CapacityError: The device has not so much memory.
    """
    caches = list(caches)
    shapes: dict[torch.dtype, list[tuple[int, ...]]] = {}
    for each in caches:
        for rows in each.rows.values():
            shape = (num_blocks, block_size // rows.every, *rows.shape)
            shapes.setdefault(rows.dtype, []).append(shape)
    total = num_blocks * block_bytes(caches, block_size)
    try:
        parts = {dtype: _zeros(each, dtype, platform) for dtype, each in shapes.items()}
    except (MemoryError, RuntimeError) as error:
        raise CapacityError(
            f"a KV cache of {num_blocks} blocks, {total / 2**30:.2f} GiB, "
            f"does not fit ({describe(error)}); lower num_blocks, "
            "kv_cache_memory_bytes or gpu_memory_utilization"
        ) from error
    for each in caches:
        each.bind(0, {name: next(parts[rows.dtype]) for name, rows in each.rows.items()})


def _zeros(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, platform: Platform
) -> Iterator[Tensor]:
    """Tensors of these shapes, in one piece of memory: what is done to all takes few launches."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = platform.zeros(sum(sizes), dtype).split(sizes)
    return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def cache_tensors(caches: Mapping[str, LayerCache]) -> dict[str, Tensor]:
    """The tensors of all caches, by names for people."""
    return {
        f"{name} {rows}": tensor
        for name, cache in caches.items()
        for rows, tensor in cache.tensors.items()
    }
