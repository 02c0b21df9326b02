"""Steps whose tokens a grammar has followed, and whose results are lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TinyModels, assert_idle, make_llm, text_model, token_ids

from reprise import SamplingParams, StructuredOutputsParams
from reprise.graphs import Damage
from reprise.runner.drafts import CHAIN

pytest.importorskip("xgrammar")

PARAMS = [
    SamplingParams(
        temperature=0, max_tokens=24, structured_outputs=StructuredOutputsParams(regex=each)
    )
    for each in ("([a-h]{2} ){5}[0-9]{6}", "[0-9]{3}-[a-f]{3}-[0-9]{3}-[a-f]{3}")
]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize("at", [3, 8])
def test_a_grammar_goes_back_to_the_tokens_that_its_request_has(
    tiny: TinyModels, device: str, at: int
) -> None:
    model, draft = text_model(tiny, "qwen3"), text_model(tiny, "llama")
    options: dict[str, Any] = {"max_num_seqs": 4, "num_blocks": 64}
    expected = make_llm(model, device, **options).generate(PROMPTS, PARAMS, use_tqdm=False)
    llm = make_llm(
        model, device, graph_mode="full", graph_buckets="decode=2,4;mixed=32", **options,
        speculative_config={"method": "draft_model", "model": str(draft.path),
                            "num_speculative_tokens": 2},
    )  # fmt: skip
    llm.engine.pipeline.depth = 2
    chain = dict(llm.engine.runner.owners)[CHAIN]
    chain.ledger.trusts = lambda *asked: True  # type: ignore[method-assign]
    count = 0

    def failing(replay: Any) -> Any:
        def call() -> None:
            nonlocal count
            replay()
            count += 1
            if count == at:
                raise RuntimeError("launch failed")

        return call

    for bucket in chain.bucket_graphs.values():
        bucket.graph.replay = failing(bucket.graph.replay)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert count >= at
    assert token_ids(outputs) == token_ids(expected)
    assert_idle(llm)


def test_masks_that_a_graph_may_have_spoiled_are_sent_again(tiny: TinyModels, device: str) -> None:
    llm = make_llm(text_model(tiny, "qwen3"), device, num_blocks=64, graph_mode="full",
                   graph_buckets="decode=2;mixed=32")  # fmt: skip
    params = replace(PARAMS[0], structured_outputs=StructuredOutputsParams(regex="[ab]*c"))
    (expected,) = token_ids(llm.generate(PROMPTS[:1], params, use_tqdm=False))
    engine = llm.engine
    engine.pipeline.depth = 1
    group = engine.add("again", PROMPTS[0], params)
    request = group.completions[0].request
    while request.num_output_tokens < 6:
        engine.step()
    kept = engine.grammars._masks.num_kept
    with torch.inference_mode():
        engine.runner.sampler._words._words.fill_(-1)
    target = next(iter(engine.runner.graphs.bucket_graphs))
    engine._recovery._heed("target", Damage(target, "decode[2]", frozenset(), True, frozenset()))
    while engine.has_work:
        engine.step()
    assert engine.grammars._masks.num_kept > kept
    assert list(request.output_token_ids) == expected
