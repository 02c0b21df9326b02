"""``python -m reprise.follower``: one rank of an engine. The leader's process starts it."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback


def main() -> None:
    """See :mod:`reprise.parallel`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the leader's
    parser = argparse.ArgumentParser(prog="python -m reprise.follower", description=__doc__)
    for name in ("rank", "size", "memory", "ring-bytes", "woken", "life"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from reprise.distributed.board import Board
    from reprise.distributed.ring import Reader
    from reprise.errors import RepriseError
    from reprise.parallel.follower import die_with, follow

    die_with(options.life)
    board = Board(options.memory, options.rank, options.size, options.ring_bytes)
    code = 0
    try:
        follow(board, Reader(board, options.woken, lambda: None))
    except BaseException as error:
        if not board.ended:
            if isinstance(error, RepriseError):
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            else:
                traceback.print_exc()
            board.fail(error)
        code = 1
    sys.stderr.flush()
    # Process groups that wait for lost peers would keep the interpreter from ending.
    os._exit(code)


if __name__ == "__main__":
    main()
