"""When graphs are compared with eager execution, as ``--graph-verify`` says it."""

from __future__ import annotations

from dataclasses import dataclass

from reprise.errors import ConfigError


@dataclass(frozen=True)
class VerifyMode:
    """When graphs are compared with eager execution."""

    startup: bool = True
    """At start-up, and the first live step of each kind that start-up has not met."""
    canary: int = 0
    """While serving, recompute one in this many replays of each graph; 0: none."""
    background: bool = False
    """As ``canary``, with numbers that follow from what a canary costs."""

    def __str__(self) -> str:
        if self.background:
            return "auto"
        if self.canary:
            return f"canary:{self.canary}"
        return "startup" if self.startup else "off"


def parse_verify(text: str) -> VerifyMode:
    """Read ``--graph-verify``: ``off``, ``startup``, ``auto``, or ``canary:N``; the last two
    include start-up.

    Raises:
        ConfigError: Anything else.
    """
    kind, colon, number = text.strip().lower().partition(":")
    if kind == "canary" and colon and number.isdigit() and int(number) > 0:
        return VerifyMode(canary=int(number))
    if kind in ("off", "startup", "auto") and not colon:
        return VerifyMode(startup=kind != "off", background=kind == "auto")
    raise ConfigError(
        f"graph_verify={text!r}: expected off, startup, auto, or canary:N, such as canary:100 "
        "to recompute one step in a hundred"
    )
