"""The README's second block: a server, and a line that asks it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from http_server import Server

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_line_is_answered(server: Server) -> None:
    (shown,) = re.findall(r"^\$ reprise serve\n(.*)\n\.\.\.\n(.*)\n```", README, flags=re.MULTILINE)
    ours = server.url
    for line in shown:
        assert f"{line.replace('http://127.0.0.1:8000', ours)}\n" in server.lines
    (line,) = re.findall(r"^\$ (curl .*)$", README, flags=re.MULTILINE)
    _, url, _, header, _, body = shlex.split(line)
    name, _, value = header.partition(": ")
    path = url.removeprefix("http://127.0.0.1:8000")
    with server.client() as client:
        reply = client.post(path, headers={name: value}, content=body.encode()).json()
    assert "42" in json.dumps(reply["choices"][0]["message"]["content"])
