"""The process that has the engine. HTTP processes ask it over sockets that their parent hands in.

Its threads are the engine's, those that tokenize, and the main one, which reads what HTTP
processes send. One more waits for the parent to end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reprise import early
from reprise.config import EngineConfig
from reprise.processes.child import begin

if TYPE_CHECKING:
    from reprise.server.engine_server import EngineLimits, EngineServer

    Make = Callable[[EngineConfig, EngineLimits], EngineServer]


def main(make: Make | None = None) -> None:
    """Run as ``python -m reprise.server.engine_process FD``: the number of the control socket.

    Args:
        make: Makes what answers; None: :class:`EngineServer`.
    """
    control, start = begin()
    config = EngineConfig(**start["engine"])
    if not config.computes_elsewhere:
        early.begin(start["engine"])
    # Only now, for the engine comes with torch.
    from reprise.engine.process import serve
    from reprise.server.engine_server import EngineLimits, EngineServer
    from reprise.server.logs import configure

    configure(start["log_level"], start["log_format"], "engine")
    limits = EngineLimits(*start["limits"])
    serve(control, lambda: (make or EngineServer)(config, limits))


if __name__ == "__main__":
    main()
