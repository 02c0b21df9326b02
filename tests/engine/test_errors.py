"""Bad input: a typed error that names the field, the value and the remedy, and nothing else.

Each test proves that the engine serves on: the same tokens as before, and no block in use.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CONTEXT,
    VOCAB,
    TinyModel,
    TinyModels,
    assert_idle,
    generate,
    greedy,
    make_llm,
    random_ids,
    token_ids,
)

from reprise import LLM, SamplingParams
from reprise.errors import (
    CapacityError,
    ConfigError,
    ModelError,
    OpError,
    PlatformError,
    RepriseError,
    RequestError,
    describe,
)
from reprise.loading import open_checkpoint
from reprise.platforms import Platform
from reprise.runner.model_choices import build_model

GOOD = random_ids(1, 20)
STEPS = 12


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def expected(llm: LLM, model: TinyModel) -> list[int]:
    output = generate(llm, [GOOD], greedy(STEPS))[0]
    assert model.is_greedy(GOOD, output)
    return output


def check_serves(llm: LLM, expected: list[int]) -> None:
    assert_idle(llm)
    assert generate(llm, [GOOD], greedy(STEPS)) == [expected]


# ---- requests ----------------------------------------------------------------------------

PROMPTS: dict[str, tuple[Any, type[RepriseError], list[str]]] = {
    "empty list in a list": ([[]], RequestError, ["prompt", "empty", "give one token"]),
    "empty token ids": ({"prompt_token_ids": []}, RequestError, ["prompt", "empty"]),
    "as long as the context": (
        random_ids(2, CONTEXT),
        CapacityError,
        [str(CONTEXT), "shorten", "max_model_len"],
    ),
    "longer than the context": (random_ids(2, 1000), CapacityError, ["1000", str(CONTEXT)]),
    "negative token": ([3, -1], RequestError, ["prompt_token_ids", "-1", f"0 to {VOCAB - 1}"]),
    "token out of range": ([VOCAB], RequestError, ["prompt_token_ids", f"{VOCAB}"]),
    "huge token": ([2**70], RequestError, ["prompt_token_ids", f"0 to {VOCAB - 1}"]),
    "token that cannot be shown": ([10**5000], RequestError, ["prompt_token_ids contains <list"]),
    "float tokens": ([[1.5, 2.0]], RequestError, ["prompt_token_ids", "1.5", "integers"]),
    "bool tokens": ([[True]], RequestError, ["prompt_token_ids", "True", "integers"]),
    "None": ([None], RequestError, ["None", "integers"]),
    "a number": (7, RequestError, ["prompt", "7", "list of token ids"]),
    "text without a tokenizer": ("hello", RequestError, ["'hello'", "skip_tokenizer_init"]),
    "bytes": (b"abc", RequestError, ["b'abc'"]),
    "bytes as ids": ({"prompt_token_ids": b"abc"}, RequestError, ["integers"]),
    "no known key": ({"text": "hi"}, RequestError, ["text", "prompt_token_ids"]),
    "nested lists": ([[[1, 2]]], RequestError, ["prompt_token_ids", "[1, 2]"]),
}


@pytest.mark.parametrize(
    ("prompt", "error", "named"), [pytest.param(*case, id=name) for name, case in PROMPTS.items()]
)
def test_bad_prompt(
    llm: LLM, expected: list[int], prompt: Any, error: type[RepriseError], named: list[str]
) -> None:
    with pytest.raises(error) as caught:
        llm.generate(prompt, greedy(STEPS))
    for each in named:
        assert each in str(caught.value)
    check_serves(llm, expected)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_tokens": -1}, ["max_tokens=-1", "at least 1"]),
        ({"top_p": 2}, ["top_p=2", "at most 1"]),
        ({"temperature": -0.1}, ["temperature=-0.1", "at least 0"]),
        ({"min_tokens": 9, "max_tokens": 4}, ["min_tokens=9", "max_tokens=4"]),
        ({"n": 16385}, ["n=16385", "at most 16384"]),
        ({"stop": "x", "detokenize": False}, ["stop='x'", "stop_token_ids"]),
    ],
)
def test_bad_sampling_params(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    for each in named:
        assert each in str(caught.value)


BAD_PARAMS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "bias of no token": (
        lambda: greedy(logit_bias={VOCAB: 1.0}),
        ["logit_bias", str(VOCAB), f"0 to {VOCAB - 1}"],
    ),
    "stop at no token": (
        lambda: greedy(stop_token_ids=[VOCAB + 5]),
        ["stop_token_ids", str(VOCAB + 5), f"0 to {VOCAB - 1}"],
    ),
    "stop string without a tokenizer": (
        lambda: greedy(stop="\n"),
        ["stop=", "skip_tokenizer_init", "stop_token_ids"],
    ),
    "not parameters": (lambda: [{"temperature": 0}], ["sampling_params", "SamplingParams"]),
    "too few": (lambda: [greedy()] * 2, ["sampling_params", "2", "1 prompt"]),
    "a dictionary": (lambda: {"temperature": 0}, ["sampling_params", "SamplingParams"]),
    "a number": (lambda: 3, ["sampling_params", "SamplingParams"]),
}


@pytest.mark.parametrize(
    ("make", "named"), [pytest.param(*case, id=name) for name, case in BAD_PARAMS.items()]
)
def test_parameters_that_do_not_fit_the_engine(
    llm: LLM, expected: list[int], make: Callable[[], Any], named: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate([GOOD], make())
    for each in named:
        assert each in str(caught.value)
    check_serves(llm, expected)


@pytest.mark.parametrize("priority", [[1, 2], ["high"], [None], [1.5], "urgent"])
def test_bad_priority(llm: LLM, expected: list[int], priority: Any) -> None:
    with pytest.raises(RequestError, match="priority"):
        llm.generate([GOOD], greedy(STEPS), priority=priority)
    check_serves(llm, expected)


def test_a_line_that_announces_the_reason_is_told_with_it() -> None:
    """A compiler's error begins so; reports said that it was raised, and not what."""
    assert describe(RuntimeError("backend raised:\n\n  no header\nmore")) == (
        "RuntimeError: backend raised: no header"
    )
    assert describe(RuntimeError("it is so\nmore")) == "RuntimeError: it is so"
    assert describe(RuntimeError("raised:")) == "RuntimeError: raised:"
    assert describe(ValueError()) == "ValueError: ValueError()"


