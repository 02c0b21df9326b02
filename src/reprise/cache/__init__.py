"""What layers keep from step to step: declared, given memory, owned by requests, found again."""

from reprise.cache.batch import Batch, Table
from reprise.cache.block_pool import NULL_BLOCK, BlockPool
from reprise.cache.hits import Hit
from reprise.cache.layout import CacheLayout, one_table
from reprise.cache.manager import CacheManager
from reprise.cache.prefix import NO_PARENT, PrefixIndex, block_digest
from reprise.cache.request_table import CacheUser, Copy
from reprise.cache.spec import KEPT, STATE, LayerCache, Lifetime, Rows, State, Window

__all__ = [
    "KEPT",
    "NO_PARENT",
    "NULL_BLOCK",
    "STATE",
    "Batch",
    "BlockPool",
    "CacheLayout",
    "CacheManager",
    "CacheUser",
    "Copy",
    "Hit",
    "LayerCache",
    "Lifetime",
    "PrefixIndex",
    "Rows",
    "State",
    "Table",
    "Window",
    "block_digest",
    "one_table",
]
