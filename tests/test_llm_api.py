"""The public interface, as a user of vLLM knows it."""

from __future__ import annotations

import gc
import gzip
import inspect
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    TinyModel,
    TinyModels,
    assert_idle,
    greedy,
    make_llm,
    random_ids,
    text_model,
    token_ids,
)

import reprise
from reprise import LLM, AsyncLLM, SamplingParams
from reprise.engine.completion import CompletionGroup
from reprise.errors import RepriseError, RequestError


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return text_model(tiny)


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device)


def test_steps_do_not_ask_each_request_whether_it_has_finished(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    finished = CompletionGroup.finished.fget  # type: ignore[attr-defined]

    def counted(self: CompletionGroup) -> bool:
        asked.append(self)
        return bool(finished(self))

    monkeypatch.setattr(CompletionGroup, "finished", property(counted))
    params = [greedy(each, ignore_eos=True) for each in (20, 30, 40)]
    llm.generate([random_ids(each, 5) for each in range(3)], params, use_tqdm=False)
    assert len(asked) < 20  # when one ends, and not in each of the 40 steps


def test_forms_of_a_prompt(llm: LLM, model: TinyModel) -> None:
    text = "Once upon a time"
    ids = llm.get_tokenizer().encode(text)
    forms: list[Any] = [text, ids, {"prompt": text}, {"prompt_token_ids": ids}, tuple(ids)]
    forms.append({"prompt": text, "prompt_token_ids": ids})
    together = llm.generate(forms, greedy(8))
    assert len({tuple(each) for each in token_ids(together)}) == 1
    assert model.is_greedy(ids, together[0].outputs[0].token_ids)
    for form, output in zip(forms, together, strict=True):
        assert output.prompt_token_ids == ids
        assert output.prompt == (text if "prompt" in form or form is text else None)
        alone = llm.generate(form, greedy(8))
        assert token_ids(alone) == token_ids(together[:1])
    assert len(llm.generate([ids, ids[:3]], greedy(2))) == 2
    assert llm.generate([], greedy(2)) == []
    assert_idle(llm)


def test_callers_lists_are_not_kept(llm: LLM) -> None:
    prompt = [5, 6, 7]
    output = llm.generate({"prompt_token_ids": prompt}, greedy(4))[0]
    assert prompt == [5, 6, 7]
    prompt.append(8)
    assert output.prompt_token_ids == [5, 6, 7]
    output.outputs[0].token_ids.clear()
    output.prompt_token_ids.clear()
    assert len(llm.generate([5, 6, 7], greedy(4))[0].outputs[0].token_ids) == 4


def test_outputs(llm: LLM) -> None:
    outputs = llm.generate(["a cat", "12 + 34 ="], greedy(6, n=2, logprobs=0))
    assert [each.prompt for each in outputs] == ["a cat", "12 + 34 ="]
    assert len({each.request_id for each in outputs}) == 2
    for each in outputs:
        assert each.finished
        assert each.prompt_logprobs is None
        assert [each.index for each in each.outputs] == [0, 1]
        for completion in each.outputs:
            assert completion.finished()
            assert len(completion.token_ids) == 6
            assert completion.finish_reason == "length"
            # Also if all completions end in one step.
            assert completion.text == each.outputs[0].text != ""
            assert len(completion.logprobs or []) == 6


def test_one_set_of_parameters_for_each_prompt(llm: LLM) -> None:
    outputs = llm.generate(["a", "b", "c"], [greedy(2), greedy(5), greedy(1)])
    assert [len(each.outputs[0].token_ids) for each in outputs] == [2, 5, 1]


def test_default_parameters(model: TinyModel, device: str, tmp_path: Path) -> None:
    llm = make_llm(model, device, seed=5)
    default = llm.get_default_sampling_params()
    assert default == SamplingParams()
    assert [len(each) for each in token_ids(llm.generate(["a", "b"]))] == [16, 16]


def test_chat(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    first = [{"role": "user", "content": "Grüße 👍🏽"}]
    second = [*first, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and?"}]
    expected = tokenizer.apply_chat_template(second, tokenize=False, add_generation_prompt=True)
    outputs = llm.chat([first, second], greedy(8))
    assert outputs[1].prompt == expected
    assert outputs[1].prompt_token_ids == tokenizer.encode(expected, add_special_tokens=False)
    assert token_ids(llm.chat(first, greedy(8))) == token_ids(outputs[:1])
    plain = llm.chat(first, greedy(8), add_generation_prompt=False)[0]
    assert plain.prompt is not None
    assert not plain.prompt.endswith("assistant:")
    custom = llm.chat(
        first,
        greedy(8),
        chat_template="{{ mood }}: {{ messages[0].content }}",
        chat_template_kwargs={"mood": "glad"},
    )
    assert custom[0].prompt == "glad: Grüße 👍🏽"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], r"messages=\[\]"),
        ([[]], "messages is empty"),
        ([{"content": "no role"}], "messages"),
        (["hello"], "messages"),
        ("hello", "messages"),
        ([{"role": "user", "content": "hi"}, 3], "messages"),
        (None, "messages"),
        (7, "messages"),
    ],
)
def test_bad_messages(llm: LLM, messages: Any, named: str) -> None:
    strict = (
        "{% for m in messages %}{% if m.role is not defined %}{{ raise_exception('no role') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    with pytest.raises(RequestError, match=named):
        llm.chat(messages, greedy(4), chat_template=strict)
    assert_idle(llm)


def test_bad_template(llm: LLM) -> None:
    with pytest.raises(RequestError, match="chat template"):
        llm.chat([{"role": "user", "content": "hi"}], chat_template="{% for %}")


def test_chats_take_the_same_arguments_everywhere() -> None:
    """Besides what only a list of requests, or only a stream, has."""
    offline, streaming = (inspect.signature(each.chat).parameters for each in (LLM, AsyncLLM))
    assert offline.keys() - {"use_tqdm"} == streaming.keys() - {"request_id"}
    for name in offline.keys() & streaming.keys() - {"self", "messages", "sampling_params"}:
        kind = inspect.Parameter.VAR_KEYWORD if name == "others" else inspect.Parameter.KEYWORD_ONLY
        assert offline[name].kind == streaming[name].kind == kind
        if name != "priority":
            assert offline[name] == streaming[name]


def test_chats_with_tools(llm: LLM) -> None:
    template = "{{ tools[0].function.name }}{{ documents[0].title }}{{ messages[-1].content }}"
    tool = {"type": "function", "function": {"name": "add"}}
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(
        [messages, messages], greedy(2), tools=[tool], documents=[{"title": "!"}],
        chat_template=template, priority=[1, 0],
    )  # fmt: skip
    assert [each.prompt for each in output] == ["add!hi"] * 2
    going_on = llm.chat(
        [*messages, {"role": "assistant", "content": "The answer"}], greedy(2),
        add_generation_prompt=False, continue_final_message=True,
    )  # fmt: skip
    assert str(going_on[0].prompt).endswith("assistant: The answer")


def cached(llm: LLM, prompt: Any) -> int:
    return llm.generate(prompt, greedy(2))[0].metrics.num_cached_tokens


def test_cache_salt_keeps_tenants_apart(model: TinyModel, device: str) -> None:
    """Nobody learns from the time to the first token what others have asked."""
    llm = make_llm(model, device)
    ids = random_ids(3, 50)
    salted = [{"prompt_token_ids": ids, "cache_salt": each} for each in ("a", "b", "\udc80", "é")]
    plain = {"prompt_token_ids": ids}
    for prompt in (*salted, plain):
        assert cached(llm, prompt) == 0
        assert cached(llm, prompt) == 48
    assert cached(llm, {**plain, "cache_salt": None}) == 48
    outputs = llm.generate([*salted, plain], greedy(8))
    assert len({tuple(each) for each in token_ids(outputs)}) == 1
    for salt in ("", 3, b"a", ["a"]):
        with pytest.raises(RequestError, match="cache_salt="):
            llm.generate({**plain, "cache_salt": salt}, greedy(2))


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ({"prompt": 3}, "prompt=3"),
        ({"prompt": [1, 2]}, "prompt=\\[1, 2\\]"),
        ({"prompt": b"a", "prompt_token_ids": [1]}, "prompt=b'a'"),
        ({"prompt": None, "prompt_token_ids": None}, "'prompt' or 'prompt_token_ids'"),
        ({"cache_salt": "x"}, "'prompt' or 'prompt_token_ids'"),
        ({}, "'prompt' or 'prompt_token_ids'"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids='abc'"),
        ({"prompt_embeds": torch.ones(2, 2)}, "'prompt_embeds'"),
        ({"prompt": "a", "prompt_embeds": torch.ones(2, 2).numpy()}, "'prompt_embeds'"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "'multi_modal_data'"),
        ([None], "prompt_token_ids=None"),
        ([3.5], "prompt_token_ids=3.5"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        llm.generate(prompt, greedy(2))


def test_text_with_half_a_surrogate_pair(llm: LLM) -> None:
    """Which no tokenizer takes; whoever gives it learns where it is."""
    wrong, template = "a \ud800", "{{ messages[0].content }}"
    invalid = pytest.raises(RequestError, match=r"(prompt|bad_words)=.* is not valid text")
    with invalid:
        llm.generate(wrong, greedy(2))
    with invalid:
        llm.generate("a", greedy(2, bad_words=["b", wrong]))
    with invalid:
        llm.chat([{"role": "user", "content": wrong}], greedy(2), chat_template=template)


def test_null_is_absent_in_prompts(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("a cat")
    for prompt in (
        {"prompt": "a cat", "prompt_token_ids": None},
        {"prompt": None, "prompt_token_ids": ids},
    ):
        assert llm.generate(prompt, greedy(2))[0].prompt_token_ids == ids


def copy_of(model: TinyModel, path: Path, **files: Any) -> Path:
    """A checkpoint with some of its JSON files changed."""
    target = Path(shutil.copytree(model.path, path / "copy"))
    for name, fields in files.items():
        file = target / f"{name}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **fields}))
    return target


def test_the_tokenizers_own_end_of_text(
    model: TinyModel, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither config lists it, as many fine-tuned checkpoints have it."""
    llm = make_llm(model, device)
    eos = llm.get_tokenizer().eos_token_id
    to_the_end = greedy(8, logit_bias={eos: 100.0})
    stopped = llm.generate("a cat", to_the_end)[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    assert stopped.token_ids == [eos]
    ignored = llm.generate("a cat", greedy(8, logit_bias={eos: 100.0}, ignore_eos=True))
    assert token_ids(ignored) == [[eos] * 8]
    with caplog.at_level(logging.INFO, logger="reprise"):
        other = copy_of(model, tmp_path, generation_config={"eos_token_id": [7, 9]})
        assert make_llm(other, device).engine.eos_token_ids == {7, 9, eos}
    assert f"token {eos} (<eos>) ends a text too" in caplog.text
    none = copy_of(model, tmp_path / "none", tokenizer_config={"eos_token": None})
    assert make_llm(none, device).engine.eos_token_ids == set()


def test_recommended_length(model: TinyModel, device: str, tmp_path: Path) -> None:
    path = copy_of(model, tmp_path, generation_config={"max_new_tokens": 23})
    llm = make_llm(path, device)
    assert llm.get_default_sampling_params().max_tokens == 23
    quiet = {"ignore_eos": True}
    assert [len(each) for each in token_ids(llm.generate(["a"], SamplingParams(**quiet)))] == [16]
    output = llm.generate("a")[0].outputs[0]
    assert len(output.token_ids) == 23 or output.finish_reason == "stop"


def test_text_of_the_token_that_stops(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    cat = tokenizer.encode(" cat")[-1]
    bias = {cat: 100.0}
    for include in (False, True):
        output = llm.generate(
            "The",
            greedy(8, logit_bias=bias, stop_token_ids=[cat], include_stop_str_in_output=include),
        )[0].outputs[0]
        assert (output.finish_reason, output.stop_reason) == ("stop", cat)
        assert output.text == (tokenizer.decode([cat]) if include else "")
    # A special one shows only if special tokens do.
    eos = tokenizer.eos_token_id
    for skip in (True, False):
        params = greedy(
            8, logit_bias={eos: 100.0}, include_stop_str_in_output=True, skip_special_tokens=skip
        )
        assert llm.generate("The", params)[0].outputs[0].text == ("" if skip else "<eos>")


def test_text_that_ends_within_a_character(llm: LLM) -> None:
    """As it does when the limit of tokens cuts it, or its last character is U+FFFD itself."""
    tokenizer = llm.get_tokenizer()
    half = tokenizer.encode("漢字")[0]
    output = llm.generate("a", greedy(1, logit_bias={half: 100.0}))[0].outputs[0]
    assert output.token_ids == [half]
    assert output.text == tokenizer.decode([half]) == "\ufffd"
    group = llm.engine.add("aborted", "a", greedy(20, logit_bias={half: 100.0}))
    while not group.output().outputs[0].token_ids:
        llm.engine.step()
    assert group.output().outputs[0].text == ""
    llm.engine.abort(["aborted"])
    assert group.output().outputs[0].text == "\ufffd"
    while llm.engine.has_work:
        llm.engine.step()


def test_no_names_of_tokens_without_text(llm: LLM) -> None:
    output = llm.generate("a", greedy(2, logprobs=1, detokenize=False))[0].outputs[0]
    for entry in output.logprobs or []:
        assert all(each.decoded_token is None for each in entry.values())


def test_no_tokenizer(model: TinyModel, device: str) -> None:
    llm = make_llm(model, device, skip_tokenizer_init=True)
    for call in (llm.get_tokenizer, lambda: llm.chat([{"role": "user", "content": "hi"}])):
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            call()
    output = llm.generate([1, 2, 3], greedy(4))[0]
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == 4


def test_a_tokenizer_from_elsewhere(
    tiny: TinyModels, model: TinyModel, device: str, tmp_path: Path
) -> None:
    plain = tiny("qwen3", vocab_size=340)
    llm = make_llm(plain, device, skip_tokenizer_init=False, tokenizer=str(model.path))
    assert llm.generate("a cat", greedy(4))[0].prompt == "a cat"


def test_a_text_that_has_no_tokens(llm: LLM) -> None:
    for prompt in ("", {"prompt": ""}, ["good", ""]):
        with pytest.raises(RequestError, match="prompt='' is empty"):
            llm.generate(prompt, greedy(4))
    assert_idle(llm)


def test_text_that_is_no_unicode(llm: LLM) -> None:
    """As Python reads bytes from a command line that are no UTF-8."""
    for call in (
        lambda: llm.generate("a\udcff", greedy(4)),
        lambda: llm.chat([{"role": "user", "content": "a\udcff"}], greedy(4)),
    ):
        with pytest.raises(RequestError, match="not valid text"):
            call()
    assert_idle(llm)


def test_template_variables_may_be_those_that_have_a_name(llm: LLM) -> None:
    template = "{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}"
    found = [
        llm.chat(
            [{"role": "user", "content": "hi"}], greedy(2), chat_template=template,
            chat_template_kwargs={"add_generation_prompt": each},
        )[0].prompt
        for each in (True, False)
    ]  # fmt: skip
    assert found == ["hi!", "hi"]


def test_paths_can_be_path_objects(model: TinyModel, device: str) -> None:
    llm = LLM(model.path, device=device, num_blocks=9, max_num_seqs=2, tokenizer=model.path)  # type: ignore[arg-type]
    assert len(llm.generate("a", greedy(3))[0].outputs[0].token_ids) == 3


def test_shutdown_frees_the_model(model: TinyModel, device: str) -> None:
    def modules() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.nn.Module) for each in gc.get_objects())

    before = modules()
    with make_llm(model, device) as llm:
        assert modules() > before
        assert len(llm.generate("a", greedy(3))[0].outputs[0].token_ids) == 3
    assert modules() == before
    llm.shutdown()  # again: nothing to do
    for call in (
        lambda: llm.generate("a", greedy(3)),
        lambda: llm.generate([], greedy(3)),
        lambda: llm.chat([{"role": "user", "content": "hi"}]),
        llm.get_tokenizer,
        llm.get_metrics,
        llm.get_default_sampling_params,
        llm.reset_prefix_cache,
        llm.start_profile,
        llm.stop_profile,
        llm.graph_report,
        llm.stats,
        lambda: llm.engine,
    ):
        with pytest.raises(RepriseError, match="the engine was shut down; create a new LLM"):
            call()


def test_a_block_that_raises_shuts_down_too(model: TinyModel, device: str) -> None:
    llm = make_llm(model, device)

    def interrupted() -> None:
        with llm:
            llm.engine.add("left", "a text", greedy(50))
            llm.engine.step()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    with pytest.raises(RepriseError, match="shut down"):
        llm.stats()


def test_priority_has_one_entry_a_prompt(llm: LLM) -> None:
    for priority in ([], [1], np.array([1]), [1, 2, 3]):
        with pytest.raises(RequestError, match=r"priority has \d entries for 2 prompt"):
            llm.generate(["a", "b"], greedy(2), priority=priority)
    for priority in ([1.5, 2], ["x", "y"], [True, False], "ab", 1.5):
        with pytest.raises(RequestError, match="priority"):
            llm.generate(["a", "b"], greedy(2), priority=priority)
    for priority in (None, [2, 1], np.array([2, 1]), (np.int64(3), 4)):
        assert len(llm.generate(["a", "b"], greedy(2), priority=priority)) == 2
    assert llm.generate([], priority=[]) == []
    assert_idle(llm)


def test_numbers_of_other_makes_as_prompts(llm: LLM) -> None:
    ids = [5, 6, 7]
    expected = token_ids(llm.generate(ids, greedy(4)))
    array = np.array(ids)
    forms: list[Any] = [array, torch.tensor(ids), list(array), {"prompt_token_ids": array}]
    for form in [*forms, [array], np.array([ids]), [list(array)]]:
        outputs = llm.generate(form, greedy(4))
        assert token_ids(outputs) == expected
        assert [type(each) for each in outputs[0].prompt_token_ids] == [int] * 3
    for wrong in (np.array([1.5]), np.array([True]), [np.float32(1)]):
        with pytest.raises(RequestError):
            llm.generate(wrong, greedy(4))
    assert_idle(llm)


@pytest.mark.parametrize(("wanted", "kept"), [(None, 20), (1, 1), (7, 7), (20, 20), (30, 20)])
def test_truncated_prompts(llm: LLM, model: TinyModel, wanted: int | None, kept: int) -> None:
    prompt = random_ids(1, 20)
    output = llm.generate([prompt], greedy(5, truncate_prompt_tokens=wanted))[0]
    assert output.prompt_token_ids == prompt[-kept:]
    assert model.is_greedy(prompt[-kept:], output.outputs[0].token_ids)


def test_a_prompt_is_truncated_to_what_fits(model: TinyModel, device: str) -> None:
    llm = make_llm(model, device, max_model_len=48, skip_tokenizer_init=True)
    prompt = random_ids(1, 100)
    for max_tokens, kept in ((16, 32), (47, 1), (100, 1), (None, 47)):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, truncate_prompt_tokens=-1)
        output = llm.generate([prompt], params)[0]
        assert output.prompt_token_ids == prompt[-kept:]
        assert len(output.outputs[0].token_ids) == min(max_tokens or 48, 48 - kept)
    for wanted in (48, 1000):
        with pytest.raises(RequestError, match=f"truncate_prompt_tokens={wanted}.*at most 47"):
            llm.generate([prompt], greedy(4, truncate_prompt_tokens=wanted))
    assert_idle(llm)


def test_cached_tokens(model: TinyModel, device: str) -> None:
    llm = make_llm(model, device)
    prompt = random_ids(1, 40)
    fresh, again = (llm.generate([prompt], greedy(2))[0] for _ in range(2))
    assert (fresh.num_cached_tokens, again.num_cached_tokens) == (0, 32)
    unread = llm.generate([prompt], greedy(2, skip_reading_prefix_cache=True))[0]
    assert unread.num_cached_tokens == 0
    assert token_ids([unread]) == token_ids([again])
    assert llm.reset_prefix_cache() is True
    assert llm.generate([prompt], greedy(2))[0].num_cached_tokens == 0


def test_a_profile_is_a_trace(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RepriseError, match="call start_profile"):
        llm.stop_profile()
    llm.start_profile(tmp_path / "a")
    with pytest.raises(RepriseError, match="call stop_profile"):
        llm.start_profile()
    llm.generate("a", greedy(3))
    file = llm.stop_profile()
    assert file.parent == tmp_path / "a"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(each.get("name", "").startswith("aten::") for each in events)
    monkeypatch.setenv("REPRISE_PROFILE_DIR", str(tmp_path / "b"))
    llm.start_profile()
    assert llm.stop_profile().parent == tmp_path / "b"
    with pytest.raises(RepriseError, match="cannot be made"):
        llm.start_profile(file / "below")
    llm.start_profile(tmp_path)  # a refused one leaves nothing behind
    llm.stop_profile()


def test_engines_side_by_side(tiny: TinyModels, device: str) -> None:
    """Two models in one process do not disturb each other."""
    models = [tiny("qwen3"), tiny("llama", num_hidden_layers=1)]
    llms = [make_llm(each, device) for each in models]
    prompts = [random_ids(1, 20), random_ids(2, 10)]
    groups = [
        [llm.engine.add(f"{n}", prompt, greedy(20)) for n, prompt in enumerate(prompts)]
        for llm in llms
    ]
    while any(llm.engine.has_work for llm in llms):
        for llm in llms:
            llm.engine.step()
    for model, requests in zip(models, groups, strict=True):
        for prompt, group in zip(prompts, requests, strict=True):
            assert model.is_greedy(prompt, group.output().outputs[0].token_ids)


def test_names_of_the_package() -> None:
    for name in reprise.__all__:
        assert getattr(reprise, name) is not None
    with pytest.raises(AttributeError, match="NoSuchThing"):
        reprise.NoSuchThing  # noqa: B018
    assert issubclass(RequestError, RepriseError)


LIGHT = ["reprise", "reprise.config", "reprise.errors", "reprise.sampling_params"]
LIGHT += ["reprise.outputs", "reprise.request", "reprise.step"]


def test_light_modules_import_without_torch() -> None:
    program = (
        "import importlib, json, sys\n"
        f"for name in {LIGHT!r}: importlib.import_module(name)\n"
        "print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == []
