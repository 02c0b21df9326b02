"""``/v1/responses`` through the official client, streamed and plain."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from http_server import Server, Start, until
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from reprise.loading.checkpoint import DEMO_MODEL
from reprise.server.responses.items import messages_of
from reprise.server.responses.store import ResponseStore, Stored
from reprise.server.truncation import fitting, shortened

pytest.importorskip("xgrammar")

TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{{ "<tool_call>" if tools else "" }}
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.reasoning_content }}{{ message.content }}
{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOL = {
    "type": "function", "name": "get_weather", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                   "required": ["city"], "additionalProperties": False},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city":  "Rome"}}\n</tool_call>'
ASK = "What is the weather?"


@pytest.fixture(scope="module")
def client(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    file = tmp_path_factory.mktemp("template") / "tools.jinja"
    file.write_text(TEMPLATE)
    server = Server(
        ["-m", "reprise", "serve", "--port", "0", "--device", device, "--num-blocks", "400",
         "--chat-template", str(file), "--reasoning-parser", "qwen3"]
    )  # fmt: skip
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found
    server.close()


def create(client: Any, **options: Any) -> Any:
    options = {"input": ASK, "temperature": 0, "max_output_tokens": 300, **options}
    return client.responses.create(**options)


def written(text: str) -> dict[str, Any]:
    """The model is made to write this."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


VARYING = {"id", "created_at", "completed_at", "call_id"}


def stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in VARYING}
    return [stable(each) for each in value] if isinstance(value, list) else value


