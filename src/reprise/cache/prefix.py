"""Which block holds which prefix."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16
NO_PARENT = bytes(DIGEST_BYTES)
"""Stands for the digest of the block before a request's first one."""


def block_digest(parent: bytes, tokens: Sequence[int], salt: bytes = b"") -> bytes:
    """Identity of a full block: its tokens, everything before them, and the salt.

    A cryptographic hash, because a collision would show one user's context to another.

    Args:
        parent: Digest of the block before, or ``NO_PARENT``.
        tokens: The block's tokens, each within int32.
        salt: Whatever else the content depends on, or keeps users apart.

    Raises:
        OverflowError: A token does not fit int32.
    """
    # Parent and tokens have fixed lengths: nothing else concatenates to the same bytes.
    return blake2b(parent + array("i", tokens).tobytes() + salt, digest_size=DIGEST_BYTES).digest()


class PrefixIndex:
    """Finds the block that holds a digest's content; at most one block a digest."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    def find(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def insert(self, digest: bytes, block: int) -> None:
        """Make the block findable, unless another one with the same content is already."""
        if digest in self._block_of:
            return
        assert block not in self._digest_of, f"block {block} already holds another prefix"
        self._block_of[digest] = block
        self._digest_of[block] = digest

    def evict(self, block: int) -> None:
        """Forget the block's content, if it has any."""
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def clear(self) -> None:
        self._block_of.clear()
        self._digest_of.clear()
