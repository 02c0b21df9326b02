"""Checkpoints: find them, read their config and tokenizer, and load them into parameters."""

from reprise.loading.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from reprise.loading.generation_config import recommended
from reprise.loading.json_tokenizer import as_transformers
from reprise.loading.quantization import require_method
from reprise.loading.tokenizer import end_of_text_id
from reprise.loading.update import NamedTensors, plan_update, update_weights
from reprise.loading.weights import load_weights

__all__ = [
    "Checkpoint",
    "NamedTensors",
    "as_transformers",
    "checkpoint_of",
    "end_of_text_id",
    "load_weights",
    "open_checkpoint",
    "plan_update",
    "recommended",
    "require_method",
    "update_weights",
]
