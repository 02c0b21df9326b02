"""How DeepSeek-V4 writes tool calls."""

from __future__ import annotations

import re

from reprise.server.tools.json_text import read, written
from reprise.server.tools.parser import MOST_HEADER, ListParser


class DeepSeekV4(ListParser):
    """``<｜DSML｜invoke name="f"><｜DSML｜parameter name="k" string="true">v</｜DSML｜parameter>
    </｜DSML｜invoke>``, between tags for all.

    Arguments are made JSON, a parameter when it is complete: the tag says whether its value is a
    text or is JSON already.
    """

    needs_special_tokens = True
    begin, end = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
    _INVOKE = re.compile(r'\s*<｜DSML｜invoke name="([^"\n]*)">')
    _PARAMETER = re.compile(r'\s*<｜DSML｜parameter name="([^"\n]*)" string="(true|false)">')
    # A value may have such tags in it: this one is followed by a parameter, or the call's end.
    _VALUE_END = re.compile(
        r"</｜DSML｜parameter>\s*(?=<｜DSML｜parameter name=|</｜DSML｜invoke>)"
    )
    first, _CALL_END = "<｜DSML｜invoke name=", "</｜DSML｜invoke>"

    def _entered(self) -> None:
        super()._entered()
        self._calling = False
        self._key: tuple[str, bool] | None = None
        self._count = 0

    def _step_inside(self) -> bool:
        if not self._calling:
            return self._begin_call() or self._step_between()
        if self._key is not None:
            return self._step_value(*self._key)
        found = self._PARAMETER.match(self._held[:MOST_HEADER])
        if found is not None:
            self._key, self._held = (found[1], found[2] == "true"), self._held[found.end() :]
            return True
        held = self._held.lstrip()
        if held.startswith(self._CALL_END):
            self._close(held[len(self._CALL_END) :])
            return True
        if self.end in held:  # the call's own tag was left out
            self._close(held[held.index(self.end) :])
            return True
        return False

    def _close(self, rest: str) -> None:
        self._arguments("}" if self._count else "{}")
        self._calling, self._count, self._held = False, 0, rest

    def _begin_call(self) -> bool:
        found = self._INVOKE.match(self._held[:MOST_HEADER])
        if found is not None:
            self._call(found[1])
            self._calling, self._held = True, self._held[found.end() :]
            return True
        return False

    def _step_value(self, key: str, is_text: bool) -> bool:
        found = self._VALUE_END.search(self._held)
        if found is None:
            return False
        text = value = self._held[: found.start()]
        if is_text or not _is_json(value):
            text = written(value)
        self._arguments(f"{', ' if self._count else '{'}{written(key)}: {text}")
        self._count += 1
        self._key, self._held = None, self._held[found.end() :]
        return True


def _is_json(text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True
