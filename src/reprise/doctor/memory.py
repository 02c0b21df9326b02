"""What a model needs of a device's memory, from its config alone: nothing is loaded or computed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from reprise import models
from reprise.cache.layout import CacheLayout
from reprise.cache.memory import allocate_caches, fit_model_len, plan_blocks
from reprise.cache.spec import LayerCache, Rows
from reprise.config import EngineConfig
from reprise.doctor.on_paper import META, OnPaper, on_paper, peak_of
from reprise.errors import CapacityError
from reprise.graphs import GraphOwners
from reprise.layers import Build
from reprise.loading import open_checkpoint
from reprise.ops import OpTable
from reprise.platforms import Platform
from reprise.runner.drafts import GraphOptions, load_draft
from reprise.runner.model_choices import (
    choose_cache_dtype,
    choose_dtype,
    choose_max_tokens,
    choose_model_len,
)
from reprise.runner.parts import Parts, make_parts
from reprise.shape import PHASES, StepShape


@dataclass(frozen=True)
class WeightPart:
    """Weights of one name, in all layers."""

    name: str
    """As in the model, ``*`` for the layer's number."""
    count: int
    shape: list[int]
    dtype: str
    bytes: int
    """Of all of them."""


@dataclass(frozen=True)
class CachePart:
    """The caches of layers that keep the same things equally long."""

    lifetime: str
    layers: int
    rows: dict[str, str]
    """What each holds of a token, or of a request where it is a state: shape and dtype."""
    block_size: int
    """Tokens; of a state, between places where it can be copied for others to go on."""
    block_bytes: int
    """In all of these layers."""
    token_bytes: float | None
    """Of one token in all of these layers; None: a request takes the same, however long it is."""
    request_bytes: int
    """Of the longest request."""
    pool: int
    """Which pool its blocks are from."""


@dataclass(frozen=True)
class Pool:
    """Blocks of one layout."""

    blocks: int
    """The null block included."""
    block_bytes: int


@dataclass(frozen=True)
class Capacity:
    """Requests of one length."""

    tokens: int
    request_bytes: int
    requests: int
    """As many can run at once."""
    limit: str
    """By what: ``cache`` or ``max_num_seqs``."""


@dataclass
class MemoryReport:
    """How a device's memory would be divided; all in bytes."""

    facts: dict[str, Any]
    weights: list[WeightPart] = field(default_factory=list)
    tables_bytes: int = 0
    """What is tabulated by position."""
    buffers: dict[str, int] = field(default_factory=dict)
    """Inputs and outputs of steps, and what the sampler keeps."""
    activations_bytes: int = 0
    """Results of ops in the largest step; kernels may need more for themselves."""
    graphs: dict[str, Any] = field(default_factory=dict)
    caches: list[CachePart] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    cache_reason: str = ""
    capacities: list[Capacity] = field(default_factory=list)
    problem: str | None = None
    """Why no engine could start; None: one could."""

    @property
    def weights_bytes(self) -> int:
        return sum(each.bytes for each in self.weights)

    @property
    def graph_bytes(self) -> int:
        return sum(int(self.graphs.get(name) or 0) for name in ("pool_bytes", "comparison_bytes"))

    @property
    def cache_bytes(self) -> int:
        return sum(each.blocks * each.block_bytes for each in self.pools)

    @property
    def fixed_bytes(self) -> int:
        """All but the caches."""
        return (
            self.weights_bytes
            + self.tables_bytes
            + sum(self.buffers.values())
            + self.activations_bytes
            + self.graph_bytes
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        found = asdict(self)
        return {
            **found.pop("facts"),
            "weights_bytes": self.weights_bytes,
            "cache_bytes": self.cache_bytes,
            "fixed_bytes": self.fixed_bytes,
            **found,
        }


def memory_report(
    config: EngineConfig, memory: int | None = None, facts: dict[str, Any] | None = None
) -> MemoryReport:
    """What an engine of these options would need, and how many requests it could run.

    Args:
        config: Of the engine; ``load_format`` does not matter, since weights are not read.
        memory: Bytes of a device that need not be here; its kind is ``config.device``. None: what
            the device that is here says.
        facts: Go into the report as they are.

    Raises:
        ModelError: The config describes no model that can be built.
        ConfigError: Options that an engine would refuse, too.
        PlatformError: The device is unknown, or is not here and ``memory`` is None.
    """
    checkpoint = open_checkpoint(
        config.model, revision=config.revision, overrides=config.hf_overrides, config_only=True
    )
    paper = on_paper(config.device, memory)
    config, _ = paper.check_config(config)
    dtype = choose_dtype(config.dtype, checkpoint.config, paper)
    cache_dtype = choose_cache_dtype(config.kv_cache_dtype, checkpoint.config, paper)
    max_len = choose_model_len(config.max_model_len, checkpoint.config)
    max_tokens = choose_max_tokens(config, paper, max_len)
    report = MemoryReport(
        {
            **(facts or {}),
            "model": config.model or "the demo model",
            "platform": paper.name,
            "memory_total": paper.known.total,
            "memory_free": paper.known.free,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": max_tokens,
            "gpu_memory_utilization": config.gpu_memory_utilization,
        }
    )
    with torch.inference_mode():
        build = Build(dtype, META, max_len, cache_dtype=cache_dtype, num_drafts=config.num_drafts)
        model = models.build(checkpoint.config, build)
        report.weights = _weights(model)
        report.tables_bytes = _tables(model)
        draft = load_draft(
            config, model, checkpoint, paper,
            max_model_len=max_len, cache_dtype=cache_dtype, weights=False,
        )  # fmt: skip
        if draft is not None:
            report.weights += _weights(draft, "draft ")
            report.tables_bytes += _tables(draft)
        parts = make_parts(
            config, paper, model, draft, OpTable(paper),
            max_tokens=max_tokens, max_model_len=max_len,
        )  # fmt: skip
        allocate_caches(parts.caches, parts.layout, paper)
        computation, drafter = parts.forward_pass, parts.drafter
        shapes = (
            StepShape.mixed(max_tokens, config.max_num_seqs),
            StepShape.decode(config.max_num_seqs, 1 + config.num_drafts),
        )
        outputs = {name: t for each in shapes for name, t in computation.outputs(each).items()}
        report.buffers = {
            "step inputs": _bytes(parts.buffers.arrays().values()),
            "step outputs": _bytes(outputs.values()),
            "sampler": _bytes(parts.sampler.memory().values()),
        }
        if drafter is not None:
            report.buffers["drafter"] = _bytes(drafter.memory().values())
        report.activations_bytes = max(peak_of(computation, each) for each in shapes)
        report.graphs = _graphs(config, parts, max_tokens)
    paper.used = report.fixed_bytes - report.activations_bytes - report.graph_bytes
    report.caches = _caches(parts.caches, parts.layout, max_len)
    _divide(report, config, paper, parts.layout)
    return report


def _weights(model: torch.nn.Module, prefix: str = "") -> list[WeightPart]:
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(parameter)
    return [
        WeightPart(
            prefix + name, len(each), list(each[0].shape), _short(each[0].dtype), _bytes(each)
        )
        for name, each in found.items()
    ]


def _tables(model: torch.nn.Module) -> int:
    """Bytes of the tensors that modules share or have beside their parameters and caches."""
    tables = {
        id(value): value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor)
    }
    return _bytes(tables.values()) + _bytes(model.buffers())


