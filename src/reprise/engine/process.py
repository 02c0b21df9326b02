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
    parent = _Parent(control, orphaned)
    threading.Thread(target=parent.listen, name="reprise-control", daemon=True).start()
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
    parent.serve(service)
    control.send(Control.READY)
    try:
        service.run()
    except Exception as error:
        # Of whatever kind: a process that answers nothing must not stay.
        logger.critical("%s", error, exc_info=not isinstance(error, RepriseError))
        threading.Event().wait(LAST_WORDS_SECONDS)
        os._exit(1)
    os._exit(0)


class _Parent:
    """What the parent says and hands in, from the moment on at which the service is being made."""

    def __init__(self, control: Control, orphaned: Callable[[], None]) -> None:
        self._control, self._orphaned = control, orphaned
        self._lock = threading.Lock()
        self._service: EngineService | None = None
        self._waiting: list[tuple[bytes, int]] = []
        """Descriptors that came before the service was there, and the words they came with."""

    def listen(self) -> None:
        """Heed the parent; when it says nothing any more, it has died, and so does this process."""
        while True:
            word, descriptor = self._control.receive()
            if descriptor is not None:
                self._take(word, descriptor)
            elif word == Control.STOP and self._service is not None:
                self._service.stop()
            else:
                self._orphaned()
                os._exit(1)

    def serve(self, service: EngineService) -> None:
        """Hand on what has come to the service, and from now on what comes."""
        with self._lock:
            self._service = service
            for word, descriptor in self._waiting:
                _hand_in(service, word, descriptor)

    def _take(self, word: bytes, descriptor: int) -> None:
        with self._lock:
            if self._service is None:
                self._waiting.append((word, descriptor))
            else:
                _hand_in(self._service, word, descriptor)


def _hand_in(service: EngineService, word: bytes, descriptor: int) -> None:
    if word == Control.CONNECTION:
        service.connect(socket.socket(fileno=descriptor))
    else:
        service.take_file(descriptor)
