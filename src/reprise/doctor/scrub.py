"""Take what is private out of a report: directories, the user's name, the machine's name."""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

_PATH = re.compile(r"""(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[^\s'"`<>|:;,()\[\]{}/\\]+[/\\]*)+""")
_LEAST = 3
"""Shorter names are words as well."""
_PUBLIC = ("root",)


def public_name(model: str | None) -> str | None:
    """A model or tokenizer as it may be told: a hub id as it is, a directory by its last part."""
    if model is None:
        return None
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) and not model.startswith(".")
    if is_hub_id and not Path(model).exists():
        return model
    return PurePath(os.path.abspath(os.path.expanduser(model))).name


class Scrubber:
    """Removes private parts from text.

    Files keep their last part if it has a suffix, which says what they are; of directories
    nothing is left.

    Args:
        private: Directories and files that the user has named, to be known even if they have
            spaces or are relative.
    """

    def __init__(self, private: Iterable[str | None] = ()) -> None:
        known: dict[str, str] = {}
        for path in private:
            if path is not None and (public := public_name(path)) != path:
                for each in (
                    path,
                    os.path.abspath(os.path.expanduser(path)),
                    os.path.realpath(path),
                ):
                    known[each] = public or ""
        for path, public in (
            (os.path.expanduser("~"), "~"),
            (tempfile.gettempdir(), "<tmp>"),
            (sys.prefix, "<python>"),
            (os.getcwd(), "<cwd>"),
        ):
            for each in (path, os.path.realpath(path)):
                if len(each) > 1:  # else every slash would be one
                    known.setdefault(each, public)
        self._known = dict(sorted(known.items(), key=lambda each: -len(each[0])))
        self._names = {}
        for name, public in ((_user(), "<user>"), (socket.gethostname(), "<host>")):
            if len(name) >= _LEAST and name not in _PUBLIC:
                self._names[re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")] = (
                    public
                )

    def text(self, text: str) -> str:
        """A text without what is private in it."""
        for path, public in self._known.items():
            replacement = public.replace("\\", r"\\")
            text = re.sub(rf"{re.escape(path)}(?![\w-])", replacement, text)
        text = _PATH.sub(lambda match: _last_part(match.group()), text)
        for name, public in self._names.items():
            text = name.sub(public, text)
        return text

    def data(self, value: Any) -> Any:
        """Plain data whose texts, keys included, are scrubbed."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.data(each) for key, each in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.data(each) for each in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return self.text(str(value))


def _last_part(path: str) -> str:
    last = re.split(r"[/\\]", path.rstrip("/\\."))[-1]
    return f"<path>/{last}" if "." in last.strip(".") else "<path>"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without an entry for its user
        return ""
