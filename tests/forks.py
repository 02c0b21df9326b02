"""What is so in a fork of the process that tests run in."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

MARKS = (
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
)


def is_true_in_a_fork(told: Callable[[], bool]) -> bool:
    """What it says there; an exception is no."""
    process = os.fork()
    if process == 0:
        status = 2
        try:
            status = 0 if told() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
