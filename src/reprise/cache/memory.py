"""How many cache blocks fit, and the tensors that hold them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reprise.addresses import address_of
from reprise.cache.layout import CacheLayout, by_lifetime
from reprise.cache.spec import LayerCache, Rows
from reprise.config import EngineConfig
from reprise.errors import CapacityError, PlatformError, RepriseError, describe
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

STATE_SHARE = 1 / 2
"""Of the memory for caches, what states get at most."""
CHECKPOINTS = 1
"""Places for copies of states, for each request that may run."""


def step_bytes(caches: Iterable[LayerCache], length: float) -> float:
    """Bytes of the rows that a decode of a request of ``length`` tokens reads, and of a state that
    it writes: what it writes of others is nothing beside what it reads."""
    return sum(
        each.token_bytes * each.lifetime.lasting(length) * (2 if each.lifetime.rewritten else 1)
        for each in caches
    )


def plan_blocks(
    layout: CacheLayout,
    config: EngineConfig,
    platform: Platform,
    *,
    max_model_len: int,
    max_tokens: int,
    activation_bytes: int,
) -> CacheLayout:
    """Decide how many blocks each pool has.

    Pools whose requests own few blocks however long they are get what ``max_num_seqs`` requests
    need, or their part of the budget if that is less; the main pool takes the rest.

    Args:
        layout: Tables and pools.
        config: Says how much memory there may be.
        platform: Else tells it.
        max_model_len: Most tokens of a request.
        max_tokens: Most tokens of a step: rows that leave a window leave it after the step that
            they were computed in.
        activation_bytes: What a step needs beside.

    Raises:
        CapacityError: Not even a request of one block fits.
        PlatformError: The device does not tell its memory.
    """
    pools, main = layout.pools, layout.main
    useful = [
        1 + _useful(layout, number, config.max_num_seqs, max_model_len, max_tokens)
        for number in range(len(pools))
    ]
    if config.num_blocks is not None:
        # So that as many tokens fit as in so many blocks of caches that are all kept.
        blocks = list(useful)
        blocks[main] = 1 + (config.num_blocks - 1) * len(layout.of_pool(main))
        reason = "num_blocks"
    else:
        budget, reason = _budget(config, platform, activation_bytes)
        blocks = _share(layout, budget, useful)
    for number, count in enumerate(blocks):
        if count < 2:
            raise CapacityError(
                f"the KV cache ({reason}) has room for {max(count, 0)} block(s) of "
                f"{pools[number].block_bytes} bytes and needs at least 2; raise "
                "gpu_memory_utilization or kv_cache_memory_bytes, or use a smaller model or "
                "block_size"
            )
    planned = layout.sized(blocks)
    for number, (count, most) in enumerate(zip(blocks, useful, strict=True)):
        tables = layout.of_pool(number)
        told = " and ".join(f"{each.block_size} tokens ({each.lifetime})" for each in tables)
        why = reason
        if config.num_blocks is None and count == most:
            why = "max_num_seqs requests of max_model_len need no more"
        elif number != main:
            why = "max_num_seqs requests need so many"
            if count < most:
                part = "half" if tables[0].lifetime.rewritten else "a part"
                why = f"{part} of the memory at most ({reason})"
        logger.info(
            "KV cache: %d blocks of %s, %.2f GiB (%s)",
            count, told, count * pools[number].block_bytes / 2**30, why,
        )  # fmt: skip
    return planned


def _useful(
    layout: CacheLayout, pool: int, max_requests: int, max_model_len: int, max_tokens: int
) -> int:
    """Blocks of a pool that all requests at full length can own."""
    total = 0
    for each in layout.of_pool(pool):
        at_rest = each.most(max_model_len)
        if each.lifetime.rewritten:
            total += (at_rest + CHECKPOINTS) * max_requests
            continue
        # While they compute, and before what has left them is given back.
        in_step = len(each.lifetime.needed(0, max_model_len, each.block_size)) - at_rest
        chunk = min(-(-max_tokens // each.block_size), in_step * max_requests)
        total += at_rest * max_requests + chunk
    return total


def _budget(config: EngineConfig, platform: Platform, activation_bytes: int) -> tuple[int, str]:
    """Bytes for all pools, and why so many."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    try:
        budget = platform.cache_budget(config.gpu_memory_utilization, activation_bytes)
    except RepriseError:
        raise
    except Exception as error:  # drivers fail with errors of many types
        raise PlatformError(
            f"the memory of {platform.device} cannot be measured ({describe(error)}); "
            "say how large the KV cache is to be with num_blocks or kv_cache_memory_bytes"
        ) from error
    if not isinstance(budget, int):
        raise PlatformError(
            f"platform {platform.name!r} says {budget!r} bytes are there for the KV cache, which "
            "must be a whole number; until it does, give num_blocks or kv_cache_memory_bytes"
        )
    return budget, platform.cache_reason(config.gpu_memory_utilization)


