"""Options that are no numbers, or empty, are refused by name: of an engine, and of a server."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from reprise.config import EngineConfig
from reprise.errors import ConfigError
from reprise.server.options import ServerOptions


def numeric(options: type[Any]) -> list[str]:
    """Fields that take a number and nothing like a flag."""
    found = [
        each.name
        for each in dataclasses.fields(options)
        if {"int", "float"} & set(str(each.type).replace("|", " ").split())
    ]
    assert len(found) > 5
    return found


@pytest.mark.parametrize(
    ("options", "name"),
    [(options, name) for options in (EngineConfig, ServerOptions) for name in numeric(options)],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "3", [1]])
def test_what_is_no_number(options: type[Any], name: str, value: Any) -> None:
    """NaN is less than nothing and more than nothing: no comparison alone finds it."""
    with pytest.raises(ConfigError, match=name):
        options(**{name: value})


@pytest.mark.parametrize(
    ("options", "name"),
    [(EngineConfig, "distributed_timeout_seconds"), (ServerOptions, "shutdown_timeout")],
)
def test_a_whole_number_that_no_float_holds(options: type[Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        options(**{name: 10**400})


@pytest.mark.parametrize("name", ["model", "tokenizer", "revision", "tokenizer_revision"])
def test_an_empty_name_is_no_place(name: str) -> None:
    """As of a shell's variable that is not set: the directory that one stands in is not meant."""
    with pytest.raises(ConfigError, match=f"{name}='' is empty"):
        EngineConfig(**{name: ""})


def test_an_empty_template_is_none() -> None:
    with pytest.raises(ConfigError, match="chat_template='' is empty"):
        _ = ServerOptions(chat_template="").template


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{% for m in messages %", "the chat template is not valid"),
        (b"Answer.", "does not read 'messages'"),
        (b"\xff{{ messages }}", "can't decode byte 0xff"),
    ],
)
def test_a_template_that_no_chat_could_use_is_told_before_the_model_is_loaded(
    tmp_path: Path, content: bytes, told: str
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_bytes(content)
    given = [str(file), content.decode()] if content[:1] == b"{" else [str(file)]
    for each in given:
        with pytest.raises(ConfigError, match=f"^chat_template=.*{told}"):
            _ = ServerOptions(chat_template=each).template
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert ServerOptions(chat_template=str(file)).template == file.read_text()
