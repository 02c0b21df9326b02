"""The page at ``/``: a chat and the live view. Its files lie beside this one and need no build.

They are the same for everybody and hold nothing secret, so they need no key;
what they ask for does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from html import escape
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_FILES = {
    each.name: each.read_bytes()
    for each in Path(__file__).parent.iterdir()
    if each.suffix in _KINDS
}
_INDEX = "index.html"
PAGE_PATHS = frozenset("/" if name == _INDEX else f"/page/{name}" for name in _FILES)
"""All that the page is made of."""

HEADERS = {
    # Whatever a model writes: no script, style, picture or form of it does anything, and no text of
    # it can become markup (trusted types), even if the page's own code had a hole.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, root_path: str) -> None:
    """Add the routes of :data:`PAGE_PATHS`.

    Args:
        app: Of an HTTP process.
        root_path: What a proxy in front strips: addresses in the page begin with it.
    """
    for name, content in _FILES.items():
        path = f"/page/{name}"
        if name == _INDEX:
            path = "/"
            # Without a prefix they are relative: a proxy may strip one that we are not told of.
            base = f"{root_path.rstrip('/')}/" if root_path else ""
            content = content.replace(b"{{base}}", escape(base, quote=True).encode())
        kind = f"{_KINDS[Path(name).suffix]}; charset=utf-8"
        app.add_route(path, _file(content, kind), include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {**HEADERS, "ETag": tag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, 200, headers, kind)

    return answer