def _share(layout: CacheLayout, budget: int, useful: Sequence[int]) -> list[int]:
    """Blocks of each pool. No pool but the main one takes more than it would if a token's rows
    were all kept, so that no request finds less room than it would then."""
    pools, main = layout.pools, layout.main
    sizes = [each.block_bytes for each in layout.pools]
    states = {each.pool for each in layout.tables if each.lifetime.rewritten} - {main}
    token_bytes = [
        sum(pools[each.pool].block_bytes / each.block_size for each in layout.of_pool(number))
        for number in range(len(pools))
    ]
    whole = sum(each for number, each in enumerate(token_bytes) if number not in states)
    left = budget
    blocks = [0] * len(pools)
    for number in states:
        share = int(budget * STATE_SHARE) // len(states)
        blocks[number] = min(useful[number], share // sizes[number])
        left -= blocks[number] * sizes[number]
    for number, each in enumerate(token_bytes):
        if number != main and number not in states:
            blocks[number] = min(useful[number], int(left * each / whole) // sizes[number])
    left = budget - sum(count * size for count, size in zip(blocks, sizes, strict=True))
    blocks[main] = min(useful[main], left // sizes[main])
    left -= blocks[main] * sizes[main]
    for number, size in enumerate(sizes):  # what the main pool cannot use
        more = min(useful[number] - blocks[number], left // size)
        blocks[number] += more
        left -= more * size
    return blocks


def fit_model_len(requested: int | None, wanted: int, layout: CacheLayout) -> int:
    """The longest context that one request can have in a cache of this size.

    Args:
        requested: ``max_model_len`` as the user gave it, or None.
        wanted: The longest context the model and the options allow.
        layout: With the sizes of its pools.

    Raises:
        CapacityError: The user asked for more than fits.
    """
    capacity = layout.capacity
    if wanted <= capacity:
        return wanted
    if requested is not None:
        wants = ", ".join(str(layout.most(pool, requested)) for pool in range(len(layout.pools)))
        has = ", ".join(str(each.num_blocks - 1) for each in layout.pools)
        raise CapacityError(
            f"max_model_len={requested} needs {wants} cache blocks and "
            f"there are {has}; lower max_model_len to {capacity}, or give the cache "
            "more memory"
        )
    logger.warning("max_model_len: %d -> %d (the KV cache holds no more)", wanted, capacity)
    return capacity


def allocate_caches(
    caches: Mapping[str, LayerCache], layout: CacheLayout, platform: Platform
) -> None:
    """Give every cache its tensors, of zeros: see :attr:`LayerCache.tensors`.

    Tables of one pool have their rows in the same tensors.

    Raises:
        CapacityError: The device has not so much memory.
    """
    total = sum(each.num_blocks * each.block_bytes for each in layout.pools)
    groups = by_lifetime(caches.values())
    made: dict[int, list[Tensor]] = {}
    try:
        for table, group in zip(layout.tables, groups.values(), strict=True):
            if table.pool not in made:
                count = layout.pools[table.pool].num_blocks
                made[table.pool] = _zeros(group, count, table.block_size, platform)
    except (MemoryError, RuntimeError) as error:
        counts = " and ".join(str(each.num_blocks) for each in layout.pools)
        raise CapacityError(
            f"a KV cache of {counts} blocks, {total / 2**30:.2f} GiB, "
            f"does not fit ({describe(error)}); lower num_blocks, "
            "kv_cache_memory_bytes or gpu_memory_utilization"
        ) from error
    for number, (table, group) in enumerate(zip(layout.tables, groups.values(), strict=True)):
        tensors = iter(made[table.pool])
        for each in group:
            each.bind(number, {name: next(tensors) for name in each.rows})


def _zeros(
    group: Iterable[LayerCache], num_blocks: int, block_size: int, platform: Platform
) -> list[Tensor]:
    """The tensors of some caches, those of one dtype in one piece of memory: what is done to all
    takes few launches."""
    every = [(cache, rows) for cache in group for rows in cache.rows.values()]
    shapes: dict[torch.dtype, list[tuple[int, ...]]] = {}
    for cache, rows in every:
        shape = (num_blocks, *cache.shape(rows, block_size))
        shapes.setdefault(rows.dtype, []).append(shape)
    parts: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype, some in shapes.items():
        sizes = [math.prod(shape) for shape in some]
        pieces = platform.zeros(sum(sizes), dtype).split(sizes)
        parts[dtype] = iter([piece.view(shape) for piece, shape in zip(pieces, some, strict=True)])
    return [next(parts[rows.dtype]) for _, rows in every]


@dataclass(frozen=True)
class PoolTensor:
    """A tensor of a pool."""

    tensor: Tensor
    rows: Rows
    scales: str | None
    """The name of the scales of its codes; None: it holds numbers."""


def pool_tensors(
    caches: Mapping[str, LayerCache], layout: CacheLayout
) -> list[dict[str, PoolTensor]]:
    """Of each pool the tensors, by names for people; one that is shared has the names of all."""
    found: list[dict[str, PoolTensor]] = []
    for number in range(len(layout.pools)):
        names: dict[int, list[str]] = {}
        last: dict[int, LayerCache] = {}
        kept: dict[int, tuple[str, Tensor]] = {}
        for name, cache in caches.items():
            if layout.tables[cache.table].pool == number:
                for rows, tensor in cache.tensors.items():
                    at = address_of(tensor)
                    names.setdefault(at, []).append(name)
                    kept[at], last[at] = (rows, tensor), cache
        made: dict[str, PoolTensor] = {}
        for at, (rows, tensor) in kept.items():
            owners, spec = " and ".join(names[at]), last[at].rows
            scales = next((k for k, each in spec.items() if each.scales_of == rows), None)
            made[f"{owners} {rows}"] = PoolTensor(
                tensor, spec[rows], None if scales is None else f"{owners} {scales}"
            )
        found.append(made)
    return found
