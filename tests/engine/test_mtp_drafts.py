"""A hybrid's own layer drafts: how many tokens come of a step changes, and no token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from drafting import EXECUTORS, check_counters, rate
from helpers import TinyModel, TinyModels, copied_inputs, generate, make_llm, random_ids
from next_tokens import Oracle, quieten, with_layer
from planted import OPTIONS, serve

from reprise import LLM, SamplingParams
from reprise.cache import State
from reprise.errors import ConfigError, LoadError, ModelError
from reprise.layers import gated_delta

SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, seed=5, max_tokens=16)


@pytest.fixture(scope="module", autouse=True)
def short_checkpoints() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_delta, "STATE", State(16))
        yield


@pytest.fixture(scope="module")
def pair(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, Oracle]:
    """A model whose tokens follow from the one before them, mostly, and a layer that knows it."""
    fields = {"num_hidden_layers": 2, "full_attention_interval": 2, "tie_word_embeddings": False}
    root = tmp_path_factory.mktemp("mtp")
    target = TinyModel(tiny("qwen3_5", **fields).path).reference
    quieten(target, 0.004)
    target.save_pretrained(root / "target")
    return with_layer(root / "both", TinyModel(root / "target"), "qwen3_5", guesses=True)


def drafting(model: TinyModel, device: str, k: int, **options: Any) -> LLM:
    config = {"method": "mtp", "num_speculative_tokens": k}
    return make_llm(model, device, speculative_config=config, **{**OPTIONS, **options})


def answers(llm: LLM) -> list[list[list[int]]]:
    prompts = [random_ids(seed, 3 + 7 * seed) for seed in range(5)]
    return [serve(llm), generate(llm, prompts, SAMPLED)]


@pytest.fixture(scope="module")
def expected(pair: tuple[TinyModel, Oracle], device: str) -> list[list[list[int]]]:
    plain = make_llm(pair[0], device, **OPTIONS)
    return answers(plain)


@pytest.mark.parametrize(
    ("k", "executor"),
    [
        (1, "full"),
        (3, "breakable"),
        pytest.param(2, "eager", marks=pytest.mark.long),
        pytest.param(7, "eager", marks=pytest.mark.long),
    ],
)
def test_tokens_are_those_without_drafts(
    pair: tuple[TinyModel, Oracle], device: str, expected: list[Any],
    monkeypatch: pytest.MonkeyPatch, k: int, executor: str,
) -> None:  # fmt: skip
    """Chunks, prefix hits, padding and preemption, one step ahead."""
    copied_inputs(monkeypatch)
    llm = drafting(pair[0], device, k, **EXECUTORS[executor])
    llm.engine.pipeline.depth = 2
    assert answers(llm) == expected
    report = llm.graph_report()
    assert not report.quarantined
    owners = {each.owner for each in report.graphs}
    assert owners == (set() if executor == "eager" else {"", "draft prefill", "draft chain"})
    assert 0.1 < rate(llm) < 1


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), 3])
def test_what_counts_is_what_the_layer_drafts_on_paper(
    pair: tuple[TinyModel, Oracle], device: str, k: int
) -> None:
    model, oracle = pair
    llm = drafting(model, device, k, max_num_seqs=2, num_blocks=65)
    prompts = [random_ids(31, 9), random_ids(32, 40)]
    check_counters(llm, prompts, lambda text: oracle.drafts(text, k), accepted=10)


def test_what_has_no_such_layer_is_refused_by_name(
    tiny: TinyModels, pair: tuple[TinyModel, Oracle], device: str
) -> None:
    with pytest.raises(ModelError, match="no layer that drafts further tokens"):
        drafting(tiny("qwen3"), device, 1)
    with pytest.raises(LoadError, match=r"has no tensors of the layer .*\(mtp\.\*\)"):
        drafting(tiny("qwen3_5", num_hidden_layers=2, full_attention_interval=2), device, 1)
    config = {"method": "mtp", "num_speculative_tokens": 1, "model": "other"}
    with pytest.raises(ConfigError, match="model"):
        make_llm(pair[0], device, speculative_config=config)


def test_the_names_of_single_families_are_understood(
    pair: tuple[TinyModel, Oracle], device: str
) -> None:
    config = {"method": "qwen3_5_mtp", "num_speculative_tokens": 1}
    llm = make_llm(pair[0], device, speculative_config=config, load_format="dummy")
    assert "draft prefill" in dict(llm.engine.runner.owners)
