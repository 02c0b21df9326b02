"""What people put in front of a server: LiteLLM and LangChain, where they are installed.

``pip install litellm langchain-openai`` runs these tests; the oracle is the plain HTTP answer.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from http_server import Server

ASK = [{"role": "user", "content": "What is 12 + 30?"}]
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def plain(server: Server) -> str:
    body = {"model": "demo", "messages": ASK, **OPTIONS}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    text = reply["choices"][0]["message"]["content"]
    assert text
    return str(text)


def test_litellm(server: Server, plain: str) -> None:
    litellm = pytest.importorskip("litellm")
    for provider in ("openai", "hosted_vllm"):
        there = {"model": f"{provider}/demo", "api_base": f"{server.url}/v1", "api_key": "none"}
        reply = litellm.completion(messages=ASK, **there, **OPTIONS)
        assert reply.choices[0].message.content == plain
        assert reply.usage.completion_tokens > 0
        chunks = litellm.completion(messages=ASK, stream=True, **there, **OPTIONS)
        assert "".join(each.choices[0].delta.content or "" for each in chunks) == plain
        with pytest.raises(litellm.exceptions.BadRequestError):
            litellm.completion(messages=ASK, **there, temperature=-1)


def test_langchain(server: Server, plain: str) -> None:
    package = pytest.importorskip("langchain_openai")
    model = package.ChatOpenAI(model="demo", base_url=f"{server.url}/v1", api_key="none", **OPTIONS)
    asked = ASK[0]["content"]
    reply = model.invoke(asked)
    assert reply.content == plain
    assert reply.usage_metadata["output_tokens"] > 0
    assert "".join(each.content for each in model.stream(asked)) == plain
    assert [each.content for each in model.batch([asked, asked])] == [plain, plain]
