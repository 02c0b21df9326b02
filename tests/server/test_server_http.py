"""The HTTP side alone, over an engine that is a stub: forms, limits, raw sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from http_server import Server, Start, until
from pydantic import BaseModel

from reprise.server.fields import ChatRequest, CompletionRequest, Generation

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"


def orders(**given: Any) -> str:
    return json.dumps(given)


def events(text: str) -> list[Any]:
    """Data of each event; every event is one line."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(each.startswith("data: ") and "\n" not in each for each in parts)
    data = [each.removeprefix("data: ") for each in parts]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found = response.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return dict(found["error"])


def test_a_stream_has_the_order_that_clients_rely_on(stub: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": orders(pieces=["a", "", 'b"\n'])}],
        "stream": True, "stream_options": {"include_usage": True}, "n": 2,
    }  # fmt: skip
    with stub.client() as client:
        response = client.post(CHAT, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *chunks, last, done = events(response.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    for index in (0, 1):
        mine = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        deltas = [each["delta"] for each in mine]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(each["content"] for each in deltas[1:-1]) == 'ab"\n'
        assert all(each["content"] for each in deltas[1:-1])  # no empty ones
        assert deltas[-1] == {}
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert all(each["usage"] is None for each in chunks)
    assert len({(each["id"], each["created"], each["object"]) for each in [*chunks, last]}) == 1
    assert last["object"] == "chat.completion.chunk"


def test_streams_of_one_connection_end_one_behind_the_other(stub: Server) -> None:
    """Also those that were asked for before the first had an end, and the one that closes it."""
    body = json.dumps({"prompt": orders(pieces=["a", "b"]), "stream": True}).encode()
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    asked = [
        f"{head}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body
        for more in ("", "", "", "Connection: close\r\n")
    ]
    with socket.create_connection(("127.0.0.1", stub.port), timeout=30) as connection:
        received = b""
        connection.sendall(asked[0])
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += connection.recv(1 << 16)
        connection.sendall(b"".join(asked[1:]))
        while part := connection.recv(1 << 16):
            received += part
    *replies, rest = received.split(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert len(replies) == len(asked)
    assert rest == b""
    assert all(each.count(b" 200 OK") == 1 and each.count(b"data: ") == 3 for each in replies)


def test_usage_comes_only_where_it_is_wanted(stub: Server) -> None:
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 3, "stream": True}
    with stub.client() as client:
        plain = events(client.post(COMPLETE, json=body).text)
        assert all("usage" not in each for each in plain[:-1])
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        for samples in (1, 3):  # so far of all samples together
            *chunks, _ = events(client.post(COMPLETE, json={**body, "n": samples}).text)
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts)
            assert counts[-1] == 3 * samples
            assert len({each["usage"]["prompt_tokens"] for each in chunks}) == 1


def test_several_prompts_and_samples_have_their_own_places(stub: Server) -> None:
    prompts = [orders(pieces=[letter]) for letter in "abc"]
    with stub.client() as client:
        reply = client.post(COMPLETE, json={"prompt": prompts, "n": 2}).json()
        stream = events(
            client.post(COMPLETE, json={"prompt": prompts, "n": 2, "stream": True}).text
        )
    assert [(each["index"], each["text"]) for each in reply["choices"]] == list(enumerate("aabbcc"))
    assert reply["usage"]["prompt_tokens"] == 21
    texts = dict.fromkeys(range(6), "")
    for chunk in stream[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(texts.values()) == list("aabbcc")


def test_an_error_behind_the_first_chunk_is_an_event(stub: Server, tmp_path: Path) -> None:
    received, go_on = "", tmp_path / "go on"
    with stub.client() as client:
        body = {"prompt": orders(fail=2, until=str(go_on)), "stream": True}
        with client.stream("POST", COMPLETE, json=body) as response:
            for part in response.iter_text():
                received += part
                go_on.touch()
        *_, told, done = events(received)
        plain = error(client.post(COMPLETE, json={"prompt": orders(fail=2)}), 500)
    assert done == "[DONE]"
    for each in (told["error"], plain):
        assert each["type"] == "server_error"
        assert "RuntimeError" in each["message"]
        assert "/secret" not in each["message"]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETE, {}, "prompt"),
    (COMPLETE, {"prompt": ""}, "prompt"),
    (COMPLETE, {"prompt": []}, "prompt"),
    (COMPLETE, {"prompt": [[]]}, "prompt"),
    (COMPLETE, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETE, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETE, {"prompt": [[{}]]}, "prompt"),
    (COMPLETE, {"prompt": [1, True]}, "prompt"),
    (COMPLETE, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (COMPLETE, {"prompt": "x", "max_tokens": "3"}, "max_tokens"),
    (COMPLETE, {"prompt": "x", "temperature": -0.1}, "temperature"),
    (COMPLETE, {"prompt": "x", "top_p": 0}, "top_p"),
    (COMPLETE, {"prompt": "x", "n": 0}, "n"),
    (COMPLETE, {"prompt": ["x"] * 100, "n": 2}, "n"),
    (COMPLETE, {"prompt": "x", "stop": 5}, "stop"),
    (COMPLETE, {"prompt": "x", "stop": [""]}, "stop"),
    (COMPLETE, {"prompt": "x", "logprobs": 21}, "logprobs"),
    (COMPLETE, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    (COMPLETE, {"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
    (COMPLETE, {"prompt": "x", "logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
    (COMPLETE, {"prompt": "x", "seed": 2**63}, "seed"),
    *((COMPLETE, {"prompt": "x", name: 3}, name) for name in (
        "max_completion_tokens", "max_new_tokens", "n_predict", "repeat_penalty")),
    *((path, {"prompt": "x", name: "a"}, name) for path in (COMPLETE, CHAT) for name in (
        "regex", "ebnf", "grammar", "json_schema", "guided_whitespace_pattern")),
    (COMPLETE, {"prompt": "x", "suffix": "y"}, "suffix"),
    (COMPLETE, {"prompt": "x", "best_of": 2}, "best_of"),
    (COMPLETE, {"prompt": "x", "best_of": True}, "best_of"),
    (COMPLETE, {"prompt": "x", "use_beam_search": 0}, "use_beam_search"),
    (COMPLETE, {"prompt": "x", "use_beam_search": True}, "use_beam_search"),
    (COMPLETE, {"prompt": "x", "min_tokens": 20, "max_tokens": 3}, "min_tokens"),
    (CHAT, {"min_tokens": 2**63}, "min_tokens"),
    (COMPLETE, {"prompt": "x", "stream_options": {}}, "stream_options"),
    (COMPLETE, {"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    (COMPLETE, {"prompt": "x", "thinking_token_budget": 5}, "thinking_token_budget"),
    (COMPLETE, {"prompt": [1] * 5000}, "prompt"),
    (COMPLETE, {"prompt": "x" * 300_000}, "prompt"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [[]]}, "messages"),
    (CHAT, {"messages": [None]}, "messages"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
    (CHAT, {"response_format": {"type": "text", "json_schema": {}}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
     "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {
        "schema": {}, "strict": "no"}}}, "response_format"),
    (CHAT, {"reasoning_effort": "turbo"}, "reasoning_effort"),
    (CHAT, {"moderation": {"model": "x"}}, "moderation"),
    (CHAT, {"guided_json": {}}, "guided_json"),
    (CHAT, {"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    (CHAT, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True},
     "continue_final_message"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"n": 129}, "n"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ("/detokenize", {"tokens": ["x"]}, "tokens.0"),
    ("/abort", {}, "request_id"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_what_is_wrong_is_named(stub: Server, path: str, body: dict[str, Any], param: str) -> None:
    if path == CHAT and param != "messages":
        body = {"messages": [{"role": "user", "content": "hi"}], **body}
    with stub.client() as client:
        found = error(client.post(path, json=body), 400)
    assert found["type"] == "invalid_request_error"
    assert found["param"] == param
    assert param.partition(".")[0] in found["message"] or found["code"] == "context_length_exceeded"
    assert len(found["message"]) < 1500


def numbers(model: type[BaseModel]) -> list[str]:
    """Fields that take a number."""
    return [
        name for name, each in model.model_fields.items()
        if {int, float} & {each.annotation, *get_args(each.annotation)}
    ]  # fmt: skip


def test_a_flag_is_no_number(stub: Server) -> None:
    """Though Python takes True for 1."""
    sampling = numbers(Generation)
    assert {"n", "temperature", "seed", "max_tokens", "priority"} <= set(sampling)
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    cases = [(COMPLETE, CompletionRequest, {"prompt": "x"}), (CHAT, ChatRequest, chat)]
    with stub.client() as client:
        for path, model, body in cases:
            assert len(numbers(model)) > len(sampling)
            for name in [*numbers(model), "best_of"]:
                for value in (True, False):
                    found = error(client.post(path, json={**body, name: value}), 400)
                    assert found["param"] == name
        for name in ("stop_token_ids", "allowed_token_ids"):
            body = {"prompt": "x", name: [True]}
            assert error(client.post(COMPLETE, json=body), 400)["param"] == f"{name}.0"
        body = {"prompt": "x", "logit_bias": {"5": True}}
        assert error(client.post(COMPLETE, json=body), 400)["param"] == "logit_bias.5"


def test_null_asks_for_nothing(stub: Server) -> None:
    """Clients send every field that they know."""
    names = [
        "n", "temperature", "top_p", "stop", "seed", "logit_bias", "logprobs", "suffix", "best_of",
        "echo", "user", "stream", "stream_options", "response_format", "tools", "tool_choice",
        "functions", "audio", "structured_outputs", "thinking_token_budget", "foo",
    ]  # fmt: skip
    with stub.client() as client:
        response = client.post(COMPLETE, json={"prompt": "x", **dict.fromkeys(names)})
    assert response.status_code == 200
    assert "x-reprise-ignored-fields" not in response.headers


def test_unknown_fields_are_listed_and_change_nothing(stub: Server) -> None:
    body = {
        "messages": [{"role": "user",
                      "content": [{"type": "text", "text": "x", "cache_control": 1}],
                      "provider_specific_fields": {}}],
        "max_tokens": 2, "foo": 1, "bar\r\nx-evil: 1": 2, "metadata": {}, "store": False,
    }  # fmt: skip
    with stub.client() as client:
        response = client.post(CHAT, json=body)
    assert response.status_code == 200
    assert response.headers["x-reprise-ignored-fields"].split(",") == [
        "bar??x-evil??1", "foo", "messages[].content[].cache_control",
        "messages[].provider_specific_fields",
    ]  # fmt: skip
    assert "x-evil" not in response.headers


def test_models_and_names(stub: Server) -> None:
    with stub.client() as client:
        listed = client.get("/v1/models").json()
        assert [each["id"] for each in listed["data"]] == ["stub"]
        assert client.get("/v1/models/stub").json() == listed["data"][0]
        assert error(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
        found = error(client.post(COMPLETE, json={"prompt": "x", "model": "other"}), 404)
        assert found["code"] == "model_not_found"
        assert found["param"] == "model"
        assert error(client.get("/nowhere"), 404)
        assert error(client.get(COMPLETE), 405)
        for path in ("/health", "/ready", "/ping"):
            for method in ("GET", "HEAD"):
                response = client.request(method, path)
                assert (response.status_code, response.content) == (200, b"")
        assert client.post("/ping").status_code == 200


def test_request_ids(stub: Server) -> None:
    with stub.client() as client:
        body = {"prompt": "x", "max_tokens": 1}
        mine = client.post(COMPLETE, json=body, headers={"x-request-id": "abc-1"})
        assert mine.headers["x-request-id"] == "abc-1"
        assert mine.json()["id"] == "cmpl-abc-1"
        for bad in ("", "x" * 129, "a b"):
            other = client.post(COMPLETE, json=body, headers={"x-request-id": bad})
            assert other.headers["x-request-id"] not in ("", bad)


def test_bodies_that_are_no_json(stub: Server) -> None:
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    nested = b'{"prompt": ' + b"[" * 200 + b"1" + b"]" * 200 + b"}"
    wrong = [
        b"", b"{", b"[]", b"1", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}', deep, nested, b'{"prompt": "x"} trailing',
        b'{"prompt": [1e400]}', b'{"prompt": [99999999999999999999999]}',
    ]  # fmt: skip
    with stub.client(headers={"content-type": "application/json"}) as client:
        for body in wrong:
            assert len(error(client.post(COMPLETE, content=body), 400)["message"]) < 2100
        form = client.post(
            COMPLETE, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}
        )
        assert error(form, 415)
        for encoding, status in (("gzip", 415), ("identity", 200)):
            packed = client.post(
                COMPLETE, content=b'{"prompt": "x"}', headers={"content-encoding": encoding}
            )
            assert packed.status_code == status
            assert status == 200 or "'gzip'" in error(packed, 415)["message"]
    with stub.client() as client:
        assert error(client.post(COMPLETE, content=b'{"prompt": "x"}'), 415)  # of no type


def test_a_reply_does_not_grow_with_what_was_wrong(stub: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "stop_token_ids": ["y" * 1000] * 5000}
    with stub.client() as client:
        response = client.post(CHAT, json=body)
    assert error(response, 400)
    assert len(response.content) < 5000


# ---- raw sockets ---------------------------------------------------------------------------


def raw(server: Server, data: bytes, seconds: float = 10) -> bytes:
    """What comes back until the server closes, or says nothing for a while."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        try:
            while more := connection.recv(65536):
                received += more
                if b"\r\n\r\n" in received and b"Transfer" not in received:
                    break
        except (TimeoutError, ConnectionError):
            pass
        return received


def head(length: int | str, extra: str = "") -> bytes:
    return (
        f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{extra}\r\n"
    ).encode()


def test_malformed_heads_harm_nobody(stub: Server) -> None:
    for data in (
        b"\x00\x01\x02\x03\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST " + b"x" * 100_000,
        head("-1"), head("abc"), head(3, "X-Big: " + "y" * 200_000 + "\r\n") + b"{}}",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\x0bb\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET \xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    ):  # fmt: skip
        received = raw(stub, data, 1)
        assert b" 500 " not in received[:20]
    with stub.client() as client:
        assert client.get("/health").status_code == 200


def test_a_half_closed_connection_and_a_cut_body_end(stub: Server) -> None:
    with socket.create_connection(("127.0.0.1", stub.port), timeout=100) as connection:
        connection.sendall(head(100) + b'{"prompt"')
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass  # it ends, with an answer or without
    with stub.client() as client:
        until(lambda: client.get("/load").json() == {"server_load": 0})


def test_a_client_that_leaves_ends_its_request(stub: Server) -> None:
    """Plain requests as well as streams, also large ones, for which reading is paused, and ones
    that the client has sent another one behind, at once or when it waits for the first."""
    before = len(stub.lines)
    with stub.client() as client:
        for stream, space, count in (
            (False, 0, 1), (True, 0, 1), (True, 100_000, 1), (True, 0, 2), (False, 0, 3),
            (False, 200_000, 2),
        ):  # fmt: skip
            body = json.dumps({"prompt": orders(wait=True), "stream": stream}).encode()
            body += b" " * space
            connection = socket.create_connection(("127.0.0.1", stub.port), timeout=100)
            for _ in range(count):
                connection.sendall(head(len(body)))
                time.sleep(0.02)  # so that the body is waited for, and comes at once
                connection.sendall(body)
                if not stream:
                    until(lambda: client.get("/load").json()["server_load"] == 1)
            until(lambda: client.get("/load").json()["server_load"] == 1)
            connection.close()
            until(lambda: client.get("/load").json()["server_load"] == 0)
    assert not [each for each in stub.lines[before:] if "ERROR" in each]


def test_heads_that_come_slowly_or_never(start: Start) -> None:
    server = start("--header-timeout", "1.5", "--max-header-bytes", "3000")
    line = b"GET /version HTTP/1.1\r\nHost: x\r\n"

    def open_one() -> socket.socket:
        return socket.create_connection(("127.0.0.1", server.port), timeout=100)

    def is_answered(connection: socket.socket) -> None:
        answer = b""
        while b"}" not in answer:
            answer += connection.recv(4096)
        assert b" 200 " in answer[:20]

    def ends_with_408(connection: socket.socket) -> None:
        with connection:
            answer = drain(connection, 1000)
            assert b" 408 " in answer[:20]
            assert b"did not come within 1.5 s" in answer

    began = time.monotonic()
    silent, broken_off, trickling, second = (open_one() for _ in range(4))
    second.sendall(line + b"\r\n")
    broken_off.sendall(line)
    is_answered(second)
    for each in line + b"x-slow: " + b"a" * 20:
        try:
            trickling.sendall(bytes([each]))
        except OSError:
            break
        time.sleep(0.1)
    assert time.monotonic() - began < 60
    for each in (silent, broken_off, trickling):
        ends_with_408(each)
    # A connection that has answered may be idle, but not begin and stop.
    second.sendall(line + b"\r\n")
    is_answered(second)
    second.sendall(b"GET /ver")
    ends_with_408(second)
    # A reply that takes longer than a head may is no late head, whatever comes behind it.
    body = json.dumps({"prompt": orders(wait=True), "stream": True}).encode()
    with open_one() as waiting:
        waiting.sendall(head(len(body)) + body)
        with server.client() as client:
            until(lambda: client.get("/load").json() == {"server_load": 1})
            time.sleep(2)
            assert client.get("/load").json() == {"server_load": 1}
    many = b"\r\n".join(b"x-%d: %b" % (number, b"b" * 90) for number in range(60))
    for headers in (b"x-large: " + b"a" * 4000, many):
        with open_one() as connection:
            connection.sendall(line + headers + b"\r\n\r\n")
            assert b" 431 " in drain(connection, 1000)[:20]
    with server.client() as client:
        assert client.get("/health").status_code == 200


def drain(connection: socket.socket, most: int = 100) -> bytes:
    """The end of what comes until the connection is closed."""
    last = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(1 << 16):
            last = (last + more)[-most:]
    return last


def test_limits_of_a_server(start: Start) -> None:
    server = start(
        "--max-body-bytes", "2000", "--body-timeout", "1.5", "--max-num-queued-reqs", "2",
        "--api-key", "k1", "--api-key", "k2", "--allowed-origins", "https://a.example",
        "--served-model-name", "m1", "--served-model-name", "m2",
    )  # fmt: skip
    with server.client(headers={"authorization": "Bearer k2"}) as client:
        body = {"prompt": "x", "max_tokens": 1, "model": "m2"}
        assert client.post(COMPLETE, json=body).json()["model"] == "m2"
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["m1", "m2"]
        # The body, declared or in chunks.
        large = json.dumps({"prompt": "x" * 3000}).encode()
        kind = {"content-type": "application/json"}
        assert error(client.post(COMPLETE, content=large, headers=kind), 413)
        chunks = (large[begin : begin + 500] for begin in range(0, len(large), 500))
        assert error(client.post(COMPLETE, content=chunks, headers=kind), 413)
        key = "Authorization: Bearer k1\r\n"
        assert b" 408 " in raw(server, head(50, key) + b'{"prompt"')[:20]
        # The queue.
        waiting = json.dumps({"prompt": orders(wait=True)}).encode()
        held = []
        for _ in range(2):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(head(len(waiting), key) + waiting)
            held.append(connection)
        until(lambda: client.get("/load").json()["server_load"] == 2)
        for stream in (False, True):
            response = client.post(COMPLETE, json={"prompt": "x", "stream": stream})
            assert error(response, 429)["code"] == "rate_limit_exceeded"
            assert 1 <= int(response.headers["retry-after"]) <= 3
        for each in held:
            each.close()
    with server.client() as client:
        for path in ("/v1/models", "/load", "/docs", "/openapi.json", "/nowhere", "/graphs"):
            refused = client.get(path)
            assert error(refused, 401)["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        for keys in ("Bearer k3", "Bearer", "Basic k1", "k1"):
            assert client.get("/load", headers={"authorization": keys}).status_code == 401
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert client.get(path).status_code == 200
        page = {"origin": "https://a.example"}
        assert client.get("/load", headers=page).headers["access-control-allow-origin"]
        preflight = client.options(
            COMPLETE, headers={**page, "access-control-request-method": "POST"}
        )
        assert preflight.status_code == 200
        other = client.get("/load", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_reader_that_takes_nothing_is_dropped(start: Start) -> None:
    server = start("--write-timeout", "0.3", "--allowed-origins", "*")
    body = json.dumps({"prompt": orders(repeat=["y", 50_000, 400]), "stream": True}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    with connection, server.client() as client:
        connection.sendall(head(len(body), "Origin: https://a.example\r\n") + body)
        until(lambda: "it is dropped" in server.log)
        until(lambda: client.get("/load").json()["server_load"] == 0)
        connection.settimeout(100)
        assert b"[DONE]" not in drain(connection)


@pytest.mark.long
def test_tls_and_lines_of_json(start: Start, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out",
         certificate, "-days", "1", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = start(
        "--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--log-format", "json"
    )
    context = ssl.create_default_context(cafile=certificate)
    with server.client(verify=context) as client:
        reply = client.post(
            COMPLETE, json={"prompt": "x", "max_tokens": 2}, headers={"x-request-id": "r-1"}
        )
    assert reply.status_code == 200
    until(lambda: "r-1" in server.log)
    lines = [json.loads(each) for each in server.lines if each.startswith("{")]
    (line,) = (each for each in lines if each.get("request_id") == "r-1")
    assert (line["status"], line["path"], line["completion_tokens"]) == (200, COMPLETE, 2)
    assert {"time", "level", "process", "seconds", "finish_reason"} <= line.keys()


@pytest.mark.long
def test_a_socket_in_the_file_system(start: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server = start("--uds", path)
    for _ in range(2):
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=path), base_url="http://x", timeout=30
        ) as client:
            assert client.post(COMPLETE, json={"prompt": "x"}).status_code == 200
        server.process.kill()  # which leaves the file behind
        server.process.wait()
        server = start("--uds", path)
    server.process.terminate()
    assert server.process.wait(20) == 0
    assert not Path(path).exists()
