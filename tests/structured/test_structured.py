"""What structured output promises, as callers see it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import CORPUS, assert_idle, make_llm, text_model

from reprise import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from reprise.engine import structured
from reprise.engine.structured import compiler as compiling
from reprise.errors import GrammarError, RequestError
from reprise.loading.checkpoint import DEMO_MODEL

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer",
                   "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
}  # fmt: skip


def wanted(**what: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**what)


def ask(llm: LLM, what: StructuredOutputsParams, **params: Any) -> Any:
    params = {"max_tokens": 120, "temperature": 0, **params}
    (output,) = llm.generate(
        "Once upon a time", SamplingParams(structured_outputs=what, **params), use_tqdm=False
    )
    assert_idle(llm)
    return output.outputs[0] if params.get("n", 1) == 1 else output.outputs


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ({"regex": r"\d{3}-[a-z]{4}"}, r"\d{3}-[a-z]{4}"),
        ({"choice": ['a"b', "yes, no", "ü\n"]}, 'a"b|yes, no|ü\n'),
        ({"grammar": 'root ::= "x" root | "y"'}, "x*y"),
        ({"json": json.dumps(PERSON), "disable_any_whitespace": True}, r"\{.*\}"),
        ({"json_object": True, "disable_any_whitespace": True}, r"\{.*"),
        (
            {"structural_tag": {"type": "structural_tag", "format": {
                "type": "tag", "begin": "<n>", "end": "</n>",
                "content": {"type": "regex", "pattern": "[0-9]{2}"}}}},
            r"<n>\d\d</n>",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_text_matches(llm: LLM, what: Any, pattern: str, temperature: float) -> None:
    found = ask(llm, wanted(**what), temperature=temperature, seed=3)
    assert re.fullmatch(pattern, found.text, re.DOTALL)
    assert found.finish_reason == "stop" or "json_object" in what


def test_completions_of_one_prompt_each_have_a_grammar(llm: LLM) -> None:
    outputs = ask(llm, wanted(regex="[ab]{12}c"), temperature=1.0, seed=0, n=6)
    texts = [each.text for each in outputs]
    assert all(re.fullmatch("[ab]{12}c", each) for each in texts)
    assert len(set(texts)) > 1


def test_a_text_ends_when_it_can_and_never_before(llm: LLM) -> None:
    assert ask(llm, wanted(regex="ab")).text == "ab"
    # The grammar lets nothing follow, so it ends before min_tokens; and where it does, it goes on.
    assert ask(llm, wanted(regex="ab"), min_tokens=9).finish_reason == "stop"
    long = ask(llm, wanted(regex="a*"), min_tokens=9, max_tokens=40)
    assert len(long.token_ids) > 9
    assert set(long.text) == {"a"}
    endless = ask(llm, wanted(regex="a*"), ignore_eos=True, max_tokens=30)
    assert (endless.finish_reason, len(endless.token_ids)) == ("length", 30)
    assert ask(llm, wanted(regex="ab"), ignore_eos=True).text == "ab"
    stopped = ask(
        llm,
        wanted(regex="[ab]{30}"),
        stop="b" if "b" in ask(llm, wanted(regex="[ab]{30}")).text else "a",
    )
    assert stopped.finish_reason == "stop"


def test_who_does_not_think_has_to_match_at_once(llm: LLM, device: str) -> None:
    """The demo model goes on with ", there was": a thought that the comma opens, or that the prompt
    has open, or none."""
    encode = llm.get_tokenizer().encode
    (comma,), (there,), (was,) = map(encode, (",", " there", " was"))

    def params(opened_by: int | None) -> SamplingParams:
        what = wanted(regex=r"\d{3}", begin_after=was, opened_by=opened_by)
        bias = {there: -100} if opened_by == there else None  # a model that does not think
        return SamplingParams(
            structured_outputs=what, temperature=0, max_tokens=20, logit_bias=bias
        )

    for prompt, opened_by, text in (
        ("Once upon a time", comma, r", there was\d{3}"),
        ("Once upon a time", there, r"\d{3}"),
        ("Once upon a time", None, r", there was\d{3}"),
        ("Once upon a time,", comma, r" there was\d{3}"),
        ("Once upon a time, there was", comma, r"\d{3}"),
    ):
        found = llm.generate(prompt, params(opened_by), use_tqdm=False)[0].outputs[0].text
        assert re.fullmatch(text, found, re.DOTALL), (prompt, opened_by, found)
    # Drafts are walked likewise, and an early look changes nothing.
    drafting = make_llm(
        DEMO_MODEL, device, speculative_config={"method": "ngram", "num_speculative_tokens": 5}
    )
    again = "Once upon a time, there was 111. Once upon a time, there was 111. Once upon a time"
    for opened_by in (comma, there):
        one, other = (
            each.generate(again, params(opened_by), use_tqdm=False)[0].outputs[0]
            for each in (llm, drafting)
        )
        assert one.token_ids == other.token_ids
        assert (one.text[0] == ",") is (opened_by == comma)


def test_biases_and_bad_words_cannot_leave_the_grammar(llm: LLM) -> None:
    for value in (-100, 100):
        everything = dict.fromkeys(range(llm.engine.vocab_size), value)
        found = ask(llm, wanted(choice=["yes", "no"]), logit_bias=everything)
        assert found.text in ("yes", "no")
    assert (
        ask(llm, wanted(choice=["yes"]), bad_words=["yes", "y", "ye", "es", "s", "e"]).text == "yes"
    )


def test_log_probabilities_are_the_model_s_own(llm: LLM) -> None:
    found = ask(llm, wanted(choice=["zebra"]), logprobs=2)
    free = llm.generate(
        "Once upon a time", SamplingParams(max_tokens=1, temperature=0, logprobs=2), use_tqdm=False
    )[0].outputs[0]
    first = {token: each.logprob for token, each in free.logprobs[0].items()}
    drawn = found.logprobs[0][found.token_ids[0]]
    assert drawn.rank > 1  # no model goes on so
    for token, logprob in first.items():
        assert found.logprobs[0][token].logprob == pytest.approx(logprob, abs=1e-4)


COMPACT = wanted(json=PERSON, disable_any_whitespace=True)
NEIGHBOURS = [
    (None, 20), (wanted(regex="[ab]{5,20}"), 24), (None, 7), (COMPACT, 30),
    (wanted(choice=["yes", "no"]), 10),
]  # fmt: skip
PROMPTS = [CORPUS[0] * 2, "abababab", "The", "ab" * 12, CORPUS[1]]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1,
         "prompt_lookup_max": 3}  # fmt: skip


def subjects() -> list[tuple[str, SamplingParams]]:
    params = [
        SamplingParams(
            structured_outputs=what, max_tokens=most, seed=number,
            temperature=0.0 if number < len(NEIGHBOURS) else 0.9,
        )
        for number, (what, most) in enumerate(NEIGHBOURS * 2)
    ]  # fmt: skip
    return list(zip(PROMPTS * 2, params, strict=True))


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[Any]:
    return [llm.generate(*each, use_tqdm=False)[0].outputs[0] for each in subjects()]


@pytest.mark.covering(1)
@pytest.mark.parametrize("drafts", [{}, {"speculative_config": NGRAM}], ids=["plain", "drafts"])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_alone_and_among_others_and_with_drafts_the_same_tokens(
    device: str, alone: list[Any], drafts: dict[str, Any], ahead: bool
) -> None:
    other = make_llm(
        DEMO_MODEL, device, num_blocks=65, graph_mode="full", graph_buckets="decode=4;mixed=64",
        **drafts,
    )  # fmt: skip
    if ahead:
        other.engine.pipeline.depth = 2
    prompts, params = zip(*subjects(), strict=True)
    together = other.generate(list(prompts), list(params), use_tqdm=False)
    for one, two in zip(alone, together, strict=True):
        assert list(one.token_ids) == list(two.outputs[0].token_ids)
        assert one.finish_reason == two.outputs[0].finish_reason
    if drafts:
        only = other.generate(["ab" * 12], [params[1]], use_tqdm=False)
        assert only[0].outputs[0].finish_reason == "stop"
        found = {each.name: getattr(each, "value", 0) for each in other.get_metrics()}
        assert found["reprise:spec_decode_num_accepted_tokens"] > 0
    assert_idle(other)
    assert other.engine.grammars.count == 0


def test_only_steps_with_a_grammar_wait_and_have_masks(llm: LLM) -> None:
    before = llm.engine.grammars.num_masks
    llm.generate("The", SamplingParams(max_tokens=20), use_tqdm=False)
    assert llm.engine.grammars.num_masks == before
    found = ask(llm, wanted(regex="[ab]{9}"))
    assert llm.engine.grammars.num_masks == before + len(found.token_ids)


@pytest.mark.parametrize("bound", ["MAX_BYTES", "MAX_KEPT"])
def test_compiled_grammars_are_kept_up_to_a_bound(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    compiler = llm.engine.compiler
    for _ in range(3):
        ask(llm, wanted(regex="[cd]{3}"))
    before = compiler.num_compiled
    ask(llm, wanted(regex="[cd]{3}"))
    assert compiler.num_compiled == before
    monkeypatch.setattr(compiling, bound, 1)
    ask(llm, wanted(regex=f"[de]{{3}}|{bound}"))
    assert len(compiler._kept) == 1
    ask(llm, wanted(regex="[cd]{3}"))
    assert compiler.num_compiled == before + 2


def test_a_bomb_is_refused_in_bounded_time_and_harms_nobody(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(llm, wanted(regex="[cd]{3}"))
    monkeypatch.setattr(compiling, "SECONDS", 0.2)
    go_on = threading.Event()
    made = compiling.GrammarCompiler._make

    def make(self: Any, what: Any) -> Any:
        compiled = made(self, what)
        assert go_on.wait(100)  # as one that takes minutes
        return compiled

    monkeypatch.setattr(compiling.GrammarCompiler, "_make", make)
    bomb = {"type": "string", "pattern": "^((a|b|c){1,40}(d|e){1,40}){1,40}$"}
    began = time.monotonic()
    for title in ("one", "again"):
        with pytest.raises(RequestError, match="to compile"):
            ask(llm, wanted(json={**bomb, "title": title}))
    with pytest.raises(RequestError, match="2 other grammars have been compiling"):
        ask(llm, wanted(regex="[fg]{3}"))
    assert time.monotonic() - began < 50
    # What is compiled already is given out, and nobody else has noticed anything.
    assert re.fullmatch("[cd]{3}", ask(llm, wanted(regex="[cd]{3}")).text)
    free = llm.generate("The", SamplingParams(max_tokens=5), use_tqdm=False)
    assert len(free[0].outputs[0].token_ids) == 5
    go_on.set()
    monkeypatch.setattr(compiling, "SECONDS", 60.0)
    assert re.fullmatch("[fg]{3}", ask(llm, wanted(regex="[fg]{3}")).text)


def test_what_the_first_grammar_has_to_wait_for_is_not_its_own_time(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = [0.0]
    load = compiling.token_infos

    def slowly(*arguments: Any) -> Any:
        hours[0] += 3600
        return load(*arguments)

    monkeypatch.setattr(compiling, "token_infos", slowly)
    monkeypatch.setattr(
        compiling, "time",
        SimpleNamespace(monotonic=lambda: hours[0], perf_counter=time.perf_counter),
    )  # fmt: skip
    known = llm.engine.compiler
    fresh = compiling.GrammarCompiler(known._tokenizer, known._vocab_size, known._stop_token_ids)
    assert fresh.compile(wanted(regex="[cd]{3}")).grammar is not None
    assert hours == [3600]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"regex": "(a"}, "parenthesis is not closed"),
        ({"regex": "(?!a)b"}, "looking ahead"),
        ({"regex": r"(a)\1"}, "backreference"),
        ({"regex": "[^]a]"}, "two ways"),
        ({"regex": r"\bword\b"}, r"\\b"),
        ({"regex": "a^b"}, r"\^ is supported where"),
        ({"regex": "a$b"}, r"\$ is supported where"),
        ({"regex": "[[:alpha:]]"}, "alpha"),
        ({"regex": "a{1,1000000}"}, "repeats too often"),
        ({"regex": "a\0b"}, "NUL"),
        ({"grammar": "root ::= missing"}, "not defined"),
        ({"grammar": 'start ::= "x"'}, "root"),
        *(({"grammar": each}, "itself and nothing else") for each in (
            "root ::= root{2,129}", 'root ::= "a"\nx ::= (y){1} ""\ny ::= ((x){0,2})',
            'root ::= "\\n" x | root\nz ::= x\nx ::= y{3,}\ny ::= w\nw ::= x (= "b")',
        )),
        ({"structural_tag": {"type": "structural_tag", "format": {
            "type": "grammar", "grammar": "root ::= root{2}"}}}, "itself and nothing else"),
        ({"structural_tag": {"type": "structural_tag", "format": {"type": "foo"}}}, "foo"),
        (
            {"structural_tag": {"type": "structural_tag", "format": {
                "type": "json_schema", "json_schema": {"type": "integer", "multipleOf": 3}}}},
            "multipleOf",
        ),
    ],
)  # fmt: skip
def test_what_does_not_compile_is_refused_with_the_reason(
    llm: LLM, what: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        ask(llm, wanted(**what))


@pytest.mark.parametrize(
    "what",
    [
        {}, {"regex": "a", "choice": ["a"]}, {"json": "{"}, {"json": 3}, {"regex": ""},
        {"choice": []}, {"choice": [1]}, {"choice": "yes"}, {"json_object": 1},
        {"json_object": False},
        {"json": '{"maximum": NaN}'}, {"json": float("nan")}, {"regexp": "a"}, {"grammar": 1},
        {"whitespace_pattern": " ", "regex": "a"}, {"regex": "a" * (1 << 19)},
        {"json": "[" * 100000}, {"disable_any_whitespace": 1, "regex": "a"},
    ],
)  # fmt: skip
def test_options_are_checked_when_they_are_made(what: Any) -> None:
    with pytest.raises(RequestError, match=r"structured|unknown|regexp|whitespace"):
        SamplingParams(structured_outputs=StructuredOutputsParams(**what))


def test_conflicts_are_refused() -> None:
    with pytest.raises(RequestError, match="allowed_token_ids"):
        SamplingParams(structured_outputs=wanted(regex="a"), allowed_token_ids=[1])
    with pytest.raises(RequestError, match="StructuredOutputsParams"):
        SamplingParams(structured_outputs="json")


def test_without_a_tokenizer_or_the_package_it_is_refused_with_the_remedy(
    tiny: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xgrammar")
    params = SamplingParams(structured_outputs=wanted(regex="a"))
    llm = make_llm(tiny(), device)
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        llm.generate({"prompt_token_ids": [1]}, params)
    monkeypatch.setitem(__import__("sys").modules, "xgrammar", None)
    other = make_llm(text_model(tiny), device)
    with pytest.raises(RequestError, match=r"pip install 'reprise\[structured\]'"):
        other.generate("x", params)
    other.generate("x", SamplingParams(max_tokens=2), use_tqdm=False)


@pytest.fixture
def stale(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks are those of the step before."""
    made = structured.Grammars.masks
    old: list[Any] = []

    def masks(self: Any, *arguments: Any) -> Any:
        found = made(self, *arguments)
        old.append(found.which.copy())
        if len(old) > 1 and old[-2].shape == found.which.shape:
            found.which = old[-2]
        return found

    monkeypatch.setattr(structured.Grammars, "masks", masks)
    return


