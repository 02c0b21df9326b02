"""An HTTP process: uvicorn on a socket that the parent holds, and a connection to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator

import uvicorn
import uvloop
from prometheus_client import disable_created_metrics

from reprise.garbage import settle
from reprise.processes.child import leave_signals_to_parent
from reprise.processes.control import Control
from reprise.server.app import create_app
from reprise.server.client import EngineClient, EngineRefusal
from reprise.server.errors import STOPPING
from reprise.server.live.feed import Feed
from reprise.server.logs import configure
from reprise.server.options import ServerOptions
from reprise.server.protocol import protocol
from reprise.server.state import ServerState

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 2
"""For replies that are written already to reach slow clients."""
SWEEP_SECONDS = 1.0


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The parent says when to end."""
        yield


class Worker:
    """One HTTP process.

    Args:
        options: Of the server.
        client: Connected to the engine.
    """

    def __init__(self, options: ServerOptions, client: EngineClient) -> None:
        self.state = ServerState(options, client)
        self._feed = Feed(self.state)
        config = uvicorn.Config(
            create_app(self.state, self._feed),
            loop="uvloop",
            http=protocol(options.header_timeout, options.max_header_bytes),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=options.keep_alive,
            timeout_graceful_shutdown=LAST_WORDS_SECONDS,
            root_path=options.root_path,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs={"none": 0, "optional": 1, "required": 2}[options.ssl_cert_reqs],
        )
        self._server = _Server(config)
        self._stop = asyncio.Event()

    async def run(self, listener: socket.socket) -> None:
        """Serve until :meth:`stop`."""
        tasks = [
            asyncio.create_task(each) for each in (self._drain(), self._sweep(), self._greet())
        ]
        try:
            await self._server.serve([listener])
        finally:
            for each in tasks:
                each.cancel()

    def stop(self) -> None:
        """No new requests; running ones get their time."""
        self.state.draining = True
        self._stop.set()

    async def _greet(self) -> None:
        await self.state.client.ready.wait()
        self.state.log_defaults()

    async def _drain(self) -> None:
        await self._stop.wait()
        callers = self.state.callers
        end = asyncio.get_running_loop().time() + self.state.options.shutdown_timeout
        while len(callers) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        if len(callers):
            logger.warning("%d request(s) are aborted: the time to end is over", len(callers))
        for each in callers:
            each.fail(EngineRefusal(STOPPING, "the server is shutting down"))
        self._feed.close()
        self._server.should_exit = True

    async def _sweep(self) -> None:
        """Clients that take nothing of their streams for long are dropped."""
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, self.state.options.write_timeout / 2))
            self._drop_stalled()  # a call: while this sleeps it is to hold no caller

    def _drop_stalled(self) -> None:
        oldest = asyncio.get_running_loop().time() - self.state.options.write_timeout
        for each in (*self.state.callers, *self._feed.readers):
            if each.sending_since is not None and each.sending_since < oldest:
                logger.warning("a client has read nothing of its stream: it is dropped")
                each.stall()


async def serve(start: dict[str, object], options: ServerOptions, control: Control) -> None:
    """Connect to the engine, then serve.

    Args:
        start: What the parent said.
        options: Of the server.
        control: The connection to it.
    """
    loop = asyncio.get_running_loop()
    connection = socket.socket(fileno=int(str(start["engine"])))
    connection.setblocking(False)
    _, client = await loop.create_unix_connection(EngineClient, sock=connection)
    worker = Worker(options, client)

    def listen() -> None:
        """What the parent says; when it says nothing any more, it has died."""
        while control.receive()[0] == Control.STOP:
            loop.call_soon_threadsafe(worker.stop)
        os._exit(1)

    async def tell() -> None:
        await client.ready.wait()
        with contextlib.suppress(OSError):  # the parent has died, which is noticed above
            control.send(Control.READY)

    threading.Thread(target=listen, name="reprise-control", daemon=True).start()
    telling = loop.create_task(tell())
    try:
        await worker.run(socket.socket(fileno=int(str(start["listener"]))))
    finally:
        telling.cancel()


def main() -> None:
    """Run as ``python -m reprise.server.worker FD``: the number of the control socket."""
    leave_signals_to_parent()
    control = Control(socket.socket(fileno=int(sys.argv[1])))
    start = json.loads(control.receive_text())
    disable_created_metrics()
    settle()
    options = ServerOptions.from_json(start["options"])
    configure(start["log_level"], options.log_format, "http")
    uvloop.run(serve(start, options, control))
    os._exit(0)


if __name__ == "__main__":
    main()
