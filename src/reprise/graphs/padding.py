"""A step of padding alone: what graphs are captured on, and what is computed where only the ops and
the shapes of a step count."""

from __future__ import annotations

from typing import Any

from reprise.graphs.contract import Computation
from reprise.shape import StepShape


def write_padding(computation: Computation, bucket: StepShape) -> None:
    """Fill the bucket's static inputs with padding alone."""
    computation.pad(bucket.empty, bucket)


def compute_padding(computation: Computation, bucket: StepShape) -> Any:
    """Write padding alone, and compute it eagerly. Returns what ``forward`` does."""
    write_padding(computation, bucket)
    return computation.forward(bucket, computation.model)
