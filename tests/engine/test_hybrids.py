"""Models of linear and full attention through the engine: the tokens are those of transformers,
however requests are cut, shared, interrupted and captured."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers import (
    HYBRIDS,
    TinyModel,
    TinyModels,
    assert_idle,
    generate,
    greedy,
    make_llm,
    random_ids,
    recorded_logits,
    token_ids,
)
from planted import planted

from reprise import LLM
from reprise.testing import faults

STEPS = 8
CHUNK = 64
"""A state is copied behind multiples of so many tokens while a request goes on."""
BLOCK = 16
"""And of its prompt behind any block that no chunk is shorter than."""
SHARED = random_ids(70, CHUNK)
PROMPTS = [
    random_ids(71, 1), [*SHARED, *random_ids(72, 7)], random_ids(73, CHUNK),
    [*SHARED, *random_ids(74, 30)], random_ids(75, 2), random_ids(76, 70),
]  # fmt: skip
CUTS = (1, 2, 3, 5, 63, 64, 65, 70)
BUCKETS = {"graph_buckets": "decode=2,8;mixed=64", "max_num_batched_tokens": 64}


class Known:
    """What transformers generates, by model."""

    def __init__(self, tiny: TinyModels, device: str) -> None:
        self._tiny, self._device = tiny, device
        self._tokens: dict[str, list[list[int]]] = {}

    def model(self, name: str) -> TinyModel:
        return self._tiny(name, seed=1)

    def tokens(self, name: str) -> list[list[int]]:
        if name not in self._tokens:
            model = self.model(name)
            llm = make_llm(model, self._device, enable_prefix_caching=False)
            found = [generate(llm, [prompt], greedy(STEPS))[0] for prompt in PROMPTS]
            for prompt, output in zip(PROMPTS, found, strict=True):
                assert model.is_greedy(prompt, output)
            self._tokens[name] = found
        return self._tokens[name]


@pytest.fixture(scope="module")
def known(tiny: TinyModels, device: str) -> Known:
    return Known(tiny, device)


def poison(llm: LLM, *, states_alone: bool = False) -> None:
    """All that the pools hold, the null blocks too, becomes NaN."""
    with torch.inference_mode():
        for cache in llm.engine.runner.model.caches().values():
            if cache.lifetime.rewritten or not states_alone:
                for each in cache.tensors.values():
                    each.fill_(torch.nan)


def check(known: Known, name: str, device: str, **options: Any) -> LLM:
    """One step ahead, over poisoned memory, twice: the second time behind what the first kept."""
    llm = make_llm(known.model(name), device, **{"num_blocks": 129, **options})
    llm.engine.pipeline.depth = 2
    poison(llm)
    for _ in range(2):
        assert generate(llm, PROMPTS, greedy(STEPS)) == known.tokens(name)
    report = llm.graph_report()
    assert not report.quarantined
    assert not report.canary_failures
    for cache in llm.engine.runner.model.caches().values():
        if cache.lifetime.rewritten:
            assert all(each[0].isnan().all() for each in cache.tensors.values())
    return llm


def long_but(*wanted: tuple[str, Any], values: Any) -> list[Any]:
    """All models with all values; in short runs these alone."""
    return [
        pytest.param(name, value, marks=[] if (name, value) in wanted else [pytest.mark.long])
        for name in HYBRIDS
        for value in values
    ]


@pytest.mark.long
@pytest.mark.parametrize("executor", ["none", "full", "breakable", "compiled"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_logits_are_those_of_transformers(
    tiny: TinyModels, device: str, name: str, executor: str
) -> None:
    """With weights of one size; with others transformers may itself be further from float64 (up to
    3.5e-4 of logits of 4), which is why other tests ask how far it is."""
    model = tiny(name, seed=1, std=0.08)
    llm = make_llm(
        model, device, graph_mode=executor, graph_buckets="decode=2,4;mixed=64,256",
        graph_verify="startup",
    )  # fmt: skip
    prompts = [random_ids(1, 1), random_ids(2, 100), random_ids(3, 17), random_ids(4, 70)]
    with recorded_logits(llm) as seen:
        outputs = generate(llm, prompts, greedy(64))
    for number, prompt, output in zip(sorted(seen, key=int), prompts, outputs, strict=True):
        expected = model.logits([*prompt, *output])[len(prompt) - 1 : -1]
        found = torch.stack(seen[number][:64])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        assert model.is_greedy(prompt, output)
    graphs = llm.graph_report().graphs
    assert [each.name for each in graphs if each.quarantined is not None] == []


@pytest.mark.parametrize(
    ("name", "cut"),
    long_but(("qwen3_5", 63), values=CUTS),
)
def test_any_chunks_give_the_same_tokens(known: Known, device: str, name: str, cut: int) -> None:
    check(known, name, device, max_num_seqs=min(cut, 8), max_num_batched_tokens=cut)


@pytest.mark.parametrize(
    ("name", "mode"),
    long_but(
        ("qwen3_next", "full"), ("qwen3_5", "breakable"),
        values=("full", "breakable", "compiled"),
    ),
)  # fmt: skip
def test_graphs_compute_the_same(known: Known, device: str, name: str, mode: str) -> None:
    llm = check(known, name, device, graph_mode=mode, graph_verify="canary:1", **BUCKETS)
    assert any(each.replays for each in llm.graph_report().graphs)


def test_a_prompt_of_one_token_does_not_go_on_from_its_slot(known: Known, device: str) -> None:
    """Nor does one whose length is that of a decode, in a graph."""
    model = known.model("qwen3_5")
    llm = make_llm(model, device, max_num_seqs=1, graph_mode="full", **BUCKETS)
    for prompt, expected in zip(PROMPTS, known.tokens("qwen3_5"), strict=True):
        if len(prompt) <= 2:
            poison(llm)
            assert generate(llm, [prompt], greedy(STEPS)) == [expected]


@pytest.mark.parametrize(
    ("name", "step"),
    [("qwen3_5", 80), *(pytest.param(name, BLOCK, marks=pytest.mark.long)
                        for name in ("qwen3_5", "qwen3_next"))],
)  # fmt: skip
def test_a_prefix_hits_at_every_block(known: Known, device: str, name: str, step: int) -> None:
    """From the first chunk on, and wherever the prompts part."""
    model = known.model(name)
    text = random_ids(80, 330)
    llm = make_llm(model, device, num_blocks=257, max_num_seqs=8)
    alone = make_llm(model, device, enable_prefix_caching=False)
    generate(llm, [text], greedy(1))
    for shared in range(CHUNK, 321, step):
        # Its last checkpoint is where this prompt's is.
        generate(llm, [text[: shared + 1]], greedy(1))
        prompt = [*text[:shared], *random_ids(shared, 20)]
        (output,) = llm.generate([prompt], greedy(4), use_tqdm=False)
        assert output.metrics.num_cached_tokens == shared
        assert token_ids([output]) == generate(alone, [prompt], greedy(4))


def test_a_state_that_is_no_number_is_offered_to_nobody(known: Known, device: str) -> None:
    """One request whose state goes wrong does not spoil those that begin as it did."""
    prompt = PROMPTS[1]
    llm = make_llm(known.model("qwen3_5"), device, max_num_seqs=2)
    inner = llm.engine
    inner.add("spoilt", prompt, greedy(STEPS))
    inner.step()  # up to the place where its state is to be kept
    poison(llm, states_alone=True)
    while inner.has_work:
        inner.step()
    for cached in (0, CHUNK):
        (output,) = llm.generate([prompt], greedy(STEPS), use_tqdm=False)
        assert token_ids([output]) == [known.tokens("qwen3_5")[1]]
        assert output.metrics.num_cached_tokens == cached


def test_a_prompt_of_a_hundred_tokens_hits(known: Known, device: str) -> None:
    """Where an engine whose states have blocks of their own size would find nothing."""
    llm = make_llm(known.model("qwen3_next"), device)
    prompt = random_ids(81, 100)
    for cached in (0, 96):
        (output,) = llm.generate([prompt], greedy(2), use_tqdm=False)
        assert output.metrics.num_cached_tokens == cached


def test_the_third_who_shares_a_beginning_goes_on_behind_it(known: Known, device: str) -> None:
    """The first one's states were copied elsewhere; the second one shows where they are wanted."""
    llm = make_llm(known.model("qwen3_5"), device)
    alone = make_llm(known.model("qwen3_5"), device, enable_prefix_caching=False)
    shared = random_ids(82, 100)
    for number, cached in enumerate((0, 0, 96, 96)):
        prompt = [*shared, *random_ids(83 + number, 60)]
        (output,) = llm.generate([prompt], greedy(2), use_tqdm=False)
        assert output.metrics.num_cached_tokens == cached
        assert token_ids([output]) == generate(alone, [prompt], greedy(2))


