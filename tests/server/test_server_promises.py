"""What the reasons promise with which ``vllm serve``'s flags are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from http_server import Server, until

pytest.importorskip("xgrammar")

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SAID = "zebrawood und Zebraholz"


@pytest.fixture(scope="module")
def server(device: str) -> Iterator[Server]:
    found = Server(
        ["-m", "reprise", "serve", "--port", "0", "--device", device, "--num-blocks", "200",
         "--log-level", "debug", "--chat-template", TEMPLATE, "--tool-call-parser", "hermes"]
    )  # fmt: skip
    yield found
    found.close()


def test_neither_prompts_nor_answers_are_logged(server: Server) -> None:
    body: dict[str, Any] = {"prompt": SAID, "max_tokens": 12, "temperature": 0}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        streamed = client.post("/v1/completions", json={**body, "stream": True})
        refused = client.post("/v1/completions", json={**body, "temperature": -1})
        last = client.post("/v1/completions", json=body, headers={"x-request-id": "the-last"})
    assert [each.status_code for each in (streamed, refused, last)] == [200, 400, 200]
    until(lambda: "the-last" in server.log)
    assert len(answer) > 5
    assert SAID not in server.log
    assert answer.strip() not in server.log


def test_a_template_is_shown_the_tools_whatever_tool_choice_says(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": SAID}], "max_tokens": 4}
    tools = {"tools": [TOOL]}
    counts = []
    with server.client() as client:
        for more in ({}, tools, {**tools, "tool_choice": "none"},
                     {**tools, "tool_choice": "required"}):  # fmt: skip
            found = client.post("/v1/chat/completions", json={**chat, **more})
            assert found.status_code == 200, found.text
            counts.append(found.json()["usage"]["prompt_tokens"])
    assert counts[0] < counts[1] == counts[2] == counts[3]
