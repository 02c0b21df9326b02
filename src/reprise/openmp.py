"""How the threads of torch's CPU kernels wait for work: asleep, unless the user decides.

By default libgomp's threads spin for some 15 ms at the end of every parallel region. Where another
program has one of the cores, every region then waits for a thread that does not run, while a
thread that waits keeps the core from it: decoding becomes ten times slower. Asleep, a thread
costs a wake-up of some microseconds.

The libraries read their environment when they are loaded, so this comes before torch is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

SLEEP = {
    "GOMP_SPINCOUNT": "0",  # GNU's library, which torch's Linux wheels bring
    "KMP_BLOCKTIME": "0",  # LLVM's and Intel's, which others bring
}
CHOICES = ("OMP_WAIT_POLICY", *SLEEP)
"""Variables by which a user decides; then nothing is changed."""


def let_threads_sleep(environment: MutableMapping[str, str], loaded: bool) -> str:
    """Set what makes waiting threads sleep; returns how they wait and why, for people.

    Args:
        environment: Of this process.
        loaded: torch is imported already: nothing that is set now would be read.
    """
    chosen = [f"{name}={environment[name]}" for name in CHOICES if name in environment]
    if chosen:
        return f"waiting as {', '.join(chosen)} says"
    if loaded:
        return (
            "waiting as torch has it, which is slow where other programs use the cores: import "
            "reprise before torch, or set OMP_WAIT_POLICY=passive"
        )
    environment.update(SLEEP)
    return "asleep while they wait"


waiting = let_threads_sleep(os.environ, "torch" in sys.modules)
