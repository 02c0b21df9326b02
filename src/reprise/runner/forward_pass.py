"""The forward pass as graphs see it: static inputs, static outputs, probes and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprise.addresses import address_of
from reprise.cache import CacheLayout, Copy, LayerCache
from reprise.cache.memory import PoolTensor, pool_tensors
from reprise.errors import LoadError
from reprise.graphs.contract import Probe
from reprise.graphs.kinds import Facts, Kind
from reprise.graphs.regions import Region, Stack, stacked
from reprise.layers import CausalLM, Depth, Taps, routes
from reprise.ops import OpTable
from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.runner.buffers import StepBuffers
from reprise.runner.probes import ProbeMaker
from reprise.runner.weights import weights_of
from reprise.runner.written_rows import WrittenRows
from reprise.shape import StepShape


class ForwardPass:
    """One forward pass over the step buffers (:class:`reprise.graphs.contract.Computation`).

    A decode step ends with logits, since every one of its rows is sampled; a mixed step ends with
    hidden states, of which only some rows are. All outputs are static.

    Args:
        model: Computes the hidden states and the logits.
        buffers: The static inputs.
        ops: The implementations in use.
        platform: The device.
        max_tokens: Most tokens in a mixed step.
        max_logits: Most tokens in a decode step.
        taps: Depths whose hidden states are a further output.
        caches: By name, all that lie over the tables of the buffers; None: the model's.
        draft: A model beside this one, whose weights are in the list of memory, too.
    """

    def __init__(
        self,
        model: CausalLM,
        buffers: StepBuffers,
        ops: OpTable,
        platform: Platform,
        *,
        max_tokens: int,
        max_logits: int,
        taps: Sequence[Depth] = (),
        caches: Mapping[str, LayerCache] | None = None,
        draft: torch.nn.Module | None = None,
    ) -> None:
        self.ops = ops
        self.model: Callable[..., Any] = model
        self._causal_lm = model
        self._buffers = buffers
        self._routes = model.routed or (draft is not None and routes(draft))
        self._own_caches = tuple(model.caches().values())
        self._caches = model.caches() if caches is None else caches
        dtype = next(model.parameters()).dtype
        device = platform.device
        self._hidden = torch.zeros(max_tokens, model.hidden_size, dtype=dtype, device=device)
        self._logits = torch.zeros(max_logits, model.vocab_size, dtype=dtype, device=device)
        self._depths = tuple(taps)
        most, width = max(max_tokens, max_logits), len(self._depths) * model.hidden_size
        self._taps = torch.zeros(most if taps else 0, width, dtype=dtype, device=device)
        self._probes: ProbeMaker | None = None
        self._layout = buffers.layout
        self.facts: Facts = buffers.known.facts
        self._cache_tensors: (
            tuple[Tensor | None, CacheLayout, list[dict[str, PoolTensor]], list[list[Stack]]] | None
        ) = None
        """A tensor of the caches and the layout, by which others are told, and what follows."""
        self._cache_regions: (
            tuple[list[dict[str, PoolTensor]], list[int], dict[str, Region]] | None
        ) = None
        self._weights = weights_of(model, ops.memory.values())
        parameters = {name for name, _ in model.named_parameters()}
        if draft is not None:
            own = {address_of(each) for each in self._weights.values()}
            self._weights |= {
                f"draft {name}": each
                for name, each in weights_of(draft, ops.memory.values()).items()
                if address_of(each) not in own
            }
            parameters |= {f"draft {name}" for name, _ in draft.named_parameters()}
        self._weight_regions = {k: Region(each, "weight") for k, each in self._weights.items()}
        self._tables = {
            name: each.detach().cpu().clone()
            for name, each in self._weights.items()
            if (name not in parameters or each.dim() < 2) and not each.is_meta
        }
        """What follows from the config (rotary tables), to be put back if a graph changes it, and
        vectors: they are small, and random weights leave them as the model makes them."""
        self.beside: Callable[[], Mapping[str, Tensor]] = dict
        """What lies on the device beside what a step reads and writes: the sampler's memory."""
        self.reload: Callable[[Sequence[str]], None] | None = None
        """Loads weights again, by their names in :meth:`memory`."""

    def use_cache(self, layout: CacheLayout, max_model_len: int) -> None:
        """The pools have these sizes and contexts this many tokens at most: probes can use them
        from now on."""
        self._layout = layout
        self._buffers.use_cache(layout)
        self._probes = ProbeMaker(
            self._buffers,
            self.found_caches,
            vocab_size=self._causal_lm.vocab_size,
            max_model_len=max_model_len,
            routed=self._routes,
        )

    follow = None
    """See :class:`reprise.graphs.contract.Computation`."""

    def forward(self, shape: StepShape, model: Callable[..., Any] | None = None) -> Tensor:
        """Run eagerly: logits [R, V] of a decode step, hidden states [T, D] of a mixed one."""
        batch = self._buffers.batch(
            shape.num_tokens, shape.num_requests, shape.query_len, shape.prompt
        )
        model = model or self.model
        if self._depths:
            hidden = model(batch, Taps(self._depths, self.taps(shape)))
        else:
            hidden = model(batch)
        if shape.phase == "decode":
            return self._causal_lm.logits(hidden, self._logits[: shape.num_tokens])
        return self._hidden[: shape.num_tokens].copy_(hidden)

    def pad(self, live: StepShape, bucket: StepShape) -> None:
        self._buffers.fill_padding(live, bucket)

    def inputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        return self._buffers.views(shape.num_tokens, shape.num_requests)

    def outputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        taps = {"taps": self.taps(shape)} if self._depths else {}
        if shape.phase == "decode":
            return {"logits": self._logits[: shape.num_tokens], **taps}
        return {"hidden": self._hidden[: shape.num_tokens], **taps}

    def taps(self, shape: StepShape) -> Tensor:
        """[T, n * D]: hidden states of the step, those of each depth beside the one before."""
        return self._taps[: shape.num_tokens]

    def memory(self) -> Mapping[str, Region]:
        regions = {name: Region(each, "input") for name, each in self._buffers.arrays().items()}
        regions.update(self._regions_of_caches())
        for name, each in self.ops.memory.items():
            regions[f"memory of ops ({name})"] = Region(each, "ops")
        regions.update(self._weight_regions)
        for name, each in self.beside().items():
            regions[name] = Region(each, "beside")
        return regions

    def _regions_of_caches(self) -> Mapping[str, Region]:
        """Listed again only when there are others, or more of their blocks have been used: every
        comparison asks, and all layers' are many."""
        pools, used = self._pools(), self._buffers.used_blocks()
        known = self._cache_regions
        if known is None or known[0] is not pools or known[1] != used:
            regions = {}
            for pool, tensors, count in zip(self._layout.pools, pools, used, strict=True):
                for name, each in tensors.items():
                    tensor = each.tensor
                    regions[name] = Region(tensor, "cache", pool.unit, min(count, len(tensor)))
            known = self._cache_regions = pools, used, regions
        return known[2]

    def mend(self, weights: Sequence[str]) -> None:
        if self.reload is None:
            raise LoadError(f"the source of {', '.join(weights)} is gone")
        self.reload(weights)

    def restore_tables(self) -> None:
        """Give tables that follow from the config the content that they were made with."""
        for name, each in self._tables.items():
            self._weights[name].copy_(each)

    def kind(self, live: StepShape, bucket: StepShape, exact: bool = False) -> Kind | None:
        return self._buffers.kind(bucket, exact=exact)

    def probes(self, bucket: StepShape, anchor: bool) -> Sequence[Probe]:
        assert self._probes is not None, "use_cache comes first"
        return self._probes.probes(bucket, anchor)

    def probe(self, bucket: StepShape, context: int) -> Probe:
        """One probe whose longest request has ``context`` tokens, for diagnosis."""
        assert self._probes is not None, "use_cache comes first"
        return self._probes.probe(bucket, context)

    def state(self, bucket: StepShape) -> WrittenRows:
        return WrittenRows(*self.where_rows_are(), self._buffers, bucket, self._own_caches)

    def where_rows_are(
        self,
    ) -> tuple[CacheLayout, list[dict[str, PoolTensor]], list[list[Stack]]]:
        """The tables and pools, and :meth:`found_caches`."""
        return self._layout, *self.found_caches()

    def copy_states(self, copies: Sequence[Copy]) -> Tensor:
        """Copy states, all at once: what is a target of one is no source of another.

        Returns:
            [C] bool on the device: whether each copy is one of finite numbers.
        """
        platform = self._buffers.platform
        sound = torch.ones(len(copies), dtype=torch.bool, device=platform.device)
        for number, table in enumerate(self._layout.tables):
            mine = [n for n, each in enumerate(copies) if each.table == number]
            if not mine:
                continue
            places = np.array(
                [(n, copies[n].source, copies[n].target) for n in mine], dtype=np.int64
            )
            numbers, source, target = to_device(places.T.copy(), platform)
            finite = sound[numbers]
            for stack in self._stacks()[table.pool]:
                states = stack.tensor[:, source]
                stack.tensor[:, target] = states
                finite &= states.isfinite().flatten(2).all(2).all(0)
            sound[numbers] = finite
        return sound

    def _pools(self) -> list[dict[str, PoolTensor]]:
        """The caches of each pool by name."""
        return self.found_caches()[0]

    def _stacks(self) -> list[list[Stack]]:
        """Of each pool."""
        return self.found_caches()[1]

    def found_caches(self) -> tuple[list[dict[str, PoolTensor]], list[list[Stack]]]:
        """Of each pool the caches by name, and stacked; found again only when there are others."""
        every = (each for cache in self._caches.values() for each in cache.tensors.values())
        first = next(every, None)
        known = self._cache_tensors
        if known is None or known[0] is not first or known[1] is not self._layout:
            pools = pool_tensors(self._caches, self._layout)
            stacks = [stacked({k: each.tensor for k, each in pool.items()}) for pool in pools]
            known = self._cache_tensors = first, self._layout, pools, stacks
        return known[2], known[3]
