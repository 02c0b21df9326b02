"""A scheduled step made into device work: static buffers, model, sampler."""

from reprise.runner.model_runner import ModelRunner
from reprise.runner.output import PendingOutput, StepOutput

__all__ = ["ModelRunner", "PendingOutput", "StepOutput"]
