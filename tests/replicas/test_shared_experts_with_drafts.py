"""Replicas that share experts, with a model that drafts: one of its own on each replica, whose
passes wait for nobody, or a layer of the target's, whose experts are shared like the others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from draft_heads import write_head
from helpers import TinyModel, TinyModels, need_devices, random_ids
from next_streams import NextLayer
from test_shared_experts import (
    LENGTHS,
    MOST,
    OPTIONS,
    all_to,
    metric,
    random_steps,
    together,
    tokens,
)

from reprise import LLM
from reprise.errors import ConfigError

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

LEVELS = [[1, 2, 3], [3, 9, 1]]
"""How many tokens are drafted: of up to two requests, and of more. Replicas differ in it."""


@pytest.fixture(scope="module", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where logs of replicas go that are lost: they stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("replicas")))
        yield


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_ids(60 + number, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def drafting(
    tiny: TinyModels, device: str, tmp_path_factory: pytest.TempPathFactory,
    prompts: list[list[int]],
) -> Callable[[str], tuple[dict[str, Any], list[list[int]]]]:  # fmt: skip
    """By method: options, and the tokens that one engine without drafts gives."""
    need_devices(device, 2)
    root = tmp_path_factory.mktemp("drafts")
    known: dict[str, tuple[dict[str, Any], list[list[int]]]] = {}

    def model_of(method: str) -> tuple[TinyModel, dict[str, Any]]:
        if method == "mtp":
            return NextLayer(tiny, root / "mtp").model, {}
        model = tiny("qwen3_moe")
        if method == "eagle3":
            return model, {"model": str(write_head(root / "head", model, depths=(0, 1, 2)))}
        return model, {"model": str(tiny.near(model).path)}

    def find(method: str) -> tuple[dict[str, Any], list[list[int]]]:
        if method not in known:
            model, more = model_of(method)
            options = {**OPTIONS, "model": str(model.path), "device": device}
            with LLM(**options, graph_mode="none") as llm:
                expected = tokens(llm, prompts)
            asked = {
                "method": method, "num_speculative_tokens": 3,
                "num_speculative_tokens_per_batch_size": LEVELS, **more,
            }  # fmt: skip
            options |= {"speculative_config": asked, "graph_buckets": "decode=2,6;mixed=32"}
            known[method] = options, expected
        return known[method]

    return find


METHODS = ("draft_model", "eagle3", "mtp")


@pytest.mark.parametrize("executor", ["full", "breakable", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_same_tokens(
    drafting: Callable[..., Any], prompts: list[list[int]], method: str, executor: str
) -> None:
    options, expected = drafting(method)
    with together(options, graph_mode=executor) as llm:
        for busy in (0, 1):
            before = metric(llm, "lockstep_empty_steps")
            with all_to(llm._batch.replicas, busy):
                assert tokens(llm, prompts) == expected
            empty = metric(llm, "lockstep_empty_steps")
            assert empty[str(1 - busy)] > before[str(1 - busy)]
        for _ in range(2):
            assert tokens(llm, prompts * 2) == expected * 2
        drafts, report = llm.stats().drafts, llm.graph_report()
        assert drafts.drafted > MOST
        assert (drafts.accepted > 0) or method != "draft_model"
        assert not report.quarantined
        if executor != "none":
            owners = {each.owner for each in report.graphs if each.replays}
            assert owners >= {"", "draft chain"}


@pytest.mark.parametrize(
    ("method", "executor"), [("draft_model", "full"), ("eagle3", "breakable"), ("mtp", "full"),
                             ("mtp", "breakable"), ("mtp", "none")]
)  # fmt: skip
def test_random_steps(
    drafting: Callable[..., Any], prompts: list[list[int]], method: str, executor: str
) -> None:
    options, expected = drafting(method)
    random_steps({**options, "graph_mode": executor}, prompts, expected, 500)


def test_a_layer_that_drafts_on_two_ranks_each(
    drafting: Callable[..., Any], prompts: list[list[int]]
) -> None:
    options, expected = drafting("mtp")
    random_steps(
        {**options, "graph_mode": "full", "tensor_parallel_size": 2}, prompts, expected, 300
    )


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_models_that_several_ranks_do_not_share_are_refused(
    drafting: Callable[..., Any], method: str
) -> None:
    options, _ = drafting(method)
    with pytest.raises(ConfigError, match=f"method '{method}' with tensor_parallel_size=2"):
        together(options, tensor_parallel_size=2)