def test_a_stale_mask_ends_the_request_with_an_error_and_no_other(llm: LLM, stale: None) -> None:
    params = [
        SamplingParams(
            structured_outputs=wanted(regex="(ab|cd|ef){8}"), temperature=1, max_tokens=40
        ),
        SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    ]
    with pytest.raises(GrammarError, match="does not allow") as failure:
        llm.generate(["x", "Once"], params, use_tqdm=False)
    bad, good = failure.value.outputs
    assert bad.outputs[0].finish_reason == "error"
    assert len(good.outputs[0].token_ids) == 40
    assert_idle(llm)


def test_masks_of_another_row_are_found(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made = structured.Grammars.masks

    def masks(self: Any, *arguments: Any) -> Any:
        found = made(self, *arguments)
        found.which = np.roll(found.which, 1)
        return found

    monkeypatch.setattr(structured.Grammars, "masks", masks)
    params = [
        SamplingParams(structured_outputs=wanted(regex=each), max_tokens=9)
        for each in ("[ab]{9}", "[cd]{9}")
    ]
    with pytest.raises(GrammarError):
        llm.generate(["x", "y"], params, use_tqdm=False)


def test_a_compiler_that_ends_its_thread() -> None:
    """Not as no grammar, which would hold nothing."""

    def make() -> Any:
        raise SystemExit("panic")

    job = compiling._Job(make)
    job.start(lambda: None)
    with pytest.raises(RequestError, match="panic"):
        job.result(time.monotonic() + 10, wanted(regex="a"))


def test_async_requests_do_not_wait_for_the_grammar_of_another(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xgrammar")
    compiling_now, go_on = threading.Event(), threading.Event()
    made = compiling.GrammarCompiler._make

    def make(self: Any, what: Any) -> Any:
        compiling_now.set()
        assert go_on.wait(60)
        return made(self, what)

    monkeypatch.setattr(compiling.GrammarCompiler, "_make", make)
    monkeypatch.setattr(compiling, "SECONDS", 60.0)

    async def last(llm: AsyncLLM, name: str, params: SamplingParams) -> Any:
        async for output in llm.generate("Once", params, request_id=name):
            found = output
        return found

    async def run() -> None:
        llm = AsyncLLM(str(DEMO_MODEL), device=device, dtype="float32", num_blocks=129)
        try:
            structured = asyncio.create_task(
                last(llm, "s", SamplingParams(structured_outputs=wanted(regex="[ab]{3}")))
            )
            while not compiling_now.is_set():
                await asyncio.sleep(0.01)
            plain = await last(llm, "p", SamplingParams(max_tokens=4))
            assert len(plain.outputs[0].token_ids) == 4
            assert not structured.done()
            go_on.set()
            found = await structured
            assert re.fullmatch("[ab]{3}", found.outputs[0].text)
        finally:
            go_on.set()
            llm.shutdown()

    asyncio.run(run())


def test_preempted_requests_and_cached_prompts_keep_to_their_grammars(
    llm: LLM, device: str
) -> None:
    """A grammar stands where its text stands, whatever is computed again or not at all."""
    prompts = [f"{'Once upon a time. ' * 4}{each}" for each in "abcdefgh"]
    params = SamplingParams(
        structured_outputs=wanted(regex="[a-d]{90}e"), max_tokens=95, temperature=1, seed=4
    )
    expected = [each.outputs[0].text for each in llm.generate(prompts, params, use_tqdm=False)]
    assert all(re.fullmatch("[a-d]{90}e", each) for each in expected)
    again = llm.generate(prompts, params, use_tqdm=False)
    assert sum(each.num_cached_tokens for each in again) > 0
    assert [each.outputs[0].text for each in again] == expected
    small = make_llm(DEMO_MODEL, device, max_num_seqs=8, num_blocks=36, max_model_len=256)
    found = small.generate(prompts, params, use_tqdm=False)
    assert small.engine.stats().scheduler.total_preemptions > 0
    assert [each.outputs[0].text for each in found] == expected


def test_engines_in_threads_fill_their_masks_apart(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads in one batch of xgrammar's end the process: what it does at the end of a call
    stops the other's threads."""
    import xgrammar

    both = threading.Barrier(2)
    asked: dict[int, Any] = {}

    class Watched(xgrammar.BatchGrammarMatcher):
        def batch_fill_next_token_bitmask(self, *arguments: Any) -> None:
            if threading.get_ident() not in asked:
                asked[threading.get_ident()] = self
                both.wait(60)  # both are within
            super().batch_fill_next_token_bitmask(*arguments)

    monkeypatch.setattr(xgrammar, "BatchGrammarMatcher", Watched)
    params = SamplingParams(structured_outputs=wanted(regex="[ab]{3}"), max_tokens=6, temperature=0)
    engines = [make_llm(DEMO_MODEL, device, max_num_seqs=32) for _ in range(2)]
    texts: list[list[str]] = []

    def complete(engine: LLM) -> None:
        outputs = engine.generate(["Once"] * 9, params, use_tqdm=False)
        texts.append([each.outputs[0].text for each in outputs])

    threads = [threading.Thread(target=complete, args=(each,)) for each in engines]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    one, other = asked.values()
    assert one is not other
    assert texts[0] == texts[1]
    assert all(re.fullmatch("[ab]{3}", text) for text in texts[0])