def both(client: openai.OpenAI, **options: Any) -> tuple[Any, list[Any]]:
    """A plain response; a stream has told of the same, in the order that clients rely on."""
    plain = create(client, **options)
    events = list(create(client, stream=True, **options))
    assert [each.sequence_number for each in events] == list(range(len(events)))
    names = [each.type for each in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == f"response.{plain.status}"
    last = events[-1].response
    assert {each.response.id for each in (events[0], events[1], events[-1])} == {last.id}
    expected, found = (stable(each.model_dump()) for each in (plain, last))
    for each in (expected, found):
        each["usage"].pop("input_tokens_details")  # the second one finds what the first has cached
    assert found == expected
    for number, item in enumerate(last.output):
        own = [each for each in events if getattr(each, "output_index", None) == number]
        assert own[0].type == "response.output_item.added"
        assert own[0].item.status == "in_progress"
        assert (own[-1].type, own[-1].item) == ("response.output_item.done", item)
        assert {each.item_id for each in own[1:-1]} == {item.id}
        deltas = "".join(each.delta for each in own if each.type.endswith(".delta"))
        text = item.arguments if item.type == "function_call" else item.content[0].text
        assert deltas == text
        inner = [each.type for each in own[1:-1] if not each.type.endswith(".delta")]
        kind = {"message": "output_text", "reasoning": "reasoning_text"}.get(item.type)
        if kind is None:
            assert inner == ["response.function_call_arguments.done"]
        else:
            assert inner == ["response.content_part.added", f"response.{kind}.done",
                             "response.content_part.done"]  # fmt: skip
    return plain, events


def test_a_response_is_the_chat_s_answer(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="demo", temperature=0, max_tokens=12,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}],
    )  # fmt: skip
    plain, _ = both(client, instructions="Be brief.", max_output_tokens=12)
    message = chat.choices[0].message
    assert plain.output_text == (message.content or "")
    assert (plain.status, plain.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert plain.output[-1].status == "incomplete"
    assert (plain.usage.input_tokens, plain.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    plain, _ = both(client, **written("It rains."))
    assert (plain.status, plain.output_text) == ("completed", "It rains.")
    assert plain.usage.input_tokens_details.cached_tokens >= 0
    items = [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}]
    assert create(client, input=items, **written("It rains.")).output_text == "It rains."


def test_reasoning_calls_and_text_are_items(client: openai.OpenAI) -> None:
    text = f"<think>\nLet me look.\n</think>\n\nI look it up.\n{CALL}\n{CALL}"
    extra = {"structured_outputs": {"regex": re.escape(text)}}
    plain, _ = both(client, tools=[TOOL], extra_body=extra)
    # The grammar holds behind the thought's end only, which the model may never write.
    assert plain.output[0].type in ("message", "reasoning")
    answer = f"I look it up.\n{CALL}\n{CALL}"
    plain, _ = both(client, tools=[TOOL], **written(answer))
    kinds = [each.type for each in plain.output]
    assert kinds == ["message", "function_call", "function_call"]
    assert [each.arguments for each in plain.output[1:]] == ['{"city":  "Rome"}'] * 2
    names = [each.id for each in plain.output] + [each.call_id for each in plain.output[1:]]
    assert len(set(names)) == 5
    plain, _ = both(client, tools=[TOOL], parallel_tool_calls=False, **written(answer))
    assert [each.type for each in plain.output] == ["message", "function_call"]
    choice = {"type": "function", "name": "get_weather"}
    plain, _ = both(client, tools=[TOOL], tool_choice=choice)
    (call,) = plain.output
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    assert plain.status == "completed"


def test_tokens_of_thoughts_are_counted_where_their_tags_are_no_tokens(
    client: openai.OpenAI,
) -> None:
    """One is a thought's if the text before it has not ended the thought; streamed or not."""
    text = "<think>\nLet me look.\n</think>\n\nIt rains."
    options: dict[str, Any] = {
        "model": "demo", "messages": [{"role": "user", "content": ASK}], "temperature": 0,
        "extra_body": {"structured_outputs": {"choice": [text]}, "return_token_ids": True},
    }  # fmt: skip
    plain = client.chat.completions.create(**options)
    ids = plain.choices[0].token_ids  # type: ignore[attr-defined]
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    assert tokenizer.decode(ids) == text
    before = [tokenizer.decode(ids[:place]) for place in range(len(ids))]
    expected = sum("</think>" not in each for each in before)
    assert 8 < expected < len(ids) - 2
    *_, last = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    for usage in (plain.usage, last.usage):
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == expected


def test_reasoning_of_a_stub(start: Start) -> None:
    """The same parser as a chat's: what is thought comes as an item of its own."""
    server = start()
    pieces = ["<th", "ink>\nA", " b", "</thi", "nk>\n\nC", "alm"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        plain, _ = both(found, input=json.dumps({"pieces": pieces}))
    thought, answer = plain.output
    assert (thought.content[0].text, answer.content[0].text) == ("A b", "Calm")


class Weather(BaseModel):
    city: str = Field(max_length=12)
    days: int = Field(ge=0, le=99)


def test_the_client_parses_and_accumulates(client: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "input": ASK, "temperature": 0, "max_output_tokens": 200}
    parsed = client.responses.parse(text_format=Weather, **options)
    assert isinstance(parsed.output_parsed, Weather)
    with client.responses.stream(text_format=Weather, **options) as stream:
        snapshots = [each.snapshot for each in stream if each.type == "response.output_text.delta"]
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    assert snapshots[-1] == parsed.output_text

    async def through_the_other_client() -> Any:
        other = openai.AsyncOpenAI(base_url=client.base_url, api_key="none")
        async with other, other.responses.stream(text_format=Weather, **options) as found:
            async for _ in found:
                pass
            return await found.get_final_response()

    assert asyncio.run(through_the_other_client()).output_parsed == parsed.output_parsed
    form = {"type": "json_object"}
    assert both(client, text={"format": form}, max_output_tokens=8)[0].output_text.startswith("{")


class GetWeather(BaseModel):
    """Weather of a city."""

    city: Literal["Rome", "Oslo"]
    unit: Literal["C", "F"] | None = None


def test_the_client_parses_arguments_of_tools(client: openai.OpenAI) -> None:
    """In both APIs, streamed and plain: as instances of the class that the tool was made of."""
    tool = openai.pydantic_function_tool(GetWeather)
    messages: Any = [{"role": "user", "content": ASK}]
    asked: Any = {"model": "demo", "temperature": 0, "tools": [tool], "tool_choice": "required",
                  "parallel_tool_calls": False}  # fmt: skip
    found = []
    plain = client.chat.completions.parse(messages=messages, max_tokens=300, **asked)
    calls = plain.choices[0].message.tool_calls
    assert calls is not None
    found.append(calls[0].function.parsed_arguments)
    with client.chat.completions.stream(messages=messages, max_tokens=300, **asked) as stream:
        done = [each for each in stream if each.type == "tool_calls.function.arguments.done"]
        assert len(done) == 1
        found.append(done[0].parsed_arguments)
        assert stream.get_final_completion().choices[0].finish_reason == "tool_calls"
    given: Any = {"input": ASK, "max_output_tokens": 300, **asked}
    found.append(client.responses.parse(**given).output[0].parsed_arguments)  # type: ignore[union-attr]
    with client.responses.stream(**given) as events:
        found.append(events.get_final_response().output[0].parsed_arguments)  # type: ignore[union-attr]
    assert isinstance(found[0], GetWeather)
    assert found == [found[0]] * 4


def test_a_loop_of_the_agents_sdk(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is made, its answer goes back, and an answer follows, whichever API is used.

    ``pip install openai-agents`` runs this test.
    """
    agents = pytest.importorskip("agents", exc_type=ImportError)  # which wants a newer client
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    asked: list[str] = []

    @agents.function_tool
    def get_weather(city: Literal["Rome", "Oslo"]) -> str:
        """Weather of a city."""
        asked.append(city)
        return "sunny"

    async def run(kind: Any, streamed: bool) -> tuple[str, list[str]]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as ours:
            agent = agents.Agent(
                name="A", instructions="Be brief.", tools=[get_weather],
                model=kind(model="demo", openai_client=ours),
                model_settings=agents.ModelSettings(
                    tool_choice="get_weather", temperature=0, max_tokens=200
                ),
            )  # fmt: skip
            if streamed:
                found = agents.Runner.run_streamed(agent, "What is the weather?", max_turns=3)
                async for _ in found.stream_events():
                    pass
            else:
                found = await agents.Runner.run(agent, "What is the weather?", max_turns=3)
            return str(found.final_output), [type(each).__name__ for each in found.new_items]

    for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
        results = [asyncio.run(run(kind, streamed)) for streamed in (False, True)]
        assert results[0] == results[1]
        assert results[0][1] == ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]
    assert len(asked) == 4
    assert set(asked) <= {"Rome", "Oslo"}


def test_the_client_s_own_runner_of_tools(start: Start) -> None:
    """A call is made, its answer goes back, and an answer follows; of clients that have it."""
    runner = pytest.importorskip("openai.lib.responses_tool_runner")
    server = start("--tool-call-parser", "hermes")
    asked: list[dict[str, Any]] = []

    def execute(arguments: dict[str, Any]) -> str:
        asked.append(arguments)
        return "sunny"

    pieces = [CALL[:20], CALL[20:]]
    params = {"model": "stub", "input": json.dumps({"pieces": pieces}), "max_output_tokens": 9}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for stream in (False, True):
            loop = runner.ResponsesToolRunner(functions=[runner.RegisteredFunction(TOOL, execute)])
            assert loop.run(client, params, max_steps=2, stream=stream).output_text == "x" * 9
    assert asked == [{"city": "Rome"}] * 2


def test_log_probabilities_are_of_the_answer_s_tokens(client: openai.OpenAI) -> None:
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    plain, _ = both(client, max_output_tokens=6, **options)
    (part,) = plain.output[-1].content
    assert "".join(each.token for each in part.logprobs) == part.text
    assert {len(each.top_logprobs) for each in part.logprobs} == {2}


def test_a_conversation_goes_on_from_what_was_stored(client: openai.OpenAI) -> None:
    first = create(client, instructions="Be brief.", tools=[TOOL], **written(f"Well.\n{CALL}"))
    call = first.output[1]
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    stored = create(client, previous_response_id=first.id, input=[answer], max_output_tokens=1)
    said = [each.model_dump() for each in first.output]
    whole = [{"role": "user", "content": ASK}, *said, answer]
    alone = create(client, input=whole, max_output_tokens=1, store=False)
    assert stored.usage.input_tokens == alone.usage.input_tokens
    assert stored.output_text == alone.output_text
    assert client.responses.retrieve(first.id) == first
    client.responses.delete(first.id)
    for gone in (first.id, alone.id, "resp_x"):
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError) as caught:
            create(client, previous_response_id=gone)
        assert caught.value.code == "previous_response_not_found"
    assert create(client, previous_response_id=stored.id, max_output_tokens=1).id


def test_one_under_way_is_seen_and_cancelled(client: openai.OpenAI) -> None:
    many = {"max_output_tokens": 1500, "extra_body": {"ignore_eos": True}}
    for _ in range(9):  # on a busy machine it may be over when somebody looks
        stream = iter(create(client, stream=True, **many))
        name = next(stream).response.id
        if client.responses.retrieve(name).status != "in_progress":
            continue
        with contextlib.suppress(openai.BadRequestError):
            assert client.responses.cancel(name).status == "cancelled"
            break
    last = list(stream)[-1]
    assert (last.response.status, last.response.id) == ("cancelled", name)
    assert last.response.usage.output_tokens < 1500
    assert client.responses.retrieve(name).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
        client.responses.cancel(name)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_x")


def test_one_that_fails_and_one_whose_client_leaves(start: Start) -> None:
    server = start()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        failed = list(client.responses.create(input=json.dumps({"fail": 2}), stream=True))[-1]
        assert (failed.type, failed.response.status) == ("response.failed", "failed")
        with pytest.raises(openai.InternalServerError):
            client.responses.create(input=json.dumps({"fail": 2}))
        stream = client.responses.create(input=json.dumps({"wait": True}), stream=True)
        name = next(iter(stream)).response.id
        stream.close()

        def is_gone() -> bool:
            try:
                client.responses.retrieve(name)
            except openai.NotFoundError:
                return True
            return False

        until(is_gone)


LOOSE = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {
         "type": "integer"}}, "required": ["city"]}  # fmt: skip
UNBOUND = {"type": "object", "properties": {"all": {"type": "array", "items": {
           "type": "string"}, "uniqueItems": True}}}  # fmt: skip
"""What no grammar follows."""


@pytest.mark.parametrize(
    ("strict", "parameters", "found"),
    [({"strict": None}, LOOSE, True), ({"strict": True}, LOOSE, True), ({}, LOOSE, True),
     ({"strict": False}, LOOSE, False), ({"strict": None}, None, True), ({}, UNBOUND, False),
     ({"strict": None}, UNBOUND, False)],
)  # fmt: skip
def test_tools_are_strict_unless_they_say_otherwise_or_cannot_be(
    client: openai.OpenAI, strict: dict[str, Any], parameters: Any, found: bool
) -> None:
    """OpenAI's default of this API; the prompt is the same."""
    tool = {"type": "function", "name": "get_weather", "parameters": parameters}
    other = {"type": "function", "name": "now", "strict": False}
    first, second = (
        create(client, tools=[{**tool, **each}, other], max_output_tokens=2)
        for each in (strict, {"strict": False})
    )
    assert [each.strict for each in first.tools] == [found, False]
    assert first.usage.input_tokens == second.usage.input_tokens
    assert first.tools[0].parameters == parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": True}, "background=True"), ({"conversation": "c"}, "conversation='c'"),
        ({"truncation": "most"}, "truncation"), ({"prompt": {"id": "x"}}, "stored prompts"),
        ({"tools": [{"type": "web_search"}]}, "'web_search': this server has function tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [{**TOOL, "name": "get weather"}]}, "name='get weather': give letters"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading=True"),
        ({"tools": [{**TOOL, "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format={"),
        ({"reasoning": {"effort": "turbo"}}, "reasoning.effort='turbo'"),
        ({"reasoning": {"generate_summary": "concise"}}, "reasoning.generate_summary"),
        ({"extra_body": {"regex": "a"}}, "regex='a': give structured_outputs"),
        ({"tools": [{**TOOL, "strict": "yes"}]}, "strict='yes': give true or false"),
        ({"tools": [{**TOOL, "parameters": UNBOUND}]}, "uniqueItems"),
        ({"tools": [{**TOOL, "parameters": {"type": "string"}}]}, "arguments are an object"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "reads text alone"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference'"),
        ({"input": []}, "give a text, or a list"), ({"input": 3}, "give a text, or a list"),
        ({"input": [{"role": "robot", "content": "x"}]}, "'robot'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "call_id=None: give a text"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary='detailed'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "json_schema"),
        ({"extra_body": {"max_tokens": 3}}, "give max_output_tokens"),
        ({"extra_body": {"n": 2}}, "n=2"), ({"top_p": 7}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=re.escape(message)):
            create(client, stream=stream, **options)


def test_what_is_not_looked_at_is_listed(client: openai.OpenAI) -> None:
    asked: Any = {
        "text": {"fromat": {}, "verbosity": "low"}, "reasoning": {"context": "auto"},
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "cache": 1}],
                   "name": "me"},
                  {"role": "assistant", "content": "x", "phase": "commentary", "id": None},
                  {"role": "user", "content": "x"}],
        "extra_body": {"foo": 1, "prompt_cache_options": {"ttl": "30m"}}, "max_output_tokens": 1,
    }  # fmt: skip
    headers = client.responses.with_raw_response.create(model="demo", **asked).headers
    assert headers["x-reprise-ignored-fields"].split(",") == [
        "foo", "input[].content[].cache", "input[].name", "reasoning.context", "text.fromat",
    ]  # fmt: skip


def test_what_came_back_may_be_sent_again(client: openai.OpenAI) -> None:
    """As the client's own classes write it, with null for what is not there."""
    first = create(client, tools=[TOOL], **written(f"Well.\n{CALL}"))
    answer = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "sun"}
    sent = [*(each.model_dump() for each in first.output), answer]
    tools = [each.model_dump(by_alias=True) for each in first.tools]
    assert len(tools[0]) > len(TOOL)
    found, alone = (
        create(client, input=[{"role": "user", "content": ASK}, *sent], tools=each,
               max_output_tokens=1)
        for each in (tools, [TOOL])
    )  # fmt: skip
    assert found.usage.input_tokens == alone.usage.input_tokens


def test_tokens_of_the_input_are_counted(client: openai.OpenAI) -> None:
    asked: Any = {"instructions": "Be brief.", "input": ASK, "tools": [TOOL]}
    counted = client.responses.input_tokens.count(model="demo", **asked)
    assert counted.input_tokens == create(client, max_output_tokens=1, **asked).usage.input_tokens
    # What says nothing of the prompt changes nothing.
    salted = client.responses.input_tokens.count(
        model="demo", **asked, extra_body={"cache_salt": "a", "truncation": "auto"}
    )
    assert salted.input_tokens == counted.input_tokens
    with pytest.raises(openai.BadRequestError, match="give truncation='auto'"):
        client.post("/responses/compact", cast_to=object, body={"model": "demo", "input": ASK})


def test_what_an_assistant_did_in_a_row_is_one_message() -> None:
    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}

    items = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}], "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        call("f"), call("g"),
        {"type": "function_call_output", "call_id": "f", "output": "1"},
        {"type": "function_call_output", "call_id": "g",
         "output": [{"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"}, call("h"),
    ]  # fmt: skip
    found = messages_of(items, "I")
    assert [each["role"] for each in found] == [
        "system", "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip
    assert found[0]["content"] == "I\n\nS"
    assert (found[2]["reasoning_content"], found[2]["content"]) == ("r", "b")
    assert [each["id"] for each in found[2]["tool_calls"]] == ["f", "g"]
    assert [each["content"] for each in found[3:5]] == ["1", "2"]
    assert [each["id"] for each in found[5]["tool_calls"]] == ["h"]


def test_the_store_is_bounded() -> None:
    store = ResponseStore(10_000)
    for number in range(300):
        store.begin(str(number), "{}")
        store.put(str(number), Stored("x" * 100 * (number % 7)))
        store.get("0") if number < 5 else None
        assert store.size <= 10_000
    assert 5 < len(store) < 60
    store.put("huge", Stored("x" * 20_000))
    assert store.get("huge") is None
    assert sum(store.delete(str(number)) for number in range(300)) > 5
    assert (store.size, len(store)) == (0, 0)
    store.begin("one", "x" * 20_000)
    assert store.get("one") is not None
    assert not store.delete("one")
    store.forget(["one", "two"])
    assert store.get("one") is None


def test_what_a_response_was_computed_from_is_listed(client: openai.OpenAI) -> None:
    first = create(client, instructions="Be brief.", **written("Well."))
    items = [{"role": "user", "content": [{"type": "input_text", "text": f"{n}"}]} for n in "abc"]
    second = create(client, previous_response_id=first.id, input=items, max_output_tokens=1)
    listed = list(client.responses.input_items.list(second.id, order="asc"))
    texts = [each.content[0].text for each in listed]
    assert texts == [ASK, "Well.", "a", "b", "c"]
    assert [each.role for each in listed] == ["user", "assistant", "user", "user", "user"]
    assert listed[1].id == first.output[0].id
    pages = client.responses.input_items.list(second.id, limit=2)
    assert [each.id for each in pages] == [each.id for each in reversed(listed)]
    assert [each.content[0].text for each in pages.data] == ["c", "b"]
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_x"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
            client.responses.input_items.list(second.id, extra_query=wrong)
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list("resp_x")


def test_the_oldest_turns_are_left_out_where_that_is_asked_for(client: openai.OpenAI) -> None:
    """The rest is what it would be without them."""
    turn = [{"role": "user", "content": "tell me more " * 20},
            {"role": "assistant", "content": "and more " * 20}]  # fmt: skip
    options = {"instructions": "Be brief.", "store": False, "max_output_tokens": 1}
    last = [{"role": "user", "content": ASK}]
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, input=turn * 99 + last, **options)
    assert caught.value.code == "context_length_exceeded"
    found = create(client, input=turn * 99 + last, truncation="auto", **options)
    assert found.truncation == "auto"
    used = [create(client, input=turn * number + last, **options).usage.input_tokens
            for number in (1, 2)]  # fmt: skip
    context = client.models.list().data[0].max_model_len  # type: ignore[attr-defined]
    turns, rest = divmod(found.usage.input_tokens - used[0], used[1] - used[0])
    assert rest == 0
    assert context - (used[1] - used[0]) <= found.usage.input_tokens < context
    assert turns > 1
    alone = create(client, input=turn * (turns + 1) + last, **options)
    assert (alone.output_text, alone.truncation) == (found.output_text, "disabled")
    with pytest.raises(openai.BadRequestError) as caught:  # one message that is too long
        create(client, input="more " * 9999, truncation="auto", **options)
    assert caught.value.code == "context_length_exceeded"


ROLES = st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=12)


