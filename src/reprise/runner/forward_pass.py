"""The forward pass as graphs see it: static inputs, static outputs, probes and state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reprise.cache.memory import cache_tensors
from reprise.errors import LoadError
from reprise.graphs.contract import Probe
from reprise.graphs.kinds import Facts, Kind
from reprise.graphs.regions import Region, Stack, Units, stacked
from reprise.layers import CausalLM
from reprise.ops import OpTable
from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.runner.buffers import StepBuffers
from reprise.runner.kinds import FACTS
from reprise.runner.probes import ProbeMaker
from reprise.shape import StepShape


class ForwardPass:
    """One forward pass over the step buffers (:class:`reprise.graphs.contract.Computation`).

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

    facts: Facts = FACTS

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
        self._caches = model.caches()
        dtype = next(model.parameters()).dtype
        device = platform.device
        self._hidden = torch.zeros(max_tokens, model.hidden_size, dtype=dtype, device=device)
        self._logits = torch.zeros(max_requests, model.vocab_size, dtype=dtype, device=device)
        self._probes: ProbeMaker | None = None
        self._stacked: tuple[Tensor, list[Stack]] | None = None
        self._weights = weights_of(model)
        self._weight_regions = {k: Region(each, "weight") for k, each in self._weights.items()}
        parameters = {name for name, _ in model.named_parameters()}
        self._tables = {
            name: each.detach().cpu().clone()
            for name, each in self._weights.items()
            if name not in parameters or each.dim() < 2
        }
        """What follows from the config (rotary tables), to be put back if a graph changes it, and
        vectors: they are small, and random weights leave them as the model makes them."""
        self.beside: Callable[[], Mapping[str, Tensor]] = dict
        """What lies on the device beside what a step reads and writes: the sampler's memory."""
        self.reload: Callable[[Sequence[str]], None] | None = None
        """Loads weights again, by their names in :meth:`memory`."""

    def use_cache(self, num_blocks: int, max_model_len: int) -> None:
        """The cache has this many blocks and contexts this many tokens at most: probes can use
        them from now on."""
        self._probes = ProbeMaker(
            self._buffers,
            self._caches,
            vocab_size=self._causal_lm.vocab_size,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
        )
        self._buffers.rows.layouts.use_cache(num_blocks)

    def forward(self, shape: StepShape, model: Callable[..., Any] | None = None) -> Tensor:
        """Run eagerly: logits [R, V] of a decode step, hidden states [T, D] of a mixed one."""
        hidden = (model or self.model)(
            self._buffers.batch(shape.num_tokens, shape.num_requests, shape.query_len)
        )
        if shape.phase == "decode":
            return self._causal_lm.logits(hidden, self._logits[: shape.num_tokens])
        return self._hidden[: shape.num_tokens].copy_(hidden)

    def pad(self, live: StepShape, bucket: StepShape) -> None:
        self._buffers.fill_padding(live, bucket)

    def inputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        return self._buffers.views(shape.num_tokens, shape.num_requests)

    def outputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        if shape.phase == "decode":
            return {"logits": self._logits[: shape.num_tokens]}
        return {"hidden": self._hidden[: shape.num_tokens]}

    def memory(self) -> Mapping[str, Region]:
        used = self._buffers.rows.layouts.highest + 2
        caches = cache_tensors(self._caches)
        regions = {name: Region(each, "input") for name, each in self._buffers.arrays().items()}
        for name, each in caches.items():
            regions[name] = Region(each, "cache", "block", min(used, len(each)))
        for name, each in self.ops.memory.items():
            regions[f"memory of ops ({name})"] = Region(each, "ops")
        regions.update(self._weight_regions)
        for name, each in self.beside().items():
            regions[name] = Region(each, "beside")
        return regions

    def mend(self, weights: Sequence[str]) -> None:
        if self.reload is None:
            raise LoadError(f"the source of {', '.join(weights)} is gone")
        self.reload(weights)

    def restore_tables(self) -> None:
        """Give tables that follow from the config the content that they were made with."""
        for name, each in self._tables.items():
            self._weights[name].copy_(each)

    def kind(self, live: StepShape, bucket: StepShape) -> Kind:
        return self._buffers.kind(bucket)

    def probes(self, bucket: StepShape, anchor: bool) -> Sequence[Probe]:
        assert self._probes is not None, "use_cache comes first"
        return self._probes.probes(bucket, anchor)

    def probe(self, bucket: StepShape, context: int) -> Probe:
        """One probe whose longest request has ``context`` tokens, for diagnosis."""
        assert self._probes is not None, "use_cache comes first"
        return self._probes.probe(bucket, context)

    def state(self, bucket: StepShape) -> WrittenSlots:
        slots = self._buffers.slot_mapping.device[: bucket.num_tokens]
        return WrittenSlots(self._stacks(), slots, self._buffers, bucket)

    def _stacks(self) -> list[Stack]:
        tensors = cache_tensors(self._caches)
        first = next(iter(tensors.values()))
        if self._stacked is None or self._stacked[0] is not first:
            self._stacked = first, stacked(tensors)
        return self._stacked[1]


class WrittenSlots:
    """The cache slots that the current inputs write, in every layer.

    Args:
        stacks: The caches, [C, N, B, ...] each.
        slots: [T] int64, the slot mapping of the step, padding included.
        buffers: Hold the step.
        bucket: What it is padded to.
    """

    def __init__(
        self, stacks: Sequence[Stack], slots: Tensor, buffers: StepBuffers, bucket: StepShape
    ) -> None:
        self._names = {f"caches {number}": each.names for number, each in enumerate(stacks)}
        self._rows = {
            name: stack.tensor.flatten(1, 2).flatten(2)
            for name, stack in zip(self._names, stacks, strict=True)
        }
        self._slots = slots.clone()
        self._buffers = buffers
        self._bucket = bucket

    def read(self) -> Mapping[str, Tensor]:
        return {name: rows[:, self._slots] for name, rows in self._rows.items()}

    def write(self, values: Mapping[str, Tensor]) -> None:
        for name, rows in self._rows.items():
            rows[:, self._slots] = values[name]

    def names(self, key: str) -> Sequence[str]:
        return self._names[key]

    def live(self, key: str, shape: StepShape) -> int:
        return shape.num_tokens

    def written(self) -> Units:
        return {"block": self._slots // self._buffers.block_size}

    def beside(self) -> Units:
        return {"block": self._blocks(reads=False)}

    def near(self) -> Units:
        return {"block": self._blocks(reads=True)}

    def _blocks(self, *, reads: bool) -> Tensor:
        num_blocks = min(each.shape[1] // self._buffers.block_size for each in self._rows.values())
        blocks = self._buffers.blocks_near(self._bucket, num_blocks, reads=reads)
        return to_device(blocks, self._buffers.platform)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every tensor that the model has from the start, by name: parameters, buffers, tables."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    named = itertools.chain(
        model.named_parameters(),
        model.named_buffers(),
        (
            (f"{path}.{name}" if path else name, value)
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        ),
    )
    for name, tensor in named:
        if tensor.numel() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor.detach()
    return found