def test_the_largest_numbers_that_parameters_take(llm: LLM, expected: list[int]) -> None:
    """A step that could not write one for the device would end every request that is under way."""
    most = 2**63 - 1
    largest = greedy(STEPS, min_tokens=STEPS, top_k=most, num_drafts=most, stop_token_ids=[1])
    params = [largest, SamplingParams(temperature=0, max_tokens=None, min_tokens=most)]
    outputs = llm.generate([GOOD, GOOD], [*params])
    assert token_ids(outputs)[0] == expected == token_ids(outputs)[1][:STEPS]
    for name in ("min_tokens", "max_tokens", "top_k", "num_drafts"):
        with pytest.raises(RequestError, match=f"{name}={most + 1}"):
            SamplingParams(**{"max_tokens": None, name: most + 1})


@pytest.mark.parametrize("position", [0, 1, 3])
def test_one_bad_request_among_good_ones(llm: LLM, expected: list[int], position: int) -> None:
    steps = llm.stats().scheduler.total_steps
    prompts: list[Any] = [GOOD, GOOD, GOOD]
    prompts.insert(position, [VOCAB])
    with pytest.raises(RequestError, match=str(VOCAB)):
        llm.generate(prompts, greedy(STEPS, n=2))
    assert llm.stats().scheduler.total_steps == steps, "something was computed"
    check_serves(llm, expected)


def test_prompt_that_fits_the_context_and_not_the_cache(model: TinyModel, device: str) -> None:
    llm = make_llm(model, device, num_blocks=4)
    with pytest.raises(CapacityError) as caught:
        llm.generate([random_ids(3, 49)], greedy(4))
    assert "49 tokens" in str(caught.value)
    assert "48" in str(caught.value)
    check_serves(llm, generate(llm, [GOOD], greedy(STEPS))[0])