def test_short_prompts_are_computed_at_once(known: Known, device: str) -> None:
    """They are computed again in less than a step more would take."""
    llm = make_llm(known.model("qwen3_5"), device)
    for _ in range(2):
        before = llm.stats().scheduler.total_steps
        (output,) = llm.generate([random_ids(84, CHUNK)], greedy(1), use_tqdm=False)
        assert output.metrics.num_cached_tokens == 0
        assert llm.stats().scheduler.total_steps == before + 1


@pytest.mark.parametrize(
    "name", ["qwen3_5_moe", pytest.param("qwen3_next", marks=pytest.mark.long)]
)
def test_preempted_requests_begin_anew(known: Known, device: str, name: str) -> None:
    llm = make_llm(known.model(name), device, num_blocks=18, max_model_len=192, block_size=16)
    outputs = llm.generate(PROMPTS, greedy(STEPS), use_tqdm=False)
    assert token_ids(outputs) == known.tokens(name)
    assert sum(each.metrics.num_preemptions for each in outputs) > 0


FAULTS = [
    pytest.param(
        fault, op, marks=[pytest.mark.long] if (op == "causal_conv") == (number == 1) else []
    )
    for number, fault in enumerate(("state_not_zeroed", "state_twice", "state_of_another"))
    for op in ("causal_conv", "gated_delta")
]


