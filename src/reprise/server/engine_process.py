"""The process that has the engine. HTTP processes ask it over sockets that their parent hands in.

Three threads: the engine's, the one that tokenizes, and the main one, which reads what HTTP
processes send. A fourth one waits for the parent to end.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from reprise.config import EngineConfig
from reprise.errors import RepriseError, describe
from reprise.server.control import Control
from reprise.server.engine_server import EngineServer, QueueLimits
from reprise.server.logs import configure

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 0.5
"""For HTTP processes to read why the engine ended."""


def main(make: Callable[[EngineConfig, QueueLimits], EngineServer] = EngineServer) -> None:
    """Run as ``python -m reprise.server.engine_process FD``: the number of the control socket."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent says when to end
    control = Control(socket.socket(fileno=int(sys.argv[1])))
    start = json.loads(control.receive_text())
    configure(start["log_level"], start["log_format"], "engine")
    waiting: list[socket.socket] = []
    serving: list[EngineServer] = []
    lock = threading.Lock()

    def listen() -> None:
        """What the parent says; when it says nothing any more, it has died."""
        while True:
            word, connection = control.receive()
            if connection is not None:
                with lock:
                    if serving:
                        serving[0].connect(connection)
                    else:
                        waiting.append(connection)
            elif word == Control.STOP and serving:
                serving[0].stop()
            else:
                os._exit(1)

    threading.Thread(target=listen, name="reprise-control", daemon=True).start()
    try:
        server = make(EngineConfig(**start["engine"]), QueueLimits(*start["limits"]))
    except RepriseError as error:
        control.send_text(Control.FAILED, str(error))
        os._exit(2)
    except Exception as error:
        logger.exception("the engine could not start")
        control.send_text(Control.FAILED, describe(error))
        os._exit(1)
    with lock:
        serving.append(server)
        for each in waiting:
            server.connect(each)
    control.send(Control.READY)
    try:
        server.run()
    except RepriseError as error:
        logger.critical("%s", error)
        threading.Event().wait(LAST_WORDS_SECONDS)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
