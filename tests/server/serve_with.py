"""``reprise serve`` with another program in the place of the engine's: PROGRAM OPTIONS..."""

from __future__ import annotations

import sys
from functools import partial

from reprise.cli import main
from reprise.server import supervisor

if __name__ == "__main__":
    program = sys.argv.pop(1).split()
    supervisor.Supervisor = partial(supervisor.Supervisor, engine_command=program)  # type: ignore[assignment,misc]
    sys.argv[1:1] = ["serve"]
    main()
