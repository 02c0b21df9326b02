"""The process of one replica: ``python -m reprise.replicas.process FD``."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
from typing import Any

from reprise.config import EngineConfig
from reprise.engine.process import serve
from reprise.parallel import SharedSeat
from reprise.processes.child import begin
from reprise.processes.control import Control
from reprise.replicas.service import ReplicaService


class _Forward(logging.Handler):
    """Hands lines to the parent, whose logging shows them."""

    def __init__(self, control: Control) -> None:
        super().__init__()
        self._control = control

    def emit(self, record: logging.LogRecord) -> None:
        line = json.dumps([record.name, record.levelno, record.getMessage()])
        with contextlib.suppress(OSError):  # the parent has died: so does this process
            self._control.send_text(Control.LOG, line)


def main() -> None:
    """Run until the parent says otherwise, or dies."""
    control, start = begin()
    faulthandler.enable()
    _set_up_log(control, start["level"])

    def remove_log() -> None:
        """Of a parent that was killed nothing stays."""
        with contextlib.suppress(OSError):
            os.unlink(start["log"])
        with contextlib.suppress(OSError):  # others have theirs there
            os.rmdir(os.path.dirname(start["log"]))

    def make() -> ReplicaService:
        seat = None if start["seat"] is None else SharedSeat(**start["seat"])
        return ReplicaService(EngineConfig(**start["engine"]), seat=seat)

    serve(control, make, remove_log)


def _set_up_log(control: Control, level: int) -> None:
    """Lines of ``reprise`` go to the log from INFO on, and to the parent as its level says."""
    own: Any = logging.StreamHandler(sys.stderr)
    own.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    forward = _Forward(control)
    forward.setLevel(level)
    logger = logging.getLogger("reprise")
    logger.handlers = [own, forward]
    logger.propagate = False
    logger.setLevel(min(level, logging.INFO))
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [own]


if __name__ == "__main__":
    main()
