"""A process that answers others: started by its parent, which holds the other end of a socket."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable

from reprise.engine.service import EngineService
from reprise.errors import RepriseError, describe
from reprise.garbage import settle
from reprise.processes.control import Control

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 0.5
"""For others to read why it ended."""


def serve(
    control: Control,
    make: Callable[[], EngineService],
    orphaned: Callable[[], None] = lambda: None,
) -> None:
    """Make a service and let it answer. Does not return: the process ends with its parent, when the
    parent says so, or with the service.

    Args:
        control: The connection to the parent.
        make: Makes the service; what it raises is told to the parent.
        orphaned: Called when the parent has died.
    """
    waiting: list[tuple[bytes, int]] = []
    serving: list[EngineService] = []
    lock = threading.Lock()

    def hand_in(word: bytes, descriptor: int) -> None:
        if word == Control.CONNECTION:
            serving[0].connect(socket.socket(fileno=descriptor))
        else:
            serving[0].take_file(descriptor)

    def listen() -> None:
        """What the parent says; when it says nothing any more, it has died."""
        while True:
            word, descriptor = control.receive()
            if descriptor is not None:
                with lock:
                    if serving:
                        hand_in(word, descriptor)
                    else:
                        waiting.append((word, descriptor))
            elif word == Control.STOP and serving:
                serving[0].stop()
            else:
                orphaned()
                os._exit(1)

    threading.Thread(target=listen, name="reprise-control", daemon=True).start()
    try:
        service = make()
    except RepriseError as error:
        control.send_text(Control.FAILED, json.dumps([type(error).__name__, str(error)]))
        os._exit(2)
    except Exception as error:
        logger.exception("the engine could not start")
        control.send_text(Control.FAILED, json.dumps(["RepriseError", describe(error)]))
        os._exit(1)
    settle()
    with lock:
        serving.append(service)
        for word, descriptor in waiting:
            hand_in(word, descriptor)
    control.send(Control.READY)
    try:
        service.run()
    except Exception as error:
        # Of whatever kind: a process that answers nothing must not stay.
        logger.critical("%s", error, exc_info=not isinstance(error, RepriseError))
        threading.Event().wait(LAST_WORDS_SECONDS)
        os._exit(1)
    os._exit(0)
