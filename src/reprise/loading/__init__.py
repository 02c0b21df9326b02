"""Checkpoints: find them, read their config and tokenizer, and load them into parameters."""

from reprise.loading.checkpoint import Checkpoint, open_checkpoint
from reprise.loading.weights import load_weights

__all__ = ["Checkpoint", "load_weights", "open_checkpoint"]
