"""The official client against ``reprise serve`` with the demo model; the oracle is ``LLM``."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from http_server import Server, until

from reprise import LLM, SamplingParams

ASK = [{"role": "user", "content": "What is 12 + 30?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
SUM = "47 + 38 ="
PROMPTS = [SUM, "Once upon a time", "Copy: river 42 k\n", "12 + 9 ="]


@pytest.fixture(scope="module")
def llm(device: str) -> Iterator[LLM]:
    with LLM(device=device, num_blocks=400) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def complete(client: openai.OpenAI, prompt: Any = SUM, **options: Any) -> Any:
    return client.completions.create(model="demo", prompt=prompt, **{"temperature": 0, **options})


def chat(client: openai.OpenAI, messages: Any = ASK, **options: Any) -> Any:
    return client.chat.completions.create(
        model="demo", messages=messages, **{"temperature": 0, **options}
    )


def test_completions_are_those_of_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    expected = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
    reply = complete(client, PROMPTS, max_tokens=24)
    assert [each.text for each in reply.choices] == [each.outputs[0].text for each in expected]
    assert [each.finish_reason for each in reply.choices] == [
        each.outputs[0].finish_reason for each in expected
    ]
    assert reply.usage.prompt_tokens == sum(len(each.prompt_token_ids) for each in expected)
    assert reply.usage.completion_tokens == sum(len(each.outputs[0].token_ids) for each in expected)
    ids = [each.prompt_token_ids for each in expected]
    assert [each.text for each in complete(client, ids, max_tokens=24).choices] == [
        each.text for each in reply.choices
    ]
    streamed = dict.fromkeys(range(len(PROMPTS)), "")
    for chunk in complete(client, PROMPTS, max_tokens=24, stream=True):
        for each in chunk.choices:
            streamed[each.index] += each.text
    assert list(streamed.values()) == [each.text for each in reply.choices]


def test_chats_are_those_of_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.chat(STORY, SamplingParams(temperature=0, max_tokens=60))
    reply = chat(client, STORY, max_completion_tokens=60)
    assert reply.choices[0].message.content == expected.outputs[0].text
    assert reply.choices[0].message.role == "assistant"
    chunks = list(
        chat(client, STORY, max_tokens=60, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == expected.outputs[0].text
    assert chunks[-1].usage == reply.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": STORY[0]["content"]}]}]
    assert chat(client, parts, max_tokens=60).choices[0].message.content == text
    assert chat(client, ASK).choices[0].message.content == "12 + 30 = 42"  # as long as it takes


def test_seeds_and_samples(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=12, top_p=0.95)
    (expected,) = llm.generate("Once upon a time", params)
    options = {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 12, "top_p": 0.95}
    for _ in range(2):
        reply = complete(client, "Once upon a time", **options)
        assert [each.text for each in reply.choices] == [each.text for each in expected.outputs]
    assert reply.usage.prompt_tokens == len(expected.prompt_token_ids)  # once
    extra = {"top_k": 1, "min_tokens": 5, "ignore_eos": True}
    greedy = complete(client, temperature=1.0, extra_body=extra, max_tokens=6)
    (plain,) = llm.generate(SUM, SamplingParams(temperature=0, ignore_eos=True, max_tokens=6))
    assert greedy.choices[0].text == plain.outputs[0].text


def test_stops(client: openai.OpenAI) -> None:
    whole = complete(client, "Once upon a time", max_tokens=40).choices[0].text
    stop = whole[20:26]
    for stream in (False, True):
        reply = complete(client, "Once upon a time", max_tokens=40, stop=[stop, "§"], stream=stream)
        chunks = list(reply) if stream else [reply]
        assert "".join(each.choices[0].text for each in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].choices[0].stop_reason == stop
    kept = complete(
        client, "Once upon a time", max_tokens=40, stop=stop,
        extra_body={"include_stop_str_in_output": True},
    )  # fmt: skip
    assert kept.choices[0].text == whole[: whole.index(stop) + len(stop)]


def test_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.generate(SUM, SamplingParams(temperature=0, max_tokens=3, logprobs=2))
    positions = expected.outputs[0].logprobs
    assert positions is not None
    found = complete(client, logprobs=2, max_tokens=3).choices[0].logprobs
    for place, position in enumerate(positions):
        chosen = next(iter(position.values()))
        assert found.tokens[place] == chosen.decoded_token
        assert found.token_logprobs[place] == pytest.approx(chosen.logprob, abs=1e-4)
        wanted = {each.decoded_token: each.logprob for each in position.values()}
        assert found.top_logprobs[place] == pytest.approx(wanted, abs=1e-4)
    assert found.text_offset == [sum(map(len, found.tokens[:place])) for place in range(3)]
    streamed = [
        each.choices[0].logprobs for each in complete(client, logprobs=2, max_tokens=3, stream=True)
    ]
    joined = [each for part in streamed if part for each in part.text_offset]
    assert joined == found.text_offset
    # Chats, with half characters.
    odd = [{"role": "user", "content": "Repeat after me: 👍🏽 é"}]
    options: dict[str, Any] = {
        "logprobs": True, "top_logprobs": 3, "max_tokens": 30, "temperature": 1.0, "seed": 1,
        "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
    }  # fmt: skip
    reply = chat(client, odd, **options).choices[0]
    content = reply.logprobs.content
    spelled = bytes(byte for each in content for byte in each.bytes)
    assert spelled.decode(errors="replace") == reply.message.content
    assert all(len(each.top_logprobs) == 3 for each in content)
    for each in content:
        values = [top.logprob for top in each.top_logprobs]
        assert values == sorted(values, reverse=True)
    parts = chat(client, odd, stream=True, **options)
    tokens = [
        each.token
        for part in parts
        if part.choices[0].logprobs
        for each in part.choices[0].logprobs.content
    ]
    assert tokens == [each.token for each in content]


def test_what_lm_eval_asks(client: openai.OpenAI, llm: LLM) -> None:
    """Log likelihoods of a prompt: echo, logprobs and no new token, or one."""
    text = "Once upon a time there was a fox"
    (expected,) = llm.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0))
    assert expected.prompt_logprobs is not None
    ids = expected.prompt_token_ids
    pairs = zip(expected.prompt_logprobs[1:], ids[1:], strict=True)
    wanted = [each[token].logprob for each, token in pairs if each is not None]
    for prompt in (text, ids):
        for most in (0, 1):
            choice = complete(client, prompt, echo=True, logprobs=1, max_tokens=most).choices[0]
            assert choice.text.startswith(text)
            found = choice.logprobs
            assert len(found.tokens) == len(ids) + most
            assert "".join(found.tokens[: len(ids)]) == text
            assert found.token_logprobs[0] is None
            assert found.top_logprobs[0] is None
            assert found.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=1e-4)
            for place in range(1, len(ids)):  # what is_greedy is made of
                best = max(found.top_logprobs[place].values())
                assert best >= found.token_logprobs[place]
    chunks = list(complete(client, text, echo=True, max_tokens=2, stream=True))
    assert chunks[0].choices[0].text == text


def test_an_echo_has_its_own_number_of_alternatives(client: openai.OpenAI) -> None:
    """Beside ``prompt_logprobs``, which asks for more or fewer."""
    for alternatives, of_prompt in ((1, 3), (3, 1)):
        choice = complete(
            client, "Once upon a time", echo=True, logprobs=alternatives, max_tokens=2,
            extra_body={"prompt_logprobs": of_prompt},
        ).choices[0]  # fmt: skip
        prompt = choice.prompt_logprobs
        found = choice.logprobs.top_logprobs[1 : len(prompt)]
        assert {len(each) for each in found} <= {alternatives, alternatives + 1}
        assert {len(each) for each in prompt[1:]} <= {of_prompt, of_prompt + 1}


def test_errors_have_the_clients_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4o", messages=ASK)  # type: ignore[arg-type]
    for most in ("x " * 3000, list(range(5)) * 1000):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 2048") as error:
            complete(client, most)
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, [1, 999_999])
    assert error.value.body["message"].startswith("prompt_token_ids contains")  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\]"):
        chat(client, [{"role": "user", "content": [{"type": "image_url"}]}])
    with pytest.raises(openai.BadRequestError, match="token 5000"):
        complete(client, logit_bias={"5000": 1})
    # One bad request among good ones harms none of the others.
    with pytest.raises(openai.BadRequestError):
        complete(client, [SUM, "x " * 3000, SUM])
    assert complete(client).choices[0].text == " 85"


def test_many_at_once_and_who_leaves(server: Server, client: openai.OpenAI, llm: LLM) -> None:
    prompts = [f"{number} + 38 =" for number in range(10, 26)]
    expected = [
        each.outputs[0].text
        for each in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
    ]

    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as ours:

            async def one(number: int) -> str:
                stream = await ours.completions.create(
                    model="demo", prompt=prompts[number], temperature=0, stream=True,
                    max_tokens=8,
                )  # fmt: skip
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def leave(number: int) -> None:
                stream = await ours.completions.create(
                    model="demo", prompt="Once upon a time", stream=True, max_tokens=1500,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                async for _ in stream:
                    number -= 1
                    if number < 0:
                        break
                await stream.close()

            leaving = [asyncio.create_task(leave(number)) for number in range(4)]
            texts = await asyncio.gather(*(one(number) for number in range(16)))
            await asyncio.gather(*leaving)
            # A plain request that is cancelled.
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(
                    ours.completions.create(
                        model="demo", prompt="x", max_tokens=1500, extra_body={"ignore_eos": True}
                    ),
                    0.3,
                )
            return list(texts)

    assert asyncio.run(scenario()) == expected
    nothing_is_left(server)


def nothing_is_left(server: Server) -> None:
    with server.client() as ours:

        def nothing() -> bool:
            text = ours.get("/metrics").text
            values = {
                line.partition("{")[0]: float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith(("vllm:num_requests", "vllm:kv_cache_usage_perc"))
            }
            idle = {"server_load": 0}
            return set(values.values()) == {0.0} and bool(ours.get("/load").json() == idle)

        until(nothing)


def test_abort_by_id(server: Server, client: openai.OpenAI) -> None:
    found: list[Exception] = []

    def ask() -> None:
        while not found:  # it may come to its end before
            try:
                complete(client, max_tokens=1500, extra_headers={"x-request-id": "mine"},
                         extra_body={"ignore_eos": True})  # fmt: skip
            except openai.APIStatusError as error:
                found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    with server.client() as ours:
        assert ours.post("/abort", json={"request_id": "cmpl-other"}).status_code == 404
        until(lambda: ours.post("/abort", json={"request_id": "cmpl-mine"}).status_code != 404)
    thread.join(100)
    (error,) = found
    assert isinstance(error, openai.APIStatusError)
    assert error.status_code == 499  # which clients do not send again
    assert error.code == "request_aborted"
    nothing_is_left(server)


def test_tokens_and_texts(server: Server, llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    with server.client() as ours:
        for text in ("Once upon a time", "👍🏽 é\n", "<|im_end|>"):
            found = ours.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
            assert found["tokens"] == tokenizer.encode(text)
            assert found["count"] == len(found["tokens"])
            assert found["max_model_len"] == 2048
            assert found["token_strs"] == tokenizer.convert_ids_to_tokens(found["tokens"])
            back = ours.post("/detokenize", json={"tokens": found["tokens"]}).json()
            assert back == {"prompt": text}
        chatted = ours.post("/tokenize", json={"messages": ASK}).json()
        (expected,) = llm.chat(ASK, SamplingParams(max_tokens=1))
        assert chatted["tokens"] == expected.prompt_token_ids
        wrong = ours.post("/detokenize", json={"tokens": [5, 99999]})
        assert wrong.status_code == 400


@pytest.mark.parametrize("echo", [False, True])
def test_streams_have_the_token_ids_that_plain_replies_have(
    client: openai.OpenAI, echo: bool
) -> None:
    """The prompt's once for each choice, with its first chunk, where vLLM has them."""
    wanted: dict[str, Any] = {"max_tokens": 3, "n": 2, "extra_body": {"return_token_ids": True}}
    options = {**wanted, "prompt": PROMPTS[:2], "echo": echo}
    plain = {each.index: each for each in complete(client, **options).choices}
    prompts: dict[int, list[list[int]]] = {}
    ids: dict[int, list[int]] = {}
    for chunk in complete(client, **options, stream=True):
        (choice,) = chunk.choices
        ids.setdefault(choice.index, []).extend(getattr(choice, "token_ids", ()))
        if hasattr(choice, "prompt_token_ids"):
            prompts.setdefault(choice.index, []).append(choice.prompt_token_ids)
    assert prompts == {index: [each.prompt_token_ids] for index, each in plain.items()}
    assert ids == {index: each.token_ids for index, each in plain.items()}

    reply = chat(client, **wanted)
    firsts = [
        each.prompt_token_ids
        for each in chat(client, **wanted, stream=True)
        if each.choices[0].delta.role is not None
    ]
    assert firsts == [reply.prompt_token_ids] * 2