# ---- options -----------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], type[RepriseError], list[str]]] = {
    "unknown option": ({"colour": "red"}, ConfigError, ["colour", "known", "max_model_len"]),
    "two sizes of the cache": (
        {"num_blocks": 9, "kv_cache_memory_bytes": 10**6},
        ConfigError,
        ["num_blocks=9", "kv_cache_memory_bytes=1000000", "one of them"],
    ),
    "only the null block": ({"num_blocks": 1}, ConfigError, ["num_blocks=1", "at least 2"]),
    "cache of a few bytes": (
        {"num_blocks": None, "kv_cache_memory_bytes": 100},
        CapacityError,
        ["kv_cache_memory_bytes", "at least 2"],
    ),
    "context beyond the cache": (
        {"num_blocks": 4, "max_model_len": 200},
        CapacityError,
        ["max_model_len=200", "48"],
    ),
    "context beyond the model": (
        {"max_model_len": CONTEXT + 1},
        ModelError,
        [f"max_model_len={CONTEXT + 1}", f"max_position_embeddings={CONTEXT}", "hf_overrides"],
    ),
    "fewer tokens than requests": (
        {"max_num_batched_tokens": 4, "max_num_seqs": 8},
        ConfigError,
        ["max_num_batched_tokens=4", "max_num_seqs=8"],
    ),
    "no requests": ({"max_num_seqs": 0}, ConfigError, ["max_num_seqs=0", "positive"]),
    "requests as a flag": ({"max_num_seqs": True}, ConfigError, ["max_num_seqs=True", "positive"]),
    "block size": ({"block_size": 12}, ConfigError, ["block_size=12", "power of two"]),
    "memory share": (
        {"gpu_memory_utilization": 1.5},
        ConfigError,
        ["gpu_memory_utilization=1.5", "at most 1"],
    ),
    "memory share as text": (
        {"gpu_memory_utilization": "0.5"},
        ConfigError,
        ["gpu_memory_utilization='0.5'"],
    ),
    "cache beyond memory": (
        {"num_blocks": 10**12},
        CapacityError,
        ["1000000000000 blocks", "does not fit", "num_blocks"],
    ),
    "dtype": ({"dtype": "int3"}, ConfigError, ["dtype='int3'", "float32", "bfloat16"]),
    "load format": ({"load_format": "gguf"}, ConfigError, ["load_format='gguf'", "safetensors"]),
    "device": ({"device": "abacus"}, PlatformError, ["device='abacus'", "known: auto", "cpu"]),
    "device index": ({"device": "cpu:7"}, PlatformError, ["cpu:7", "out of range"]),
    "device index as text": ({"device": "cpu:x"}, PlatformError, ["cpu:x", "NAME:INDEX"]),
    "op": ({"ops": {"softmaxx": "triton"}}, OpError, ["softmaxx", "known", "rms_norm"]),
    "op implementation": (
        {"ops": {"rms_norm": "magic"}},
        OpError,
        ["rms_norm", "'magic'", "reference"],
    ),
    "overrides": ({"hf_overrides": [1]}, ConfigError, ["hf_overrides=[1]"]),
    "ops": ({"ops": "rms_norm=triton"}, ConfigError, ["ops='rms_norm=triton'"]),
    "seed": ({"seed": "x"}, ConfigError, ["seed='x'"]),
    "flag": ({"enable_prefix_caching": "yes"}, ConfigError, ["enable_prefix_caching='yes'"]),
    "device of a wrong type": ({"device": 0}, ConfigError, ["device=0"]),
}


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [pytest.param(*case, id=name) for name, case in OPTIONS.items()],
)
def test_bad_options(
    model: TinyModel,
    device: str,
    options: dict[str, Any],
    error: type[RepriseError],
    named: list[str],
) -> None:
    with pytest.raises(error) as caught:
        make_llm(model, **{"device": device, **options})
    for each in named:
        assert each in str(caught.value)


def test_a_step_is_no_larger_than_what_all_requests_can_bring(
    model: TinyModel, device: str, platform: Platform
) -> None:
    """However large it may be: its buffers would fill the machine's memory."""
    llm = make_llm(model, device, max_num_seqs=3, max_num_batched_tokens=10**12)
    assert llm.engine.runner.max_tokens == 3 * CONTEXT
    config = open_checkpoint(str(model.path), config_only=True).config
    with pytest.raises(CapacityError, match="lower max_num_batched_tokens"):
        build_model(
            config, max_model_len=16, table_blocks=1, dtype=torch.float32, cache_dtype=None,
            platform=platform, step_tokens=10**12,
        )  # fmt: skip


def test_dummy_weights_of_no_model() -> None:
    with pytest.raises(ConfigError, match="load_format='dummy' needs model="):
        LLM(load_format="dummy")


# ---- interruptions -----------------------------------------------------------------------


def modules_alive() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.nn.Module) for each in gc.get_objects())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_loading_leaves_nothing(
    model: TinyModel,
    device: str,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    from reprise.loading import weights

    parameters: list[weakref.ref[Any]] = []
    transfer = weights.transfer

    def interrupted(copies: Any, platform: Any) -> Any:
        transfer(copies[:7], platform)
        for each in copies:
            base = each.target._base
            parameters.append(weakref.ref(each.target if base is None else base))
        raise error

    modules = modules_alive()
    with monkeypatch.context() as patch:
        patch.setattr(weights, "transfer", interrupted)
        with pytest.raises(error):
            make_llm(model, device)
    assert len(parameters) > 7
    assert modules_alive() == modules
    assert [each() for each in parameters if each() is not None] == []
    check_serves(make_llm(model, device), expected)


@pytest.mark.parametrize("where", ["forward", "sampler", "results"])
@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_generation(
    llm: LLM,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    step: int,
    error: type[BaseException],
) -> None:
    """The device fails, or the user presses Ctrl-C, anywhere in a step."""
    runner: Any = llm.engine.runner
    owner, name = {
        "forward": (runner.graphs, "run"),
        "sampler": (runner, "sampler"),
        "results": (llm.engine.scheduler, "update"),
    }[where]
    inner = getattr(owner, name)
    calls = 0

    class Failing:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise error("now")
            return inner(*args, **kwargs)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(inner, attribute)

    prompts = [GOOD, *(random_ids(10 + i, 30 * i) for i in range(1, 5))]
    params = [greedy(STEPS), *([SamplingParams(n=2, presence_penalty=1.0, max_tokens=30)] * 4)]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Failing())
        with pytest.raises(error, match="now"):
            llm.generate(prompts, params)
    check_serves(llm, expected)
    assert generate(llm, prompts, params)[0] == expected
