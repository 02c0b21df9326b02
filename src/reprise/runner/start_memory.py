"""What memory graphs take at start, and the cache that the rest has room for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from reprise.cache.layout import CacheLayout
from reprise.cache.memory import fit_model_len, plan_blocks
from reprise.config import EngineConfig
from reprise.distributed import Agreement
from reprise.errors import PlatformError, RepriseError
from reprise.graphs import Captures, GraphMemory, GraphOwners
from reprise.platforms import Platform

logger = logging.getLogger(__name__)


def graph_bytes(config: EngineConfig, owners: GraphOwners, memory: GraphMemory) -> int:
    """Bytes to keep free for graphs, and for comparisons of graphs with eager execution.

    Args:
        config: Says whether graphs are measured.
        owners: Of the graphs; none is captured yet.
        memory: Of the target's graphs: is told if they are not.
    """
    predicted = 0
    if config.graph_memory_profile == "off":
        memory.note = "not predicted: graph_memory_profile=off"
    else:
        predicted = owners.predict()
    compared = owners.comparison_bytes()
    if compared:
        logger.info("graph verification: %.2f GiB kept free for comparisons", compared / 2**30)
    return predicted + compared


@contextlib.contextmanager
def blaming_the_prediction(captures: Captures) -> Iterator[None]:
    """What fails in the ``with`` block may fail because predicting spoiled the device."""
    try:
        yield
    except Exception as error:
        if not captures.memory.failed:
            raise
        kind = type(error) if isinstance(error, RepriseError) else PlatformError
        raise kind(
            f"{error}; before, the prediction of graph memory failed "
            f"({captures.memory.note}): start with --graph-memory-profile off "
            "(graph_memory_profile='off') to leave it out"
        ) from error


def plan_cache(
    layout: CacheLayout,
    config: EngineConfig,
    platform: Platform,
    agreement: Agreement,
    *,
    wanted_len: int,
    max_tokens: int,
    reserved_bytes: int,
) -> tuple[CacheLayout, int]:
    """How many blocks each pool has, and the longest context that they hold.

    Args:
        layout: Of the caches, with no blocks.
        config: Sizes that the user has set.
        platform: Whose memory it is.
        agreement: Of the ranks, which have all as many blocks.
        wanted_len: The longest context that the model or the user wants.
        max_tokens: Most tokens in a step.
        reserved_bytes: What else takes memory.

    Raises:
        CapacityError: There is no room for a cache.
    """
    layout = plan_blocks(
        layout,
        config,
        platform,
        max_model_len=wanted_len,
        max_tokens=max_tokens,
        activation_bytes=reserved_bytes,
    )
    layout = _agreed(layout, agreement)
    longest = fit_model_len(config.max_model_len, wanted_len, layout)
    logger.info(
        "requests at once: at most %d of one token, %d of %d tokens (the cache); %d (max_num_seqs)",
        layout.requests(1), layout.requests(longest), longest, config.max_num_seqs,
    )  # fmt: skip
    return layout, longest


def _agreed(layout: CacheLayout, agreement: Agreement) -> CacheLayout:
    """With the least that a rank has room for: one scheduler gives out the blocks of all."""
    if agreement.size == 1:
        return layout
    own = [each.num_blocks for each in layout.pools]
    least = [-int(agreement.largest(-count)) for count in own]
    if least == own:
        return layout
    logger.info("KV cache: %s blocks, as many as the fullest rank has room for", least)
    return layout.sized(least)