@pytest.mark.parametrize(("fault", "op"), FAULTS)
def test_a_graph_that_is_wrong_about_states_is_refused(
    known: Known, device: str, monkeypatch: pytest.MonkeyPatch, fault: str, op: str
) -> None:
    """A stale slot, a double commit, another request's slot; of the window, too."""
    with planted(monkeypatch, faults.FAULTS[fault], op):
        llm = make_llm(known.model("qwen3_5"), device, graph_mode="full", **BUCKETS)
        assert generate(llm, PROMPTS, greedy(STEPS)) == known.tokens("qwen3_5")
    report = llm.graph_report()
    assert report.quarantined
    assert f"{op} #" in " ".join(each.quarantined for each in report.quarantined)


def test_bfloat16_is_near_float32(known: Known, device: str) -> None:
    """Of a model that small, whose states stay in float32, most tokens are the same."""
    found = generate(
        make_llm(known.model("qwen3_5"), device, dtype="bfloat16"), PROMPTS, greedy(STEPS)
    )
    first = [tokens[0] for tokens in found]
    expected = [tokens[0] for tokens in known.tokens("qwen3_5")]
    assert sum(a == b for a, b in zip(first, expected, strict=True)) >= len(PROMPTS) - 2


def test_pools_and_requests_at_once_are_told_at_start(
    known: Known, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        llm = make_llm(known.model("qwen3_5"), device, num_blocks=None, max_num_seqs=4,
                       kv_cache_memory_bytes=1 << 18)  # fmt: skip
    told = "\n".join(each.message for each in caplog.records)
    kept, slots = llm.engine.runner.cache_layout.pools
    assert f"KV cache: {kept.num_blocks} blocks of 16 tokens (kept)" in told
    assert f"KV cache: {slots.num_blocks} blocks of {BLOCK} tokens (state)" in told
    assert f"requests at once: at most {min(kept.num_blocks, slots.num_blocks) - 1} of one" in told


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize(
    "count", [60, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_many_requests_leave_nothing(
    tiny: TinyModels, device: str, count: int, drafts: int
) -> None:
    """Of all lengths, some of them given up, in pools so small that others have to give way."""
    model = tiny("qwen3_5", num_hidden_layers=2, full_attention_interval=2, hidden_size=32)
    config = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2,
              "prompt_lookup_min": 1}  # fmt: skip
    llm = make_llm(
        model, device, num_blocks=34, max_num_seqs=6, max_num_batched_tokens=96,
        speculative_config=config if drafts else None,
    )  # fmt: skip
    inner = llm.engine
    inner.pipeline.depth = 2
    generator = random.Random(5)
    groups, waiting = [], count
    while waiting or inner.has_work:
        while waiting and len(groups) < 12:
            number = count - waiting
            prompt = random_ids(number % 7, generator.choice((1, 2, 30, 64, 65, 130, 200)))
            groups.append(inner.add(f"{number}", prompt, greedy(generator.randint(1, 40))))
            waiting -= 1
        inner.step()
        if generator.random() < 0.1:
            inner.abort([f"{generator.randrange(count - waiting)}"])
        groups = [each for each in groups if not each.output().finished]
    assert_idle(llm)
    cache = inner.scheduler.cache
    assert all(pool.num_used == pool.num_claimed == 0 for pool in cache.pools)
    assert llm.stats().scheduler.total_preemptions > 0
