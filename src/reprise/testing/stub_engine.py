"""Speaks the engine's side of the server's protocol without a model: ``python -m
reprise.testing.stub_engine FD``.

A prompt says what comes: JSON with ``pieces`` (texts, one a step; default: one letter for each
token) or ``repeat`` (a text, how often it is in a piece, number of pieces), ``seconds`` of a step,
``fail`` (raise behind so many tokens), ``wait`` (never begin), ``until`` (go on behind the first
piece when this file is there) and ``more`` (say whether others were said to come). Other prompts
get as many letters as ``max_tokens`` says.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

from reprise.processes.control import Control
from reprise.server import wire
from reprise.server.reasoning import CLOSE, OPEN
from reprise.server.responses.store import ResponseStore

FACTS: dict[str, Any] = {
    "model": "stub", "version": "0", "device": "none", "dtype": "none", "max_model_len": 4096,
    "max_logprobs": 20, "recommended": {}, "thinks": True, "message_names": [],
    "think_ids": [None, None], "tool_parser": "none", "structured": False,
}  # fmt: skip
STEP_SECONDS = 0.001
TOKENS = 64
MOST_TOKENS = 1000


class _Request:
    def __init__(self, asked: wire.Generate) -> None:
        self.prompt = _text(asked)
        orders = _orders(self.prompt)
        self.number = asked.number
        self.name = asked.name
        limit = min(asked.params.get("max_tokens") or TOKENS, MOST_TOKENS)
        text, length, count = orders.get("repeat") or ["x", 1, limit]
        self.pieces: list[str] = orders.get("pieces") or [text * length] * count
        if "more" in orders:
            self.pieces = [str(asked.more)]
        self.seconds = float(orders.get("seconds", STEP_SECONDS))
        self.fail = orders.get("fail")
        self.waits = bool(orders.get("wait"))
        self.until: str | None = orders.get("until")
        self.n = int(asked.params.get("n") or 1)
        self.whole = asked.params["output_kind"] == "FINAL_ONLY"
        self.wants_sizes = "sizes" in asked.wants
        self.done = 0
        self.next_at = self._next(time.perf_counter())

    def _next(self, now: float) -> float:
        """All requests of one length of step have their steps together, as an engine's have."""
        return (now // self.seconds + 1) * self.seconds if self.seconds else now

    def item(self) -> list[Any] | None:
        """The delta of this step."""
        self.done += 1
        ends = self.done == len(self.pieces)
        if self.whole and not ends:
            return None
        text = "".join(self.pieces) if self.whole else self.pieces[self.done - 1]
        count = len(self.pieces) if self.whole else 1
        finish = "stop" if ends else None
        given = self.pieces if self.whole else [text]
        sizes = [len(each.encode()) for each in given]
        if self.n == 1 and not ends:
            return [self.number, text, sizes if self.wants_sizes else 1]
        more = None
        if self.wants_sizes:
            more = {"ids": [], "sizes": sizes, "logprobs": None, "suspect_from": None}
        outputs = [[index, text, count, finish, None, more] for index in range(self.n)]
        end = {"cached": 0, "queue": 0.0, "first_token": 0.0} if ends else None
        return [self.number, outputs, end, None]


class StubEngine:
    """Serves one HTTP process after the other, and several at once."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control.connection, selectors.EVENT_READ)
        self._frames: dict[socket.socket, wire.Frames] = {}
        self._requests: dict[tuple[socket.socket, int], _Request] = {}
        self.max_queued: int | None = None
        self.responses = ResponseStore(0)

    def run(self) -> None:
        while True:
            waiting = [each.next_at for each in self._requests.values() if not each.waits]
            timeout = max(0.0, min(waiting) - time.perf_counter()) if waiting else None
            for key, _ in self._selector.select(timeout):
                if key.fileobj is self._control.connection:
                    word, descriptor = self._control.receive()
                    if descriptor is None:
                        os._exit(0 if word == Control.STOP else 1)
                    self._connect(socket.socket(fileno=descriptor))
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
            self._step()

    def _connect(self, connection: socket.socket) -> None:
        self._frames[connection] = wire.Frames()
        self._selector.register(connection, selectors.EVENT_READ)
        connection.sendall(wire.frame(wire.Hello(wire.PROTOCOL, FACTS)))

    def _read(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(1 << 18)
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(connection)
            del self._frames[connection]
            for key in [each for each in self._requests if each[0] is connection]:
                del self._requests[key]
            connection.close()
            return
        for message in self._frames[connection].feed(received):
            self._answer(connection, message)

    def _answer(self, connection: socket.socket, message: Any) -> None:
        if isinstance(message, wire.Leave):
            self._requests.pop((connection, message.number), None)
        elif isinstance(message, wire.Call) and message.what == "response":
            answer = self.responses.answer(**message.arguments)
            connection.sendall(wire.frame(wire.Reply(message.number, answer)))
        elif isinstance(message, wire.Call):
            result = {"load": len(self._requests), "abort": 0, "metrics": [], "graphs": {},
                      "live": {"metrics": [], "caches": [], "graphs": []},
                      "detokenize": "text", "tokenize": {"count": 1, "tokens": [1]}}  # fmt: skip
            connection.sendall(wire.frame(wire.Reply(message.number, result[message.what])))
        elif self.max_queued is not None and len(self._requests) >= self.max_queued:
            refused = wire.Refused(message.number, "QueueFull", "the stub's queue is full")
            connection.sendall(wire.frame(refused))
        else:
            request = _Request(message)
            self._requests[connection, message.number] = request
            facts = {"prompt_tokens": 7, "tail": request.prompt[-64:], "prompt": request.prompt,
                     "first": [1, "a"], "prompt_ids": [1]}  # fmt: skip
            connection.sendall(wire.frame(wire.Accepted(message.number, facts)))

    def _step(self) -> None:
        now = time.perf_counter()
        items: dict[socket.socket, list[list[Any]]] = {}
        for (connection, number), request in list(self._requests.items()):
            if request.waits or request.next_at > now:
                continue
            request.next_at = request._next(now)
            if request.done and request.until is not None and not os.path.exists(request.until):
                continue
            if request.fail is not None and request.done >= request.fail:
                del self._requests[connection, number]
                connection.sendall(wire.frame(wire.Refused(number, "RuntimeError", "/secret/path")))
                continue
            item = request.item()
            if item is not None:
                items.setdefault(connection, []).append(item)
                if request.done == len(request.pieces):
                    del self._requests[connection, number]
        for connection, found in items.items():
            connection.sendall(wire.frame(wire.Deltas(found)))


def _text(asked: wire.Generate) -> str:
    if asked.chat is None:
        prompt = (asked.prompt or {}).get("prompt")
        return prompt if isinstance(prompt, str) else ""
    content = asked.chat["messages"][-1].get("content")
    thinks = (asked.chat.get("chat_template_kwargs") or {}).get("enable_thinking")
    tail = {True: OPEN + "\n", False: f"{OPEN}\n\n{CLOSE}\n\n", None: ""}[thinks]
    return (content if isinstance(content, str) else "") + tail


def _orders(text: str) -> dict[str, Any]:
    try:
        found, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control = Control(socket.socket(fileno=int(sys.argv[1])))
    start = json.loads(control.receive_text())
    engine = StubEngine(control)
    engine.max_queued, _, engine.responses.limit = start["limits"]
    control.send(Control.READY)
    engine.run()


if __name__ == "__main__":
    main()
