"""The process that has the engine. HTTP processes ask it over sockets that their parent hands in.

Three threads: the engine's, the one that tokenizes, and the main one, which reads what HTTP
processes send. A fourth one waits for the parent to end.
"""

from __future__ import annotations

from collections.abc import Callable

from reprise.config import EngineConfig
from reprise.engine.process import begin, serve
from reprise.server.engine_server import EngineLimits, EngineServer
from reprise.server.logs import configure


def main(make: Callable[[EngineConfig, EngineLimits], EngineServer] = EngineServer) -> None:
    """Run as ``python -m reprise.server.engine_process FD``: the number of the control socket."""
    control, start = begin()
    configure(start["log_level"], start["log_format"], "engine")
    serve(control, lambda: make(EngineConfig(**start["engine"]), EngineLimits(*start["limits"])))


if __name__ == "__main__":
    main()
