"""What attention needs to know about a step. Its kernels are implementations of the op."""

from reprise.attention.metadata import AttentionMetadata

__all__ = ["AttentionMetadata"]
