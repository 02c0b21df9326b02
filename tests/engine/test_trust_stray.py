"""A graph that changes one number, anywhere in what an engine holds: no wrong token under canary:1.

The list of memory is tried piece by piece, by a write whose place and time depend on the step, and
what ops keep in modules is looked for, since no list can have it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any, ClassVar

import pytest
import torch
from helpers import TinyModel, TinyModels, make_llm
from planted import OPTIONS, Oracle, make_oracle, planted, serve, wrong_tokens
from torch import Tensor

import reprise.ops
from reprise import LLM
from reprise.ops.registry import Op, OpTable
from reprise.platforms import Platform
from reprise.testing.faults.planted import PlantedFault

DRAFTS: dict[str, Any] = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
ASKED: dict[str, Any] = {
    "frequency_penalty": 0.5, "allowed_token_ids": tuple(range(0, 160, 2)),
}  # fmt: skip
"""What makes the sampler keep something of each request."""
VICTIMS = (
    "rows' integers", "rows' floats", "rows' tables", "block_tables", "slots", "positions",
    "seq_lens", "accepted", "fresh", "draws", "sampling_rows", "input_ids", "query_start_loc",
    "layer 0 conv", "layer 0 heads", "layer 0 recent", "layer 0 gates", "layer 3 key",
    "layer 3 value", "sampler's SeenTokens.counts 0", "sampler's ForbiddenTokens.masks 0",
    "n-gram drafter's texts", "model.layers.3.self_attn.cos_sin", "model.layers.0.self_attn.a_log",
    "model.embed_tokens.weight",
)  # fmt: skip
SHORT = ("rows' integers", "layer 0 heads")


class Stray(PlantedFault):
    """One number of a victim is another one, in every second step or so."""

    size: ClassVar[int] = 1
    dtype: ClassVar[torch.dtype] = torch.int64

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.victim = torch.zeros(self.size, dtype=self.dtype, device=table.platform.device)

    def aim(self, tensor: Tensor) -> None:
        """From now on that is the victim: replays of recorded graphs find it by its object."""
        assert tensor.is_contiguous()
        with torch.inference_mode():
            self.victim.set_(
                tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel(),), (1,)
            )

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        if self.is_last(named):
            total = self.extent(named).sum()
            place = (total * 7919 % self.size).view(1)
            value = self.victim[place]
            other = ~value if self.dtype == torch.bool else -1 - value
            hit = self.active & (total % 2 == 0)
            self.victim[place] = torch.where(hit, other.to(self.dtype), value)
        return result


@pytest.fixture(scope="module")
def model(tiny: TinyModels, platform: Platform) -> TinyModel:
    if platform.asynchronous:
        pytest.skip("graphs of this platform keep addresses, which nobody can aim afterwards")
    return tiny("qwen3_5")


@pytest.fixture(scope="module")
def oracle(model: TinyModel, device: str) -> Oracle:
    return make_oracle(model, device)


def regions(llm: LLM) -> dict[str, Tensor]:
    memory = llm.engine.runner.forward_pass.memory()
    return {name: each.tensor for name, each in memory.items()}


@pytest.fixture(scope="module")
def known(model: TinyModel, device: str) -> dict[str, tuple[int, torch.dtype]]:
    """Sizes and types of all that an engine lists, when it has served."""
    llm = make_llm(model, device, **OPTIONS, **DRAFTS)
    serve(llm, **ASKED)
    return {name: (each.numel(), each.dtype) for name, each in regions(llm).items()}


def test_all_of_it_is_named_here(known: dict[str, Any]) -> None:
    assert set(VICTIMS) <= set(known)


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[] if each in SHORT else pytest.mark.long) for each in VICTIMS],
)
def test_a_stray_write_gives_no_wrong_token(
    model: TinyModel, device: str, oracle: Oracle, known: dict[str, Any], monkeypatch: Any,
    name: str,
) -> None:  # fmt: skip
    size, dtype = known[name]
    fault = type("StrayHere", (Stray,), {"size": size, "dtype": dtype, "name": "stray"})
    with planted(monkeypatch, fault, "rotary_cache", active=False) as found:
        llm = make_llm(model, device, **OPTIONS, **DRAFTS, graph_mode="full",
                       graph_verify="canary:1")  # fmt: skip
    assert not llm.graph_report().quarantined
    asked = ASKED if name.startswith("sampler") else {}
    if asked:  # what it keeps for requests is made for the first of them
        serve(llm, **asked)
    found[0].aim(regions(llm)[name])
    found[0].active.fill_(True)
    assert wrong_tokens(serve(llm, **asked), oracle(**asked)) == 0
    assert llm.graph_report().canary_failures


def test_a_table_that_an_op_keeps(tiny: TinyModels, device: str, monkeypatch: Any) -> None:
    """What eight-bit codes stand for, which a processor looks up."""
    if device != "cpu":
        pytest.skip("others look up nothing")
    options = {**OPTIONS, "kv_cache_dtype": "fp8"}
    oracle = serve(make_llm(tiny("qwen3"), device, **options))
    fault = type("StrayCodes", (Stray,), {"size": 256, "dtype": torch.float32, "name": "stray"})
    with planted(monkeypatch, fault, "rotary_cache", active=False) as found:
        llm = make_llm(tiny("qwen3"), device, **options, graph_mode="breakable",
                       graph_verify="canary:1")  # fmt: skip
    (table,) = (each for each in found[0].table.memory.values() if each.shape == (256,))
    found[0].aim(table)
    found[0].active.fill_(True)
    assert wrong_tokens(serve(llm), oracle) == 0
    assert llm.graph_report().canary_failures


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        ("_behind", 4, torch.int32),
        pytest.param("_given", 12, torch.int64, marks=pytest.mark.long),
        pytest.param("_one_known", 4, torch.int32, marks=pytest.mark.long),
        pytest.param("_none_accepted", 4, torch.int32, marks=pytest.mark.long),
    ],
)
def test_what_a_draft_models_passes_read(
    tiny: TinyModels, device: str, platform: Platform, monkeypatch: Any, name: str, size: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """They would draft wrong from then on, eagerly too, and nobody would know why."""
    if platform.asynchronous:
        pytest.skip("graphs of this platform keep addresses, which nobody can aim afterwards")
    model = tiny("qwen3")
    drafts = {"method": "draft_model", "model": str(model.path), "num_speculative_tokens": 3}
    fault = type("StrayDraft", (Stray,), {"size": size, "dtype": dtype, "name": "stray"})
    with planted(monkeypatch, fault, "rotary_cache", active=False) as found:
        llm = make_llm(model, device, **OPTIONS, speculative_config=drafts, graph_mode="full",
                       graph_verify="canary:1")  # fmt: skip
    drafter: Any = llm.engine.runner.drafter
    victim = getattr(drafter.chain, name)
    before = victim.clone()
    found[0].aim(victim)
    found[0].active.fill_(True)
    serve(llm)
    assert torch.equal(victim, before)
    assert llm.graph_report().canary_failures


def test_ops_keep_no_tensors_in_their_modules() -> None:
    """What they keep is in ``op_memory``, where verification sees it: sums over memory alone have
    their factors elsewhere, and change if these do."""
    kept = []
    for module in pkgutil.walk_packages(reprise.ops.__path__, "reprise.ops."):
        try:
            found = vars(importlib.import_module(module.name))
        except ImportError:
            continue  # its compiler is not here
        for name, each in found.items():
            if isinstance(each, Tensor):
                kept.append(f"{module.name}.{name}")
            if hasattr(each, "cache_info") and inspect.unwrap(each).__module__ == module.name:
                returned = str(inspect.signature(each).return_annotation)
                if "Tensor" in returned:
                    kept.append(f"{module.name}.{name}")
    assert kept == ["reprise.ops.checksum.reference._kept_factors"]


@pytest.mark.long
def test_graphs_of_other_buckets(model: TinyModel, device: str, oracle: Oracle) -> None:
    """Two graphs change places behind start-up: each has other rows than its step."""
    llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify="canary:1")
    graphs = llm.engine.runner.graphs.bucket_graphs
    decode = [each for key, each in graphs.items() if key[0] == "decode"]
    decode[0].graph, decode[-1].graph = decode[-1].graph, decode[0].graph
    assert wrong_tokens(serve(llm), oracle()) == 0
    assert llm.graph_report().canary_failures
