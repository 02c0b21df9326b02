"""How many tokens each expert gets, as metrics tell it."""

from __future__ import annotations

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids

from reprise import LLM
from reprise.errors import ConfigError
from reprise.graphs.segments import SegmentedGraph
from reprise.server.facts import Emissions, metric_facts

PROMPTS = [random_ids(seed, 4 + 9 * seed) for seed in range(3)]


def counts(llm: LLM) -> dict[tuple[str, str], int]:
    """By layer and expert."""
    return {
        (each.labels["layer"], each.labels["expert"]): each.value  # type: ignore[attr-defined]
        for each in llm.get_metrics()
        if each.name == "reprise:expert_tokens"
    }


def routed(model: TinyModel, texts: list[list[int]]) -> dict[tuple[str, str], int]:
    """What transformers' router does with all tokens of the texts but the last ones."""
    found: dict[tuple[str, str], int] = {}
    config = model.reference.config
    for text in texts:
        with torch.no_grad():
            logits = model.reference(
                torch.tensor([text[:-1]]), output_router_logits=True
            ).router_logits
        for layer, rows in enumerate(logits):
            chosen = rows.view(-1, config.num_experts).topk(config.num_experts_per_tok).indices
            for expert, count in enumerate(chosen.flatten().bincount(minlength=8).tolist()):
                key = str(layer), str(expert)
                found[key] = found.get(key, 0) + count
    return found


@pytest.mark.parametrize(
    ("executor", "verify"), [("none", "off"), ("full", "canary:1"), ("breakable", "startup")]
)
def test_each_token_counts_once_in_each_layer(
    tiny: TinyModels, device: str, executor: str, verify: str
) -> None:
    """Padding does not, nor what graphs are proven on and compared with."""
    model = tiny("qwen3_moe")
    llm = make_llm(
        model, device, graph_mode=executor, graph_verify=verify, count_expert_load=True,
        graph_buckets="decode=4;mixed=64", enable_prefix_caching=False,
    )  # fmt: skip
    assert set(counts(llm).values()) == {0}
    outputs = generate(llm, PROMPTS, greedy(6))
    texts = [[*prompt, *output] for prompt, output in zip(PROMPTS, outputs, strict=True)]
    assert counts(llm) == routed(model, texts)
    told = metric_facts(
        llm.engine.config, Emissions(), [llm.stats()], [llm.get_metrics()], [llm.graph_report()]
    )
    names = {name for _, name, *_ in told}
    assert {"reprise:expert_tokens", "vllm:generation_tokens"} <= names, "vLLM has no such metric"
    assert llm.graph_report().quarantined == []


def test_a_model_without_experts_has_nothing_to_count(tiny: TinyModels, device: str) -> None:
    with pytest.raises(ConfigError, match="the model has no experts; leave it out"):
        make_llm(tiny("qwen3"), device, count_expert_load=True)


def test_nothing_is_counted_unless_it_is_asked_for(tiny: TinyModels, device: str) -> None:
    assert counts(make_llm(tiny("qwen3_moe"), device)) == {}


def test_a_replay_that_raises_takes_no_count_back(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They became what the probes of the start had counted."""
    llm = make_llm(
        tiny("qwen3_moe"), device, graph_mode="full", count_expert_load=True,
        graph_buckets="decode=4;mixed=64", enable_prefix_caching=False,
    )  # fmt: skip
    for _ in range(3):
        expected = generate(llm, PROMPTS, greedy(40))
    before = counts(llm)
    replay, failed = SegmentedGraph.replay, []

    def fail(self: SegmentedGraph) -> None:
        replay(self)
        if not failed:
            failed.append(True)
            raise RuntimeError("once")

    monkeypatch.setattr(SegmentedGraph, "replay", fail)
    assert generate(llm, PROMPTS, greedy(40)) == expected
    assert failed
    assert all(count >= before[key] for key, count in counts(llm).items())
    assert sum(counts(llm).values()) > sum(before.values())
