"""What layers keep from step to step: declared, given memory, owned by requests, found again."""

from reprise.cache.batch import Batch, Table
from reprise.cache.block_pool import NULL_BLOCK, BlockPool
from reprise.cache.manager import CacheManager, CacheUser
from reprise.cache.prefix import NO_PARENT, PrefixIndex, block_digest
from reprise.cache.spec import KEPT, LayerCache, Lifetime, Rows

__all__ = [
    "KEPT",
    "NO_PARENT",
    "NULL_BLOCK",
    "Batch",
    "BlockPool",
    "CacheManager",
    "CacheUser",
    "LayerCache",
    "Lifetime",
    "PrefixIndex",
    "Rows",
    "Table",
    "block_digest",
]
