"""What tests draw: the same each time, in whatever order they run."""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
from hypothesis import HealthCheck


def set_profiles(long: bool) -> None:
    """Of hypothesis. Its examples are the same each time, unless all combinations are asked for:
    then they are others each time, and those that failed come first in the next run."""
    hypothesis.settings.register_profile(
        "reprise",
        derandomize=not long,
        # On a busy machine an example, and what makes one, may take any time.
        deadline=None,
        # What the fixtures of our examples hold is the same for all of them.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("reprise")
    hypothesis.register_random(TORCH)


def seed(name: str) -> None:
    """Draws of Python's, numpy's and torch's own generators follow from ``name`` alone."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    random.seed(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number)
    TORCH.seed(number)


@contextlib.contextmanager
def seeded(name: str) -> Iterator[None]:
    """As :func:`seed`; behind it draws go on as if there had been none."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), numpy and numpy.random.get_state(), TORCH.getstate()
    seed(name)
    try:
        yield
    finally:
        random.setstate(before[0])
        if numpy is not None:
            numpy.random.set_state(before[1])
        TORCH.setstate(before[2])


class _Torch:
    """torch's generators, where a test has imported it: their first seed is the same each time."""

    def seed(self, number: int) -> None:
        if (torch := sys.modules.get("torch")) is not None:
            torch.manual_seed(number)

    def getstate(self) -> Any:
        """Of the CPU's generator: a device's costs a synchronization."""
        torch = sys.modules.get("torch")
        return None if torch is None else torch.get_rng_state()

    def setstate(self, state: Any) -> None:
        if state is not None:
            sys.modules["torch"].set_rng_state(state)


TORCH = _Torch()
