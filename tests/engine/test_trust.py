"""No wrong token: what is planted in graphs, against what trust and canaries promise."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from planted import (
    OPTIONS,
    PLACES,
    Oracle,
    in_turn,
    lend_counts,
    make_oracle,
    planted,
    product,
    serve,
    wrong_tokens,
)  # fmt: skip

from reprise.graphs import compiled, guard
from reprise.graphs.canary import CanaryPolicy
from reprise.ops.registry import all_ops
from reprise.platforms import Platform
from reprise.runner.probes import ProbeMaker
from reprise.testing import faults

MEMORY = (
    "cache_overrun", "padding_writes_live", "changed_tables", "changed_lengths", "changed_weight",
    "changed_beside",
)  # fmt: skip
KINDS = (
    "wrong_neighbours", "wrong_fresh_prompt", "wrong_large_request", "wrong_prefix_hit",
    "wrong_three_of_four", "wrong_upper_half", "wrong_padded", "wrong_beside_decodes",
)  # fmt: skip
PENALTIES = {"frequency_penalty": 0.5, "presence_penalty": 0.5}


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def oracle(model: TinyModel, device: str) -> Oracle:
    return make_oracle(model, device)


def place_of(fault: str, place: str, platform: Platform) -> tuple[str, str]:
    op, executor = PLACES[place]
    reason = faults.FAULTS[fault].inexpressible(all_ops()[op], executor, platform)
    if executor == "compiled":
        reason = reason or platform.compiler_missing()
    if reason is not None:
        pytest.skip(reason)
    return op, executor


@pytest.mark.parametrize(
    ("fault", "place", "begins"), product(MEMORY, list(PLACES), ["at once", "later"])
)
def test_spoiled_memory_gives_no_wrong_token(
    model: TinyModel, device: str, platform: Platform, oracle: Oracle, monkeypatch: Any,
    caplog: pytest.LogCaptureFixture, fault: str, place: str, begins: str,
) -> None:  # fmt: skip
    op, executor = place_of(fault, place, platform)
    params = PENALTIES if fault == "changed_beside" else {}
    with (
        planted(monkeypatch, faults.FAULTS[fault], op, active=begins == "at once") as found,
        caplog.at_level(logging.WARNING),
    ):
        llm = make_llm(
            model, device, **OPTIONS, graph_mode=f"decode={executor},mixed={executor}",
            graph_verify="canary:1",
        )  # fmt: skip
        (broken,) = found
        if fault == "changed_beside":
            lend_counts(llm, broken.victim)
        if begins == "later":
            assert not llm.graph_report().quarantined
            broken.active.fill_(True)
        assert wrong_tokens(serve(llm, **params), oracle(**params)) == 0
    report = llm.graph_report()
    assert report.quarantined
    if begins == "later":
        assert report.canary_failures
    told = " ".join(each.quarantined for each in report.quarantined)
    assert f"{op} #" in told or "which is not its own" in told or "nothing may change" in told


@pytest.mark.parametrize(
    ("fault", "place", "verify", "start"),
    product(
        KINDS, list(PLACES), ["startup", "auto"],
        ["all probes", "one probe, live canaries", "one probe, eager steps"],
    ),
)  # fmt: skip
def test_kinds_of_steps_that_are_wrong_are_never_replayed(
    model: TinyModel, device: str, platform: Platform, oracle: Oracle, monkeypatch: Any,
    fault: str, place: str, verify: str, start: str,
) -> None:  # fmt: skip
    """Start-up meets them; if it does not, live steps of kinds it has not met are compared, or run
    eagerly."""
    op, executor = place_of(fault, place, platform)
    if start != "all probes":
        probes = ProbeMaker.probes
        monkeypatch.setattr(ProbeMaker, "probes", lambda *args: probes(*args)[:1])
        affordable = start.endswith("live canaries")
        monkeypatch.setattr(CanaryPolicy, "may_meet", lambda self, bucket: affordable)
    with planted(monkeypatch, faults.FAULTS[fault], op):
        llm = make_llm(model, device, **OPTIONS, graph_mode=executor, graph_verify=verify)
        assert wrong_tokens(serve(llm), oracle()) == 0
    report = llm.graph_report()
    if start != "one probe, eager steps":
        assert report.quarantined, "the fault was met"


@pytest.mark.parametrize(
    ("fault", "place"),
    product(("wrong_values", "wrong_positions", "wrong_every_second"), list(PLACES)),
)
def test_what_only_each_replay_shows(
    model: TinyModel, device: str, platform: Platform, oracle: Oracle, monkeypatch: Any,
    fault: str, place: str,
) -> None:  # fmt: skip
    op, executor = place_of(fault, place, platform)
    with planted(monkeypatch, faults.FAULTS[fault], op, active=False) as found:
        llm = make_llm(model, device, **OPTIONS, graph_mode=executor, graph_verify="canary:1")
        found[0].active.fill_(True)
        assert wrong_tokens(serve(llm), oracle()) == 0
    assert llm.graph_report().canary_failures


@pytest.mark.parametrize(
    ("harm", "verify"),
    [
        ("one percent", "startup"),
        ("a constant", "canary:1"),
        pytest.param("one percent", "canary:1", marks=pytest.mark.long),
        pytest.param("a constant", "startup", marks=pytest.mark.long),
    ],
)
def test_a_compiler_that_changes_the_model_is_found_out(
    model: TinyModel, device: str, platform: Platform, oracle: Oracle, monkeypatch: Any,
    harm: str, verify: str,
) -> None:  # fmt: skip
    """Compiled code is compared with the model as written, not with itself run eagerly."""
    reason = platform.compiler_missing()
    if reason is not None:
        pytest.skip(reason)
    compile_piece = compiled._compile

    def changed(piece: Any, examples: Any) -> Any:
        function = compile_piece(piece, examples)

        def call(*args: Any) -> Any:
            results = function(*args)
            for each in results if isinstance(results, tuple | list) else [results]:
                if harm == "one percent":
                    each.mul_(1.01)
                else:
                    each.add_(0.125)
            return results

        return call

    monkeypatch.setattr(compiled, "_compile", changed)
    llm = make_llm(model, device, **OPTIONS, graph_mode="compiled", graph_verify=verify)
    assert wrong_tokens(serve(llm), oracle()) == 0
    assert all(each.quarantined for each in llm.graph_report().graphs)


@pytest.mark.parametrize(("fault", "place"), in_turn(MEMORY, list(PLACES)))
def test_what_unseen_replays_have_spoiled_is_made_good(
    model: TinyModel, device: str, platform: Platform, oracle: Oracle, monkeypatch: Any,
    fault: str, place: str,
) -> None:  # fmt: skip
    """With fewer canaries some tokens are wrong until a graph is found out; none is later."""
    op, executor = place_of(fault, place, platform)
    params = PENALTIES if fault == "changed_beside" else {}
    monkeypatch.setattr(guard, "PARTS", 2)  # all weights are soon looked at
    with planted(monkeypatch, faults.FAULTS[fault], op, active=False) as found:
        llm = make_llm(
            model, device, **OPTIONS, graph_mode=executor, graph_verify="canary:3"
        )  # fmt: skip
    (broken,) = found
    if fault == "changed_beside":
        lend_counts(llm, broken.victim)
    broken.active.fill_(True)
    serve(llm, **params)
    broken.active.fill_(False)
    assert llm.graph_report().canary_failures
    serve(llm, **params)
    assert wrong_tokens(serve(llm, **params), oracle(**params)) == 0


@pytest.mark.parametrize("fault", ["stale_pointer", "stale_plan", "uncleared_scratch"])
def test_what_faults_keep_is_there_for_layers_that_no_rehearsal_computes(
    tiny: TinyModels, device: str, platform: Platform, monkeypatch: Any, fault: str
) -> None:
    """A capture that fails would be no proof that verification finds the fault."""
    kind = faults.FAULTS[fault]
    if kind.inexpressible(all_ops()["rotary_cache"], "full", platform) is not None:
        pytest.skip("graphs cannot be whole here")
    with planted(monkeypatch, kind, "rotary_cache"):
        model = tiny("qwen3", num_hidden_layers=5)
        llm = make_llm(model, device, **OPTIONS, graph_mode="decode=full,mixed=none")
    reasons = [each.quarantined for each in llm.graph_report().quarantined]
    assert any("rotary_cache #" in each for each in reasons), reasons
    assert not any("capture failed" in each for each in reasons), reasons


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_the_search_for_the_op_writes_nothing_that_the_graph_is_blamed_for(
    tiny: TinyModels, device: str, monkeypatch: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """It begins with a step of padding alone, which writes null blocks; live steps have none."""
    with (
        planted(
            monkeypatch, faults.FAULTS["wrong_every_second"], "paged_attention", False
        ) as found,
        caplog.at_level(logging.WARNING),
    ):
        llm = make_llm(
            tiny(name), device, **OPTIONS, graph_mode="decode=full,mixed=none",
            graph_verify="canary:1",
        )  # fmt: skip
        found[0].active.fill_(True)
        null = [
            tensor[0]
            for cache in llm.engine.runner.model.caches().values()
            for tensor in cache.tensors.values()
        ]
        with torch.inference_mode():
            for each in null:
                each.fill_(torch.nan)
        tokens = generate(llm, [random_ids(5, 20)], greedy(8))
    (graph,) = llm.graph_report().quarantined
    assert "paged_attention #" in graph.quarantined
    assert "did not own" not in caplog.text
    assert all(each.isnan().all() for each in null)
    assert tokens == generate(make_llm(tiny(name), device), [random_ids(5, 20)], greedy(8))
