"""Cache blocks: who owns them, and which prefixes they hold."""

from reprise.cache.block_pool import NULL_BLOCK, BlockPool
from reprise.cache.manager import CacheManager, CacheUser
from reprise.cache.prefix import NO_PARENT, PrefixIndex, block_digest

__all__ = [
    "NO_PARENT",
    "NULL_BLOCK",
    "BlockPool",
    "CacheManager",
    "CacheUser",
    "PrefixIndex",
    "block_digest",
]