def _caches(caches: Mapping[str, LayerCache], layout: CacheLayout, max_len: int) -> list[CachePart]:
    groups: dict[Any, list[LayerCache]] = {}
    for each in caches.values():
        groups.setdefault((each.lifetime, tuple(each.rows.items())), []).append(each)
    parts = []
    for (lifetime, rows), same in groups.items():
        table = next(each for each in layout.tables if each.lifetime == lifetime)
        block_bytes = sum(each.block_bytes(table.block_size) for each in same)
        parts.append(
            CachePart(
                lifetime=str(lifetime),
                layers=len(same),
                rows={name: _described(each) for name, each in rows},
                block_size=table.block_size,
                block_bytes=block_bytes,
                token_bytes=None if lifetime.rewritten else sum(e.token_bytes for e in same),
                request_bytes=table.most(max_len) * block_bytes,
                pool=table.pool,
            )
        )
    return parts


def _described(rows: Rows) -> str:
    several = f", one for {rows.every} tokens" if rows.every > 1 else ""
    return f"{list(rows.shape)} {_short(rows.dtype)}{several}"


def _graphs(config: EngineConfig, parts: Parts, max_tokens: int) -> dict[str, Any]:
    platform = parts.buffers.platform
    options = GraphOptions.of(config, max_tokens, platform)
    runners = {"": options.runner(parts.forward_pass, parts.buffers, config.decode_widths)}
    if parts.drafter is not None:
        parts.drafter.plan_graphs(options)
        runners |= parts.drafter.owners
    buckets: Counter[str] = Counter()
    pool_bytes = 0
    for owner, runner in runners.items():
        shapes = runner.captures.shapes
        buckets.update(f"{owner} {each.phase}".lstrip() for each in shapes)
        largest = [next((e for e in shapes if e.phase == phase), None) for phase in PHASES]
        peaks = (peak_of(runner.computation, each) for each in largest if each)
        pool_bytes = max(pool_bytes, *peaks, 0)  # they share it
    return {
        "plan": str(runners[""].plan),
        "buckets": dict(buckets),
        "comparison_bytes": GraphOwners(runners).comparison_bytes(),
        "pool_bytes": pool_bytes,
        "note": "what the driver takes for each graph besides is measured at start-up"
        if platform.graph_memory == "measure"
        else platform.graph_memory_reason,
    }


def _divide(
    report: MemoryReport, config: EngineConfig, platform: OnPaper, layout: CacheLayout
) -> None:
    """How many blocks there is room for, and requests of which lengths."""
    max_len: int = report.facts["max_model_len"]
    report.cache_reason = _cache_reason(config, platform)
    try:
        layout = plan_blocks(
            layout,
            config,
            platform,
            max_model_len=max_len,
            max_tokens=report.facts["max_num_batched_tokens"],
            activation_bytes=report.activations_bytes + report.graph_bytes,
        )
    except CapacityError as error:
        report.problem = str(error)
        return
    report.pools = [Pool(each.num_blocks, each.block_bytes) for each in layout.pools]
    try:
        fit_model_len(config.max_model_len, max_len, layout)
    except CapacityError as error:
        report.problem = str(error)
    lengths = [1 << power for power in range(8, max_len.bit_length())]
    for tokens in sorted({each for each in (*lengths, max_len) if each <= max_len}):
        needs = [layout.most(pool, tokens) for pool in range(len(layout.pools))]
        fit = min(
            (pool.num_blocks - 1) // need for need, pool in zip(needs, layout.pools, strict=True)
        )
        nbytes = sum(
            need * pool.block_bytes for need, pool in zip(needs, layout.pools, strict=True)
        )
        limit = "cache" if fit < config.max_num_seqs else "max_num_seqs"
        report.capacities.append(Capacity(tokens, nbytes, min(fit, config.max_num_seqs), limit))


def _cache_reason(config: EngineConfig, platform: Platform) -> str:
    if config.num_blocks is not None:
        return f"num_blocks={config.num_blocks}"
    if config.kv_cache_memory_bytes is not None:
        return f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}"
    return platform.cache_reason(config.gpu_memory_utilization)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
