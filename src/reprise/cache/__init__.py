"""Cache blocks: who owns them, which prefixes they hold, and where a step finds them."""

from reprise.cache.batch import Batch, Table
from reprise.cache.block_pool import NULL_BLOCK, BlockPool
from reprise.cache.manager import CacheManager, CacheUser
from reprise.cache.prefix import NO_PARENT, PrefixIndex, block_digest

__all__ = [
    "NO_PARENT",
    "NULL_BLOCK",
    "Batch",
    "BlockPool",
    "CacheManager",
    "CacheUser",
    "PrefixIndex",
    "Table",
    "block_digest",
]
