"""Two replicas give what one engine gives, and say what each of them did."""

from __future__ import annotations

import enum
import re
import threading
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import pytest
import torch

from reprise import LLM, SamplingParams, StructuredOutputsParams
from reprise.errors import (
    CapacityError,
    ConfigError,
    LoadError,
    PlatformError,
    RequestError,
)
from reprise.metrics import Counter

TEXTS = ["Once upon a time", "47 + 38 =", "A cat and a dog went", "The", "One day"]


def facts(llm: LLM, prompts: Any, params: Any, **others: Any) -> list[Any]:
    """All that a caller gets but times and names."""
    return [
        (
            each.prompt, each.prompt_token_ids, each.finished, each.outputs,
            each.prompt_logprobs and [one and dict(one) for one in each.prompt_logprobs],
        )
        for each in llm.generate(prompts, params, **others)
    ]  # fmt: skip


NEAR = 1e-4
"""Of log probabilities that rounding may make different."""

REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 20},
    {"temperature": 0.9, "seed": 7, "max_tokens": 12},
    {"temperature": 1.0, "max_tokens": 9, "n": 3},  # no seed: the engine's, and its number
    {"temperature": 0.8, "max_tokens": 9, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0, "max_tokens": 30, "stop": ["a"], "bad_words": ["was"]},
    {"temperature": 0.7, "max_tokens": 8, "repetition_penalty": 1.2, "min_p": 0.1},
    {"temperature": 0, "max_tokens": 5, "logprobs": -1},
    {"temperature": 0, "max_tokens": 6, "truncate_prompt_tokens": 2},
    {"temperature": 1.0, "max_tokens": 7, "detokenize": False},
]


class Token(enum.IntEnum):
    A = 67
    B = 68


class Text(str):
    pass


class Whole(int):
    pass


class Params(SamplingParams):
    pass


class Wanted(StructuredOutputsParams):
    pass


class Place:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_classes_of_the_program_stay_in_it(one: LLM, pair: LLM, tmp_path: Path) -> None:
    """A replica could not read one, and would end with all its requests."""
    odd = SamplingParams(temperature=0, max_tokens=Whole(5), seed=Whole(3), stop=Text("zz"))
    vars(odd)["note"] = lambda: None
    params = [
        odd,
        Params(temperature=0, max_tokens=5, stop_token_ids=[Token.B], logit_bias={Token.A: 1}),
        SamplingParams(
            temperature=0, bad_words=[Text("q")], structured_outputs=Wanted(choice=["a"])
        ),
        SamplingParams(structured_outputs=StructuredOutputsParams(regex=Text("ab"))),
    ]
    prompts = [[Token.A, Token.B], Text("The"), {"prompt": "a", "cache_salt": Text("s")}, "b"]
    urgent = [Token.A, Whole(2), 3, Whole(1)]
    got = facts(pair, prompts, params, priority=urgent)
    assert got == facts(one, prompts, params, priority=urgent)
    with pytest.raises(RequestError, match="priority="):
        pair.generate(["a", "b"], priority=[1, Place(tmp_path)])  # type: ignore[list-item]
    pair.start_profile(Place(tmp_path))
    assert pair.stop_profile() == tmp_path


def test_all_that_requests_ask_for(one: LLM, pair: LLM) -> None:
    prompts = [TEXTS[each % len(TEXTS)] for each in range(len(REQUESTS))]
    priority = [each % 3 for each in range(len(REQUESTS))]
    params = [SamplingParams(**each) for each in REQUESTS]
    for _ in range(2):  # the second time their prefixes are cached
        got = facts(pair, prompts, params, priority=priority)
        for found, expected in zip(
            got, facts(one, prompts, params, priority=priority), strict=True
        ):
            for name, mine, its in zip("ptfolx", found, expected, strict=False):
                if name != "o":
                    assert mine == its
            for mine, its in zip(found[3], expected[3], strict=True):
                assert (mine.token_ids, mine.text) == (its.token_ids, its.text)
                assert (mine.finish_reason, mine.stop_reason) == (
                    its.finish_reason,
                    its.stop_reason,
                )
                assert (mine.logprobs is None) == (its.logprobs is None)
                for a, b in zip(mine.logprobs or (), its.logprobs or (), strict=True):
                    assert set(a) == set(b)
                    known = sorted(each.logprob for each in b.values())
                    for x, y in ((a[token], b[token]) for token in a):
                        # Batches of other sizes round otherwise: those as likely may change places.
                        assert x.logprob == pytest.approx(y.logprob, abs=NEAR)
                        near = bisect_right(known, y.logprob + NEAR)
                        near -= bisect_left(known, y.logprob - NEAR)
                        assert abs(x.rank - y.rank) < near
                        assert x.decoded_token == y.decoded_token
    assert pair.stats().scheduler.total_steps > 0
    used = [each.scheduler.total_steps for each in pair.stats().replicas]
    assert min(used) > 0
    report = pair.graph_report()
    assert [each.replays > 0 for each in report.replicas] == [True, True]
    assert report.replays == sum(each.replays for each in report.replicas)
    assert not report.quarantined
    assert all(each.executor == "full" for each in report.graphs)