def test_metrics_say_what_the_usage_said(server: Server, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        with server.client() as ours:
            lines = ours.get("/metrics").text.splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    label = '{engine="0",model_name="demo"}'
    before = read()
    usage = [complete(client, n=2, max_tokens=5).usage, chat(client).usage]
    list(complete(client, max_tokens=4, stream=True))
    after: dict[str, float] = {}

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    requests = 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}'

    def counted() -> bool:
        """A reply is counted when its last byte is on its way, which may come first."""
        after.update(read())
        return grown(requests) >= 2

    until(counted)
    generated = sum(each.completion_tokens for each in usage) + 4
    assert grown(f"vllm:generation_tokens_total{label}") == generated
    assert grown(f"vllm:time_to_first_token_seconds_count{label}") == 4
    assert grown(f"vllm:inter_token_latency_seconds_count{label}") in (1, 2, 3)
    assert grown(requests) == 2
    for name in (
        "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prompt_tokens",
        "request_inference_time_seconds",
    ):  # fmt: skip
        assert f"vllm:{name}_count{label}" in after
    for name in ("graph_canary_failures_total", "eager_steps_total"):
        assert f"reprise:{name}{label}" in after


def test_the_first_kinds_of_line_in_the_log(server: Server, client: openai.OpenAI) -> None:
    complete(client, max_tokens=2, extra_headers={"x-request-id": "look-for-me"})
    until(lambda: "look-for-me" in server.log)
    (line,) = (each for each in server.lines if "look-for-me" in each)
    assert "POST /v1/completions 200" in line
    assert "prompt_tokens=7 completion_tokens=2" in line
    # A text is not logged either where it is said to be wrong, or is in a field that is not known.
    named = {"extra_headers": {"x-request-id": "look-for-this"}, "extra_body": {"new_field": SUM}}
    with pytest.raises(openai.BadRequestError, match=re.escape(SUM)):
        chat(client, [SUM], **named)
    until(lambda: "look-for-this" in server.log)
    (line,) = (each for each in server.lines if "look-for-this" in each)
    assert "POST /v1/chat/completions 400" in line
    assert SUM not in server.log


def test_a_long_text_keeps_no_short_one_waiting(server: Server) -> None:
    """Tokens are counted of texts of any length."""

    def seconds(path: str, **body: Any) -> float:
        began = time.monotonic()
        with server.client() as client:
            assert client.post(path, json=body).status_code == 200
        return time.monotonic() - began

    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(seconds, "/tokenize", prompt="a b " * 250_000)
        time.sleep(0.5)
        assert not long.done()
        brief = seconds("/v1/completions", prompt="x", max_tokens=1)
    assert brief < long.result() / 2
