"""The forward pass as graphs see it: static inputs, static outputs, probes and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reprise.graphs.computation import Probe
from reprise.graphs.shape import StepShape
from reprise.layers import CausalLM
from reprise.ops import OpTable
from reprise.platforms import Platform
from reprise.runner.buffers import StepBuffers
from reprise.runner.probes import ProbeMaker


class ForwardPass:
    """One forward pass over the step buffers (:class:`reprise.graphs.computation.Computation`).

    A decode step ends with logits, since every one of its rows is sampled; a mixed step ends with
    hidden states, of which only some rows are. Both outputs are static.

    Args:
        model: Computes the hidden states and the logits.
        buffers: The static inputs.
        ops: The implementations in use.
        platform: The device.
        max_tokens: Most tokens in a mixed step.
        max_requests: Most requests in a step.
    """

    def __init__(
        self,
        model: CausalLM,
        buffers: StepBuffers,
        ops: OpTable,
        platform: Platform,
        *,
        max_tokens: int,
        max_requests: int,
    ) -> None:
        self.ops = ops
        self.model: Callable[..., Any] = model
        self._causal_lm = model
        self._buffers = buffers
        self._layers = list(model.attention_layers())
        dtype = next(model.parameters()).dtype
        device = platform.device
        self._hidden = torch.zeros(max_tokens, model.hidden_size, dtype=dtype, device=device)
        self._logits = torch.zeros(max_requests, model.vocab_size, dtype=dtype, device=device)
        self._probes: ProbeMaker | None = None

    def use_cache(self, num_blocks: int, max_model_len: int) -> None:
        """The cache has this many blocks and contexts this many tokens at most: probes can use
        them from now on."""
        self._probes = ProbeMaker(
            self._buffers,
            self._layers,
            vocab_size=self._causal_lm.vocab_size,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
        )

    def forward(self, shape: StepShape, model: Callable[..., Any] | None = None) -> Tensor:
        """Run eagerly: logits [R, V] of a decode step, hidden states [T, D] of a mixed one."""
        hidden = (model or self.model)(
            self._buffers.input_ids.device[: shape.num_tokens],
            self._buffers.positions.device[: shape.num_tokens],
            self._buffers.metadata(shape.num_tokens, shape.num_requests, shape.query_len),
        )
        if shape.phase == "decode":
            return self._causal_lm.logits(hidden, self._logits[: shape.num_tokens])
        return self._hidden[: shape.num_tokens].copy_(hidden)

    def pad(self, live: StepShape, bucket: StepShape) -> None:
        self._buffers.fill_padding(
            live.num_tokens, live.num_requests, bucket.num_tokens, bucket.num_requests
        )

    def inputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        return self._buffers.views(shape.num_tokens, shape.num_requests)

    def outputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        if shape.phase == "decode":
            return {"logits": self._logits[: shape.num_tokens]}
        return {"hidden": self._hidden[: shape.num_tokens]}

    def probes(self, bucket: StepShape) -> Sequence[Probe]:
        assert self._probes is not None, "use_cache comes first"
        return self._probes.probes(bucket)

    def probe(self, bucket: StepShape, context: int) -> Probe:
        """One probe whose longest request has ``context`` tokens, for diagnosis."""
        assert self._probes is not None, "use_cache comes first"
        return self._probes.probe(bucket, context)

    def state(self, live: StepShape) -> WrittenSlots:
        return WrittenSlots(self._layers, self._buffers.slot_mapping.device[: live.num_tokens])


class WrittenSlots:
    """The cache slots that the current inputs write, in every layer.

    Args:
        layers: Attention layers with their caches.
        slots: [T] int64, the live rows of the slot mapping.
    """

    def __init__(self, layers: Sequence[Any], slots: Tensor) -> None:
        self._layers = layers
        self._slots = slots.clone()

    def read(self) -> Mapping[str, Tensor]:
        values: dict[str, Tensor] = {}
        for number, layer in enumerate(self._layers):
            values[f"layer {number} key"] = layer.key_cache.flatten(0, 1)[self._slots]
            values[f"layer {number} value"] = layer.value_cache.flatten(0, 1)[self._slots]
        return values

    def write(self, values: Mapping[str, Tensor]) -> None:
        for number, layer in enumerate(self._layers):
            layer.key_cache.flatten(0, 1)[self._slots] = values[f"layer {number} key"]
            layer.value_cache.flatten(0, 1)[self._slots] = values[f"layer {number} value"]