def test_shared_prefixes_are_computed_once(pair: LLM) -> None:
    """Conversations side by side, turn by turn: each stays where its blocks are."""
    pair.reset_prefix_cache()
    base = torch.Generator().manual_seed(3)
    talks = [torch.randint(5, 100, (50,), generator=base).tolist() for _ in range(4)]
    before = pair.stats()
    greedy = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
    known = 0
    for turn in range(3):
        outputs = pair.generate([{"prompt_token_ids": each} for each in talks], greedy)
        if turn:
            # All full blocks of prompt and answer, but for the last token, which was not computed.
            assert [each.num_cached_tokens for each in outputs] == [known] * len(talks)
        talks = [
            [*talk, *each.outputs[0].token_ids, 7, 8, 9]
            for talk, each in zip(talks, outputs, strict=True)
        ]
        known = (len(talks[0]) - 4) // 16 * 16
    after = pair.stats()
    hits = [
        late.scheduler.total_prefix_hits - early.scheduler.total_prefix_hits
        for late, early in zip(after.replicas, before.replicas, strict=True)
    ]
    assert sum(hits) == 4 * (48 + 80)
    assert min(hits) > 0, "two talks on each"
    pair.reset_prefix_cache()
    assert pair.generate([{"prompt_token_ids": talks[0]}], greedy)[0].num_cached_tokens == 0


def test_metrics_of_each_and_of_all(pair: LLM) -> None:
    stats = pair.stats()
    metrics = pair.get_metrics()
    for name, of in (
        ("reprise:generation_tokens", "total_generated_tokens"),
        ("reprise:prompt_tokens", "total_prompt_tokens"),
    ):
        found = {
            each.labels["engine"]: each.value
            for each in metrics
            if isinstance(each, Counter) and each.name == name
        }
        expected = [getattr(each.scheduler, of) for each in stats.replicas]
        assert found == {str(index): value for index, value in enumerate(expected)}
        assert getattr(stats.scheduler, of) == sum(expected)


def test_what_is_refused_harms_nobody(one: LLM, pair: LLM) -> None:
    good = SamplingParams(temperature=0, max_tokens=4)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (["ok", [10**9]], good, RequestError, "vocabulary"),
        ([[5] * 5000, "ok"], good, CapacityError, "5000 tokens"),
        # Known to a replica alone: there token 0 ends a text.
        (
            ["ok", "no"],
            [good, SamplingParams(allowed_token_ids=[0], min_tokens=2)],
            RequestError,
            "allowed",
        ),
        (["ok", "no"], [good, SamplingParams(stop_token_ids=[10**8])], RequestError, "stop_token"),
    ]
    for prompts, params, kind, text in cases:
        for llm in (one, pair):
            with pytest.raises(kind, match=text):
                llm.generate(prompts, params)
    assert facts(pair, TEXTS, good) == facts(one, TEXTS, good)
    with pytest.raises(ConfigError, match="data_parallel_size=2"):
        _ = pair.engine
    assert pair.stats().num_requests == 0


def test_threads_share_it(one: LLM, pair: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    expected = {each: facts(one, [each], params) for each in TEXTS}
    found: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda text=text: found.update({text: facts(pair, text, params)}))
        for text in TEXTS
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert found == expected


def test_chats_and_profiles(one: LLM, pair: LLM, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "What is 2 + 3?"}]
    params = SamplingParams(temperature=0, max_tokens=8)
    pair.start_profile(tmp_path)
    assert pair.chat(talk, params)[0].outputs[0].text == one.chat(talk, params)[0].outputs[0].text
    assert pair.stop_profile() == tmp_path
    assert len(list(tmp_path.glob("*.json.gz"))) == 2
    assert pair.get_default_sampling_params() == one.get_default_sampling_params()
    assert pair.get_tokenizer().decode([5, 6]) == one.get_tokenizer().decode([5, 6])


def test_weights_of_all(one: LLM, pair: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts = [[each, 9, 20, 31] for each in range(5, 13)]
    name = "model.norm.weight"
    old = dict(one.engine.runner.model.named_parameters())[name].detach().clone()
    new = {name: old * torch.linspace(-1, 1, len(old), device=old.device)}
    before = facts(one, prompts, params)
    try:
        for llm in (one, pair):
            llm.update_weights(new)
        changed = facts(one, prompts, params)
        assert changed != before
        assert facts(pair, prompts, params) == changed
        with pytest.raises(LoadError, match=r"no\.such\.weight"):
            pair.update_weights({"no.such.weight": old})
    finally:
        for llm in (one, pair):
            llm.update_weights({name: old})
    assert facts(pair, prompts, params) == before


def test_devices_that_are_not_there(options: dict[str, Any], monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match=r"data_parallel_size=0"):
        LLM(**options, data_parallel_size=0)
    with pytest.raises(ConfigError, match=r"is one device and data_parallel_size=2"):
        LLM(**{**options, "device": "cpu:0"}, data_parallel_size=2)
    from reprise.platforms.cpu import CpuPlatform

    monkeypatch.setattr(CpuPlatform, "is_the_host", False)
    with pytest.raises(ConfigError, match=r"=3 asks for 3 devices and 1 of platform 'cpu'"):
        LLM(**{**options, "device": "cpu"}, data_parallel_size=3)
    with pytest.raises(PlatformError, match="abacus"):
        LLM(device="abacus", data_parallel_size=2)


def test_structured_output(one: LLM, pair: LLM) -> None:
    """A replica compiles the grammars of its requests, or says why it cannot."""
    pytest.importorskip("xgrammar")
    digits, bad = (
        SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(regex=each))
        for each in ("[0-9]{3,5}", "((")
    )
    free = SamplingParams(max_tokens=5)
    for llm in (one, pair):
        with pytest.raises(RequestError, match="regex"):
            llm.generate(["x", "y"], [free, bad])
    assert pair.stats().num_requests == 0
    found = pair.generate(TEXTS, [digits, free] * 2 + [digits])
    for each in found[::2]:
        assert re.fullmatch("[0-9]{3,5}", each.outputs[0].text)