@given(ROLES, st.integers(1, 14))
def test_turns_are_left_out_whole(roles: list[str], most: int) -> None:
    messages = [{"role": role, "content": number} for number, role in enumerate(roles)]
    for each, shorter in itertools.pairwise(shortened(messages)):
        assert len(shorter) < len(each)
        kept = [message["content"] for message in shorter]
        assert kept == sorted(kept)
        first = next(message for message in shorter if message["role"] != "system")
        assert first["role"] == "user"
        assert kept[-1] == len(roles) - 1
    choices = [len(each) for each in shortened(messages)]
    found = fitting(messages, most, lambda given: {"prompt_token_ids": [0] * len(given)})
    room = [each for each in choices if each <= most]
    assert len(found["prompt_token_ids"]) == (room[0] if room else choices[-1])


def test_any_http_process_knows_a_response(start: Start) -> None:
    """Connections meet one of two processes or the other; what one has kept both know."""
    server = start("--api-server-count", "2")
    pieces = json.dumps({"pieces": ["It ", "rains."]})
    answers = set()
    for _ in range(8):  # clients, each with a connection of its own
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            first = client.responses.create(input=pieces)
            *_, last = client.responses.create(input=pieces, stream=True)
            answers |= {first.id, last.response.id}
    for name in answers:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert client.responses.retrieve(name).output_text == "It rains."
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = iter(client.responses.create(input=json.dumps({"wait": True}), stream=True))
        name = next(stream).response.id
        seen = set()
        for _ in range(8):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as other:
                seen.add(other.responses.retrieve(name).status)
        assert seen == {"in_progress"}
        stream.close()  # type: ignore[attr-defined]
